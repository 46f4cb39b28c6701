import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ara.errors import CorruptedError, WorkspaceError
from ara.workspace.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    FileRecord,
    Manifest,
    Parent,
    TensorRecord,
    check_relative,
    file_record,
    read_manifest,
    verify_files,
)
from ara.workspace.tensors import save_tensors, tensor_records
from tests.damage import flip

UNSAFE = ["../x", "/etc/x", "a/../../x", "a\\x", "..\\x", "C:/x", "..", ""]


def manifest(**changes: Any) -> Manifest:
    """Return a sealed manifest in which no field has its default."""
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "stage": "decompose",
        "name": "whitened",
        "created": "2026-01-02T03:04:05.000006+00:00",
        "command": "ara decompose demo",
        "parents": (Parent(key="a/b", id="c"),),
        "config": {"method": "whitened", "options": {"alpha": "0.5"}, "exclude": ["x"], "trust": False, "none": None},
        "model": {"fingerprint": "f" * 64, "requested": "demo"},
        "seed": 3,
        "versions": {"ara": "0.1.0"},
        "seconds": 1.5,
        "peak_memory_bytes": 7,
        "files": {"factors/a.safetensors": FileRecord(bytes=5, sha256="0" * 64)},
        "tensors": {"w": TensorRecord(file="factors/a.safetensors", dtype="F32", shape=(3, 5), sha256="1" * 64)},
        "results": {"modules": [{"m": 3}], "keep": 0.8},
    }
    return Manifest(**{**values, **changes}).sealed()


def store(folder: Path, document: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(document))
    return folder


def edits(value: Any) -> Iterator[Any]:
    """Yield copies of a JSON value, each with one leaf changed, one entry added or one taken away."""
    if isinstance(value, dict):
        for key in value:
            for edited in edits(value[key]):
                yield {**value, key: edited}
            yield {other: value[other] for other in value if other != key}
        yield {**value, "added": 1}
    elif isinstance(value, list):
        for index in range(len(value)):
            for edited in edits(value[index]):
                yield [*value[:index], edited, *value[index + 1 :]]
        yield [*value, *(copy.deepcopy(value[:1]) or [1])]
        if value:
            yield value[1:]
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value + 1
    elif isinstance(value, str):
        yield value + "x"
        yield value[:-1]
    else:
        yield "x"


def test_sealed_manifest_comes_back_as_it_was(tmp_path):
    made = manifest()
    folder = store(tmp_path / "whitened", made.model_dump(mode="json"))
    assert read_manifest(folder) == made
    assert len(made.id) == len(made.checksum) == 64


def test_every_edit_of_every_field_is_detected(tmp_path):
    document = manifest().model_dump(mode="json")
    assert set(document) == set(Manifest.model_fields)
    tried = 0
    for edited in edits(document):
        folder = store(tmp_path / "whitened", edited)
        with pytest.raises(WorkspaceError):
            read_manifest(folder)
            pytest.fail(f"not noticed: {edited}")
        tried += 1
    assert tried > 60


def test_two_edits_that_hide_each_other_are_detected(tmp_path):
    """A recomputed checksum does not hide that the id belongs to other content."""
    made = manifest()
    forged = made.model_copy(update={"config": {"method": "plain"}})
    forged = forged.model_copy(update={"checksum": forged._checksum()})
    with pytest.raises(CorruptedError, match="damaged or edited"):
        read_manifest(store(tmp_path / "whitened", forged.model_dump(mode="json")))


def test_id_depends_on_content_and_not_on_time():
    made = manifest()
    later = manifest(
        created="2027", seconds=99.0, peak_memory_bytes=1, command="ara run demo", versions={"ara": "9"}, name="other"
    )
    assert later.id == made.id
    assert later.checksum != made.checksum
    for changed in (
        manifest(config={"method": "plain"}),
        manifest(model={"fingerprint": "e" * 64}),
        manifest(parents=()),
        manifest(files={"factors/a.safetensors": FileRecord(bytes=5, sha256="2" * 64)}),
        manifest(stage="allocate"),
    ):
        assert changed.id != made.id


def test_newer_format_asks_for_an_update_whatever_else_it_holds(tmp_path):
    for document in ({"format_version": FORMAT_VERSION + 1}, {"format_version": 99, "new": {}, "files": []}):
        with pytest.raises(WorkspaceError, match=f"has format {document['format_version']}") as caught:
            read_manifest(store(tmp_path / "whitened", document))
        assert not isinstance(caught.value, CorruptedError)
        assert "update" in caught.value.hint


def test_unknown_field_is_refused_by_name(tmp_path):
    document = {**manifest().model_dump(mode="json"), "surprise": 1}
    with pytest.raises(CorruptedError, match="surprise"):
        read_manifest(store(tmp_path / "whitened", document))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"format_version": 1}', "\ufeff{}"])
def test_anything_but_a_manifest_is_damaged(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(CorruptedError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_bytes_that_are_no_text_are_damaged(tmp_path):
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorruptedError, match="not readable"):
        read_manifest(tmp_path)


def test_missing_manifest_says_how_to_make_it(tmp_path):
    folder = tmp_path / "truncate" / "energy-0.80"
    folder.mkdir(parents=True)
    with pytest.raises(WorkspaceError, match=r"has no manifest\.json") as caught:
        read_manifest(folder)
    assert caught.value.hint.startswith("delete ") and caught.value.hint.endswith("and run ara truncate again")


@pytest.mark.parametrize("name", UNSAFE)
def test_paths_out_of_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="not a plain path"):
        check_relative(name)
    with pytest.raises(ValidationError, match="not a plain path"):
        manifest(files={name: FileRecord(bytes=1, sha256="0" * 64)})
    # Read back, even with a checksum that fits, it is refused before any file is touched.
    safe = manifest()
    forged = safe.model_copy(update={"files": {name: FileRecord(bytes=1, sha256="0" * 64)}}).sealed()
    with pytest.raises(CorruptedError, match="not a plain path"):
        read_manifest(store(tmp_path / "whitened", forged.model_dump(mode="json")))


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", "checkpoint/model-00001-of-00002.safetensors", "..a/b..c"])
def test_plain_paths_are_fine(name):
    check_relative(name)
    assert name in manifest(files={name: FileRecord(bytes=1, sha256="0" * 64)}).files


@pytest.fixture
def stage(tmp_path: Path) -> tuple[Path, Manifest]:
    """A folder with one file of three tensors, one of a single tensor and one of text, and its manifest."""
    folder = tmp_path / "whitened"
    folder.mkdir()
    values = torch.arange(105, dtype=torch.float32)
    save_tensors(
        folder / "a.safetensors", {"first": values.view(3, 35), "middle": values + 1, "zlast": values.view(5, 21) + 2}
    )
    save_tensors(folder / "b.safetensors", {"only": values})
    (folder / "notes.json").write_text("{}")
    names = ("a.safetensors", "b.safetensors", "notes.json")
    tensors = {name: record for file in names[:2] for name, record in tensor_records(folder / file, file).items()}
    made = manifest(files={name: file_record(folder / name) for name in names}, tensors=tensors)
    verify_files(folder, made)
    return folder, made


def tensor_range(path: Path, tensor: str) -> tuple[int, int]:
    """Return where the bytes of ``tensor`` start and end in a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    start, stop = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    return 8 + length + start, 8 + length + stop


@pytest.mark.parametrize("tensor", ["first", "middle", "zlast"])
def test_flipped_byte_in_a_tensor_names_file_and_tensor(stage, tensor):
    folder, made = stage
    path = folder / "a.safetensors"
    clean = path.read_bytes()
    start, stop = tensor_range(path, tensor)
    for position in (start, (start + stop) // 2, stop - 1):
        flip(path, position)
        with pytest.raises(CorruptedError) as caught:
            verify_files(folder, made)
        assert str(caught.value) == f"{path} does not match its checksum (damaged tensors: {tensor})"
        assert caught.value.hint == "make it again: ara decompose demo --force"
        path.write_bytes(clean)
    verify_files(folder, made)


def test_two_damaged_tensors_are_both_named(stage):
    folder, made = stage
    path = folder / "a.safetensors"
    for tensor in ("first", "zlast"):
        flip(path, tensor_range(path, tensor)[0])
    with pytest.raises(CorruptedError, match="damaged tensors: first, zlast"):
        verify_files(folder, made)


def test_flipped_byte_anywhere_names_the_file(stage):
    folder, made = stage
    for name in ("b.safetensors", "notes.json"):
        path = folder / name
        clean = path.read_bytes()
        for position in range(len(clean)):
            flip(path, position)
            with pytest.raises(CorruptedError, match=name):
                verify_files(folder, made)
                pytest.fail(f"not noticed: byte {position} of {name}")
        path.write_bytes(clean)


@pytest.mark.parametrize("position", range(8))
def test_damaged_header_length_is_told_without_reading_so_much(stage, position):
    folder, made = stage
    flip(folder / "b.safetensors", position)
    with pytest.raises(CorruptedError, match=r"b\.safetensors does not match its checksum \(its header is damaged\)"):
        verify_files(folder, made)


def test_truncated_lengthened_missing_and_linked_files_are_named(stage, tmp_path):
    folder, made = stage
    path = folder / "a.safetensors"
    clean = path.read_bytes()
    for wrong in (clean[:-1], clean[: len(clean) // 2], b"", clean + b"x"):
        path.write_bytes(wrong)
        with pytest.raises(CorruptedError, match=rf"a\.safetensors has {len(wrong):,} bytes.* says {len(clean):,}"):
            verify_files(folder, made)
    path.unlink()
    with pytest.raises(CorruptedError, match=r"a\.safetensors is missing"):
        verify_files(folder, made)
    path.mkdir()
    with pytest.raises(CorruptedError, match=r"a\.safetensors is missing or not a plain file"):
        verify_files(folder, made)
    path.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(clean)
    path.symlink_to(elsewhere)
    with pytest.raises(CorruptedError, match="not a plain file"):
        verify_files(folder, made)


def test_only_the_named_files_are_checked(stage):
    folder, made = stage
    flip(folder / "a.safetensors", -1)
    verify_files(folder, made, only=["b.safetensors", "notes.json"])
    with pytest.raises(CorruptedError):
        verify_files(folder, made, only=["a.safetensors"])
