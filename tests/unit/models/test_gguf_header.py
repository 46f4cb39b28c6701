"""Damaged and hostile headers: one line, whatever they claim, before anything is read by it."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest

from ara.errors import ModelError
from ara.models import gguf_header
from ara.models.gguf_header import read_header
from ara.models.sources import resolve
from tests.gguf_files import gguf_model, write_gguf

U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10
HUGE = 10**18


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(
    *entries: bytes, tensors: int = 0, keys: int | None = None, version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
    count = len(entries) - tensors if keys is None else keys
    return magic + struct.pack("<IQQ", version, tensors, count) + b"".join(entries) + bytes(64)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not a GGUF file"),
    "text": (b"hello", "is not a GGUF file"),
    "magic alone": (b"GGUF", "its header does not end within the file"),
    "version": (header(version=9), "it has version 9, known are 2 and 3"),
    "byte order": (header(version=3 << 24), "big-endian"),
    "tensors": (header(tensors=HUGE, keys=0), "claims 1,000,000,000,000,000,000 tensors"),
    "keys": (header(keys=HUGE), "claims 1,000,000,000,000,000,000 keys"),
    "list": (header(key("a", ARRAY, struct.pack("<IQ", 0, HUGE))), "elements of a list, for which it is too short"),
    "list of texts": (header(key("a", ARRAY, struct.pack("<IQ", STRING, HUGE))), "elements of a list"),
    "list of lists": (
        header(key("a", ARRAY, struct.pack("<IQ", ARRAY, 1))),
        "a list has elements of the unknown type 9",
    ),
    "text length": (header(key("a", STRING, struct.pack("<Q", HUGE))), "does not end within the file"),
    "key length": (header(struct.pack("<Q", HUGE) + bytes(99)), "does not end within the file"),
    "type": (header(key("a", 77, b"")), "a value has the type 77"),
    "key not UTF-8": (header(key(b"\xff\xfe", U32, bytes(4))), "is not UTF-8"),
    "text not UTF-8": (header(key("a", STRING, text(b"\xff"))), "is not UTF-8"),
    "key twice": (header(key("a", U32, bytes(4)), key("a", U32, bytes(4))), "the key 'a' is there twice"),
    "alignment": (header(key("general.alignment", U32, struct.pack("<I", 3))), "expected a power of two"),
    "alignment 0": (header(key("general.alignment", U32, bytes(4))), "expected a power of two"),
    "alignment huge": (header(key("general.alignment", U64, struct.pack("<Q", 2**60))), "expected a power of two"),
    "alignment text": (header(key("general.alignment", STRING, text("32"))), "expected a power of two"),
    "tensor twice": (header(tensor("t", (1,)), tensor("t", (1,)), tensors=2), "the tensor 't' is there twice"),
    "dimensions": (header(tensor("t", (1,) * 5), tensors=1), "has 5 dimensions, at most 4"),
    "tensor type": (header(tensor("t", (1,), kind=99), tensors=1), "has the type 99"),
    "shape": (header(tensor("t", (2**40, 2**40, 2**40), offset=1), tensors=1), "but the file has"),
    "no rows": (header(tensor("t", (4, 0)), tensors=1), "which its type cannot hold"),
    "block": (header(tensor("t", (31,), kind=8), tensors=1), "which its type cannot hold"),
    "offset": (header(tensor("t", (1,), offset=2**63), tensors=1), "it is cut"),
    "no architecture": (header(), "does not name its architecture"),
    "architecture": (header(key("general.architecture", F32, bytes(4))), "does not name its architecture"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_one_line_says_what_is_wrong(case: str, cache: Path, tmp_path: Path) -> None:
    content, words = DAMAGED[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        resolve(str(path))
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.hint


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    return write_gguf(path, gguf_model("llama", head_dim=14)).read_bytes()


def test_a_file_that_ends_early_is_refused_wherever_it_ends(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for length in (*range(4, 4096, 97), len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut|too short"):
            read_header(path)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_never_crash(seed: int, whole: bytes, tmp_path: Path) -> None:
    import random

    chance = random.Random(seed)
    path = tmp_path / "model.gguf"
    for _ in range(100):
        content = bytearray(whole[:6000])
        for _ in range(3):
            content[chance.randrange(4, 400)] = chance.randrange(256)
        path.write_bytes(content)
        with pytest.raises(ModelError):
            read_header(path)


def test_lists_are_bounded_in_all(monkeypatch: pytest.MonkeyPatch, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    monkeypatch.setattr(gguf_header, "_MAX_ELEMENTS", 300)
    with pytest.raises(ModelError, match="its lists have more than 300 elements"):
        read_header(path)
    monkeypatch.setattr(gguf_header, "_MAX_HEADER_BYTES", 1000)
    with pytest.raises(ModelError, match=r"does not end within the first 1,000 bytes|too short"):
        read_header(path)


def test_a_pipe_does_not_block(cache: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="is neither a folder nor a file"):
        resolve(str(tmp_path / "model.gguf"))
    with pytest.raises(ModelError, match="it is a pipe, expected a regular file"):
        resolve(str(tmp_path))


def test_a_tokenizer_of_the_wrong_type_is_one_line(cache: Path, tmp_path: Path) -> None:
    wrong: dict[str, Any] = {
        "tokens": 7,
        "merges": "a b",
        "token_type": 3,
        "model": "unheard of",
        "bos_token_id": 10**9,
    }
    for name, value in wrong.items():
        path = tmp_path / f"{name}.gguf"

        def more(writer: Any, name: str = name, value: Any = value) -> None:
            writer.kv_data[0].pop(f"tokenizer.ggml.{name}")
            (writer.add_uint32 if isinstance(value, int) else writer.add_string)(f"tokenizer.ggml.{name}", value)

        write_gguf(path, gguf_model("llama", head_dim=14), more=more)
        with pytest.raises(ModelError, match="cannot be read") as caught:
            resolve(str(path))
        assert len(str(caught.value).splitlines()) == 1
