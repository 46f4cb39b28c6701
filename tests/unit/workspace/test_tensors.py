import errno
import hashlib

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from ara.errors import DiskFullError, disk_full_error
from ara.workspace.tensors import save_tensors, tensor_digests, tensor_records, written_aside
from tests.damage import listing

TENSORS = {
    "float": torch.arange(15.0).view(3, 5),
    "transposed": torch.arange(15.0).view(3, 5).T,
    "half": torch.arange(7.0, dtype=torch.bfloat16),
    "wide": torch.arange(6, dtype=torch.float64).view(1, 2, 3),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
}


def test_records_fit_what_safetensors_reads_back(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {"about": "test"})
    records = tensor_records(path, "folder/x.safetensors")
    back = safetensors.torch.load_file(path)
    assert set(records) == set(back) == set(TENSORS)
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
    for name, tensor in TENSORS.items():
        assert torch.equal(back[name], tensor)
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert records[name].sha256 == hashlib.sha256(data).hexdigest()
        assert records[name].shape == tuple(tensor.shape)
        assert records[name].dtype == names[tensor.dtype]
        assert records[name].file == "folder/x.safetensors"


def test_digests_are_those_of_the_file(tmp_path):
    tensors = {
        "float": torch.arange(6.0).view(2, 3).T,
        "bfloat16": torch.arange(5.0).bfloat16(),
        "number": torch.tensor(3),
        "empty": torch.zeros(0, dtype=torch.int32),
    }
    save_tensors(tmp_path / "a.safetensors", tensors)
    records = tensor_records(tmp_path / "a.safetensors", "a.safetensors")
    assert tensor_digests(tensors) == {name: record.sha256 for name, record in records.items()}


def test_same_tensors_give_the_same_bytes_in_any_order(tmp_path):
    save_tensors(tmp_path / "a", TENSORS)
    save_tensors(tmp_path / "b", dict(reversed(TENSORS.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_is_told_and_leaves_no_file(tmp_path, monkeypatch, error):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        DiskFullError, match=r"the disk is full: writing .*x\.safetensors failed \(about 8 MiB"
    ) as caught:
        save_tensors(tmp_path / "x.safetensors", {"w": torch.zeros(2 << 20)})
    assert "free some space" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_another_error_stays_what_it_is_and_leaves_no_file(tmp_path, monkeypatch):
    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise PermissionError("no")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(PermissionError):
        save_tensors(tmp_path / "x.safetensors", TENSORS)
    assert list(tmp_path.iterdir()) == []


def test_short_file_and_long_header_are_errors(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="ends before"):
        tensor_records(path, "x")
    path.write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    with pytest.raises(ValueError, match="longer than the file"):
        tensor_records(path, "x")


@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000,
        "[]",
        "null",
        '{"w": 3}',
        '{"w": {"dtype": "F32", "shape": "x", "data_offsets": [0, 60]}}',
        '{"w": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 61]}}',
        '{"w": {"dtype": "F32", "shape": [3, 5], "data_offsets": [4, 64]}}',
        '{"w": {"dtype": "F32", "shape": [3, 5], "data_offsets": [60, 0]}}',
        '{"w": {"dtype": "F32", "shape": [3, 5], "data_offsets": [-60, 0]}}',
        '{"w": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}',
        '{"a": {"dtype": "F32", "shape": [15], "data_offsets": [0, 60]}, '
        '"b": {"dtype": "F32", "shape": [15], "data_offsets": [0, 60]}}',
    ],
)
def test_headers_that_cannot_be(tmp_path, header):
    """Deep, of other types, outside the file, or many tensors on one stretch, each of which would be read."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(60))
    with pytest.raises(ValueError):
        tensor_records(path, "x")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EFBIG, "File too large"),
        SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
        OSError("1048576 requested and 262144 written"),
    ],
)
def test_a_limit_on_files_is_told_as_such(tmp_path, error):
    told = disk_full_error(error, tmp_path / "x")
    assert told is not None and "a file exceeds the size limit: writing" in str(told) and "ulimit -f" in told.hint
    # What is read within bounds is no matter of the disk.
    assert disk_full_error(OSError(errno.EFBIG, "it has more than 5 bytes", "x"), tmp_path) is None


def test_what_a_killed_writer_left_aside_is_taken_away_and_not_written_through(tmp_path):
    path, elsewhere = tmp_path / "x.html", tmp_path / "precious"
    elsewhere.write_text("years of work")
    with written_aside(path, tmp_path) as left:
        left.write_text("first")
    left.symlink_to(elsewhere)
    with written_aside(path, tmp_path) as aside, written_aside(path, tmp_path / "other") as second:
        assert aside == left != second
        aside.write_text("new")
        second.write_text("newer")
    assert path.read_text() == "new" and elsewhere.read_text() == "years of work"
    with pytest.raises(KeyboardInterrupt), written_aside(path, tmp_path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    assert listing(tmp_path) == {"x.html", "precious"} and path.read_text() == "new"
