"""Text files: what is read, what is refused by its kind, and the bounds of reading."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from ara.data import packed
from ara.data.filespecs import split_names
from ara.data.texts import check_text_spec, load_documents
from ara.errors import AraError, DataError, UsageError

ROWS = ["one", "two — three", "four\nfive"]
LINES = "".join(json.dumps({"content": row, "text": row.upper()}) + "\n" for row in ROWS).encode()
PLAIN = "A line of text.\nAnd, one; more — with | signs.\n".encode()


def _zstd(data: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))


def _table(path: Path, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=150)
    return path


def _read(path: Path | str) -> tuple[str, ...]:
    return load_documents(f"file:{path}", "calibration").documents


def _refused(path: Path | str, *words: str, kind: type[AraError] = DataError) -> AraError:
    with pytest.raises(kind) as caught:
        _read(path)
    said = f"{caught.value}\n{caught.value.hint}"
    assert "\n" not in str(caught.value) and caught.value.hint
    for word in words:
        assert word in said, said
    return caught.value


# -- what is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [gzip.compress, _zstd])
def test_packed_text_is_that_of_the_text(tmp_path: Path, pack: Any) -> None:
    """In several members, too, and by its first bytes whatever its name."""
    for name in ("a.txt.gz" if pack is gzip.compress else "a.txt.zst", "a.txt"):
        (tmp_path / name).write_bytes(pack(PLAIN[:20]) + pack(PLAIN[20:]))
        assert _read(tmp_path / name) == (PLAIN.decode(),)


def test_parquet(tmp_path: Path) -> None:
    path = _table(tmp_path / "a.parquet", content=ROWS, text=[row.upper() for row in ROWS], number=[1, 2, 3])
    assert _read(path) == tuple(row.upper() for row in ROWS)
    assert _read(f"{path}#content") == tuple(ROWS)
    _refused(f"{path}#contents", "no column 'contents'", "did you mean content", "'content', 'text'")
    _refused(f"{path}#number", "column 'number' holds int64, expected strings")
    large = pyarrow.array(ROWS, pyarrow.large_string())
    assert _read(_table(tmp_path / "b.parquet", text=large)) == tuple(ROWS)
    assert _read(_table(tmp_path / "c.parquet", text=large.dictionary_encode())) == tuple(ROWS)
    _refused(_table(tmp_path / "d.parquet", text=["a", "b", "c", None]), "row 4: column 'text' is null")
    _refused(_table(tmp_path / "e.parquet", x=[1]), "no column 'text'", "text columns: none")


def test_a_name_with_the_mark_of_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a#b.jsonl").write_bytes(LINES)
    assert _read("a#b.jsonl") == tuple(row.upper() for row in ROWS)
    assert _read("a#b.jsonl#content") == tuple(ROWS)
    _refused("a#c.jsonl", "text file a#c.jsonl does not exist")
    Path("a.txt").write_bytes(PLAIN)
    _refused("a.txt#content", "a.txt is plain text, which has no field 'content'", kind=UsageError)
    assert load_documents("file:a#b.jsonl#content", "evaluation").origin.endswith("/a#b.jsonl#content")


def test_a_missing_field_names_the_one_that_could_be_meant(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "content": "x", "\\u001b[31m": "y"}\n')
    error = _refused(tmp_path / "a.jsonl", "expected a string field 'text'", "file:PATH#content")
    assert "\x1b" not in str(error)


# -- what is refused by its kind --------------------------------------------------------------------------------


_ARRAY = json.dumps([{"text": row} for row in ROWS])
_CSV = "".join(f"{number},some words,{number * 2}\n" for number in range(30))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.json", _ARRAY, ["is a JSON array", "jq -c"]),
        ("a.txt", _ARRAY, ["is a JSON array", "jq -c"]),
        ("a.txt", json.dumps(json.loads(_ARRAY), indent=1), ["is a JSON array"]),
        ("a.txt", json.dumps({"data": ROWS}, indent=1), ["is a JSON object"]),
        ("a.json", json.dumps({"data": ROWS}, indent=1), ["is one JSON document"]),
        ("a.jsonl", _ARRAY, ["line 1: got list", "jq -c"]),
        ("a.jsonl", json.dumps(json.loads(_ARRAY), indent=1), ["is one JSON document", "jq -c"]),
        ("a.txt", LINES, ["holds JSON lines", ".jsonl"]),
        ("a", LINES, ["holds JSON lines", ".jsonl"]),
        ("a.csv", _CSV, ["comma-separated values"]),
        ("a.tsv.gz", gzip.compress(b"a\tb\n"), ["tab-separated values"]),
        ("a.txt", "id,text,length\n" + _CSV, ["holds a table", "','"]),
        ("a.txt", "id\ttext\tlength\n" + _CSV.replace(",", "\t"), ["holds a table"]),
        ("a.txt", b"text \0 text", ["byte 6 is NUL"]),
        ("a.txt", "some text".encode("utf-16"), ["is UTF-16 text", "iconv -f UTF-16 "]),
        ("a.txt", "some text".encode("utf-16-le"), ["is UTF-16LE text", "iconv -f UTF-16LE"]),
        ("a.jsonl", LINES.decode().encode("utf-16-be"), ["is UTF-16BE text"]),
        ("a.txt", "some text".encode("utf-32"), ["is UTF-32 text"]),
        ("a.txt", "some text".encode("utf-32-be"), ["not text", "NUL"]),
        ("a.txt", b"caf\xe9\n", ["line 1: not UTF-8", "iconv"]),
        ("a.jsonl.gz", LINES, ["is called .gz, but is not packed by gzip"]),
        ("a.jsonl.gz", _zstd(LINES), ["is called .gz, but is not packed by gzip"]),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], ["cannot be unpacked"]),
        ("a.jsonl.gz", gzip.compress(LINES)[:-6] + b"xxxxxx", ["cannot be unpacked"]),
        ("a.jsonl.gz", gzip.compress(LINES) + b"trailing", ["cannot be unpacked"]),
        ("a.jsonl.zst", _zstd(LINES)[:-3], ["cannot be unpacked"]),
        ("a.txt.gz", gzip.compress(gzip.compress(PLAIN)), ["packed by gzip twice"]),
        ("a.parquet", b"PAR1\x15\x04\x15\xf8" + bytes(range(256)) * 4 + b"PAR1", ["cannot be read as Parquet"]),
        ("a.parquet", PLAIN, ["is no Parquet file"]),
        ("a.txt", b"BZh91AY&SY", ["bzip2"]),
        ("a.txt", b"\xfd7zXZ\x00", ["by xz"]),
        ("a.docx", b"PK\x03\x04\x14", ["a zip archive", ".docx"]),
        ("a.txt", b"%PDF-1.7\n", ["a PDF document", "pdftotext"]),
        ("a.txt", b"\x7fELF\x02", ["a program"]),
        ("a.txt", b"\x89PNG\r\n\x1a\n", ["PNG"]),
        ("a.txt", b"\xff\xd8\xff\xe0", ["JPEG"]),
        ("a.tar", b"name".ljust(257, b"\0") + b"ustar", ["a tar archive"]),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid", ["Git LFS pointer", "git lfs pull"]),
    ],
    # Names alone would not tell them apart, and packed bytes hold the time.
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_what_is_no_text_is_told_by_what_it_is(tmp_path: Path, name: str, data: str | bytes, words: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    _refused(path, str(path), *words)


@pytest.mark.parametrize(
    "text",
    [
        "[1] A. Author, Some title, 1999.\n[2] Another.\n",
        "{not json}\nbut text",
        "[[wiki link]] is how it begins",
        '{"an": "example"}\nof JSON in prose, which goes on here.\n',
        "Apples, pears, plums.\n" * 40,
        "a, b and c\n" + "x, y and z\n" * 40,
        "| a | b |\n|---|---|\n" + "| x | y |\n" * 5,
        "One, two,\nthree\n",
    ],
)
def test_text_that_only_looks_like_something_else_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert _read(tmp_path / "a.txt") == (text,)


# -- bounds -----------------------------------------------------------------------------------------------------


def test_devices_pipes_sockets_and_folders_are_no_texts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path, word in (
            ("/dev/zero", "it is a device, expected a regular file"),
            (tmp_path / "pipe", "it is a pipe, expected a regular file"),
            (tmp_path / "socket", "it is a socket, expected a regular file"),
            (tmp_path, "is a folder, expected a file"),
            (tmp_path / ("x" * 300), "File name too long"),
        ):
            _refused(path, word)
            with pytest.raises(DataError, match=word):
                check_text_spec(f"file:{path}")
    _refused(f"{tmp_path}/a\0b", "cannot be used: a null character", kind=UsageError)


def test_no_more_is_read_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bomb little is unpacked: it is 300 times as large as the limit."""
    bomb = tmp_path / "bomb.txt.gz"
    bomb.write_bytes(gzip.compress(b"a" * 30_000_000))
    lines = tmp_path / "lines.jsonl.zst"
    lines.write_bytes(_zstd(b'{"text": "a"}\n' * 20_000))
    large = tmp_path / "large.txt"
    large.write_bytes(b"a" * 100_001)
    columns = _table(tmp_path / "a.parquet", text=["a" * 1000] * 300)
    assert max(path.stat().st_size for path in (bomb, lines, columns)) < 100_000
    monkeypatch.setattr(packed, "MAX_TEXT_BYTES", 100_000)
    monkeypatch.setattr(packed, "_CHUNK", 10_000)
    handed: list[int] = []
    read = gzip.GzipFile.read

    def watched(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        found = read(self, size)
        handed.append(len(found))
        return found

    monkeypatch.setattr(gzip.GzipFile, "read", watched)
    for path in (bomb, lines, large, columns):
        _refused(path, str(path), "the limit for a text", "100,000 lines")
    assert sum(handed) < 300_000


def test_a_line_without_an_end_is_not_read_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "' + b"a" * 300_000 + b'"}\n')
    assert len(_read(tmp_path / "a.jsonl")[1]) == 300_000
    monkeypatch.setattr(packed, "MAX_LINE_BYTES", 200_000)
    _refused(tmp_path / "a.jsonl", "line 2 has more than", "expected JSON lines")


def test_homes_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    _refused("~no-such-user/x.txt", "there is no such user", kind=UsageError)
    monkeypatch.setenv("ARA_DATA_DIR", "~no-such-user/data")
    with pytest.raises(UsageError, match="ARA_DATA_DIR '~no-such-user/data' cannot be used: there is no such user"):
        load_documents("c4", "calibration")


# -- several names, with commas ---------------------------------------------------------------------------------


def test_a_path_may_hold_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x,y").mkdir()
    for name in ("a,b.jsonl", "c.jsonl", "x,y/d.txt", "e, f.txt"):
        Path(name).write_bytes(LINES)
    cases = {
        "file:a,b.jsonl,wikitext2": ["file:a,b.jsonl", "wikitext2"],
        "piqa, file:a,b.jsonl ,file:c.jsonl": ["piqa", "file:a,b.jsonl", "file:c.jsonl"],
        f"file:{tmp_path}/x,y/d.txt,c4": [f"file:{tmp_path}/x,y/d.txt", "c4"],
        "file:e, f.txt,c4": ["file:e, f.txt", "c4"],
        "file:a,b.jsonl#content,c4": ["file:a,b.jsonl#content", "c4"],
        "file:c.jsonl#content,c4,c4": ["file:c.jsonl#content", "c4"],
        "file:none,b.jsonl": ["file:none", "b.jsonl"],
        "file:x,y": ["file:x", "y"],
        "file:,c4": ["file:", "c4"],
        "file:~no-such-user/x,c4": ["file:~no-such-user/x", "c4"],
        "a,,b, ,a": ["a", "b"],
        " , ": [],
    }
    assert {text: split_names(text) for text in cases} == cases
    assert len(split_names("file:" + "x," * 20_000)) == 2
