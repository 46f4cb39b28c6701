"""What every text must do: those of the registry, and files in every form that ``file:`` takes."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from ara.data.conversations import ANSWERING, Conversations, conversation_tokens, load_conversations
from ara.data.filespecs import split_names
from ara.data.parquetfiles import PARQUET_SUFFIXES
from ara.data.textkinds import JSON_LINES
from ara.data.texts import SEPARATOR, TEXTS, Documents, Purpose, check_text_spec, is_chat, load_documents
from ara.data.tokens import calibration_windows, evaluation_windows
from ara.errors import DataError, UsageError
from tests.tiny import tiny_texts, tiny_tokenizer

PURPOSES: tuple[Purpose, ...] = ("calibration", "evaluation")
OTHER_FIELD = "content"
ROWS = tiny_texts(40)
Writer = Callable[[Path, list[str]], object]


def _zstd(data: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))


def _lines(rows: list[str], field: str) -> bytes:
    return "".join(json.dumps({"id": i, field: row}) + "\n" for i, row in enumerate(rows)).encode()


def _json_lines(pack: Callable[[bytes], bytes], field: str = "text") -> Writer:
    return lambda path, rows: path.write_bytes(pack(_lines(rows, field)))


def _plain(pack: Callable[[bytes], bytes]) -> Writer:
    return lambda path, rows: path.write_bytes(pack("\n".join(rows).encode()))


def _parquet(path: Path, rows: list[str]) -> None:
    parquet.write_table(pyarrow.table({"id": list(range(len(rows))), "text": rows}), path)


PACKINGS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": _zstd}
# File name (with the field after "#") → how it is written.
ROW_FILES: dict[str, Writer] = {
    f"a{suffix}{packing}": _json_lines(pack)
    for suffix in (".jsonl", ".ndjson", ".jsonlines", ".json", ".JSONL")
    for packing, pack in PACKINGS.items()
}
ROW_FILES |= {f"a{suffix}": _parquet for suffix in (".parquet", ".pq", ".data")}
ROW_FILES |= {f"a.jsonl#{OTHER_FIELD}": _json_lines(bytes, OTHER_FIELD), "a, b#1.jsonl": _json_lines(bytes)}
PLAIN_FILES: dict[str, Writer] = {
    f"a{suffix}{packing}": _plain(pack) for suffix in (".txt", ".md", "") for packing, pack in PACKINGS.items()
}
PLAIN_FILES |= {"packed.txt": _plain(gzip.compress)}
FILES = ROW_FILES | PLAIN_FILES

every_file = pytest.mark.parametrize("name", FILES)
every_registered = pytest.mark.parametrize("name", TEXTS.names())
every_plain = pytest.mark.parametrize("name", [name for name in TEXTS.names() if not is_chat(name)])
every_chat = pytest.mark.parametrize("name", [name for name in TEXTS.names() if is_chat(name)])


def _written(folder: Path, name: str, rows: list[str] = ROWS) -> str:
    """Write a file of the form ``name`` and return it as options name it."""
    path, _, field = name.partition("#") if name.endswith(OTHER_FIELD) else (name, "", "")
    folder.mkdir(exist_ok=True)
    FILES[name](folder / path, rows)
    return f"file:{folder / path}" + (f"#{field}" if field else "")


def _check(documents: Documents, spec: str, purpose: Purpose) -> None:
    """Check what every text promises."""
    assert (documents.name, documents.purpose, documents.separator) == (spec, purpose, SEPARATOR)
    assert documents.origin and documents.origin.isprintable()
    assert documents.documents and all(type(text) is str for text in documents.documents)
    filled = [text for text in documents.documents if text.strip()]
    assert len(filled) == len(documents.documents) if purpose == "calibration" else filled
    digest = hashlib.sha256()
    for text in documents.documents:
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    assert documents.digest == digest.hexdigest()
    assert load_documents(spec, purpose) == documents


def _check_windows(calibration: Documents, evaluation: Documents) -> None:
    """Check that windows depend on documents and seed alone, and that the seed reorders calibration documents."""
    tokenizer: Any = tiny_tokenizer()
    sizes = {"samples": 6, "seq_len": 40}
    first, again, other = (calibration_windows(calibration, tokenizer, **sizes, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids) and first.digest == again.digest
    assert (first.digest == other.digest) is (len(calibration.documents) == 1)
    front = evaluation_windows(evaluation, tokenizer, seq_len=40, max_windows=3)
    joined = tokenizer(SEPARATOR.join(evaluation.documents), verbose=False)["input_ids"]
    assert front.ids.flatten().tolist() == joined[:120]


@pytest.mark.data
@every_plain
def test_a_registered_text_has_what_it_promises(name: str, data_dir: Path) -> None:
    calibration, evaluation = (load_documents(name, purpose) for purpose in PURPOSES)
    _check(calibration, name, "calibration")
    _check(evaluation, name, "evaluation")
    _check_windows(calibration, evaluation)


def _loaded_chat(name: str) -> list[Conversations]:
    try:
        return [load_conversations(name, purpose) for purpose in PURPOSES]
    except DataError as error:
        if "no file" not in str(error):
            raise
        pytest.skip(f"the evaluation data do not hold {name}")


@pytest.mark.data
@every_chat
def test_registered_conversations_have_what_they_promise(name: str, data_dir: Path) -> None:
    parts = _loaded_chat(name)
    for purpose, part in zip(PURPOSES, parts, strict=True):
        assert (part.name, part.purpose) == (name, purpose) and part.origin.isprintable()
        assert part.conversations and load_conversations(name, purpose) == part
        assert any(message.role == ANSWERING for one in part.conversations for message in one.messages)
        assert all(message.content.strip() for one in part.conversations for message in one.messages)
        for tokens in conversation_tokens(tiny_tokenizer(), part.conversations[:5]):
            assert len(tokens.ids) == len(tokens.answers) > tokens.answers.sum() > 0
    assert set(parts[0].conversations).isdisjoint(parts[1].conversations) and parts[0].digest != parts[1].digest


@pytest.mark.data
@every_plain
def test_calibration_and_evaluation_of_a_registered_text_share_no_document(name: str, data_dir: Path) -> None:
    calibration, evaluation = ({text.strip() for text in load_documents(name, p).documents} for p in PURPOSES)
    assert calibration.isdisjoint(evaluation - {""})


@every_registered
def test_a_registered_name_is_known_and_described(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARA_DATA_DIR", raising=False)
    check_text_spec(name)
    entry = TEXTS.entry(name)
    assert 0 < len(entry.title) < 80 and not entry.title.endswith(".")
    assert split_names(f"{name},{name}, piqa") == [name, "piqa"]


def test_every_ending_of_rows_is_in_this_suite() -> None:
    assert {f"a{suffix}" for suffix in (*JSON_LINES, *PARQUET_SUFFIXES)} <= set(ROW_FILES)


@every_file
def test_a_file_has_what_it_promises(name: str, tmp_path: Path) -> None:
    spec = _written(tmp_path, name)
    check_text_spec(spec)
    assert split_names(f"piqa,{spec},c4") == ["piqa", spec, "c4"]
    calibration, evaluation = (load_documents(spec, purpose) for purpose in PURPOSES)
    _check(calibration, spec, "calibration")
    _check(evaluation, spec, "evaluation")
    assert calibration.documents == evaluation.documents
    assert calibration.documents == (tuple(ROWS) if name in ROW_FILES else ("\n".join(ROWS),))
    assert calibration.origin == f"file {spec.removeprefix('file:')}"
    _check_windows(calibration, evaluation)


@every_file
@pytest.mark.parametrize("purpose", PURPOSES)
def test_the_digest_of_a_file_is_that_of_its_text_wherever_it_is(name: str, purpose: Purpose, tmp_path: Path) -> None:
    def digest(folder: str, rows: list[str]) -> str:
        return load_documents(_written(tmp_path / folder, name, rows), purpose).digest

    assert digest("here", ROWS) == digest("there", ROWS)
    changed = [ROWS[1:], ROWS[::-1], [*ROWS[:-1], ROWS[-1] + "!"]]
    if name in ROW_FILES:
        changed.append([ROWS[0] + ROWS[1], *ROWS[2:]])
    assert len({digest("here", rows) for rows in [ROWS, *changed]}) == 1 + len(changed)


@pytest.mark.parametrize("name", ROW_FILES)
def test_blank_documents_are_left_out_of_calibration_alone(name: str, tmp_path: Path) -> None:
    spec = _written(tmp_path, name, ["", "one", " \n", "two"])
    assert load_documents(spec, "calibration").documents == ("one", "two")
    assert load_documents(spec, "evaluation").documents == ("", "one", " \n", "two")


@pytest.mark.parametrize("name", PLAIN_FILES)
def test_a_field_of_plain_text_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="plain text, which has no field 'content'"):
        load_documents(f"{_written(tmp_path, name)}#content", "calibration")
