"""Text sources: what is read from where, and how bad files are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ara.data import texts
from ara.data.texts import Purpose, check_text_spec, load_documents
from ara.errors import DataError, UsageError


def _rows(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def _write_rows(path: Path, rows: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def _c4_folder(folder: Path, calibration: list[str], evaluation: list[str]) -> Path:
    _write_rows(folder / "c4_sample/c4_rp1.jsonl", calibration)
    _write_rows(folder / "c4_sample/c4_rp2.jsonl", evaluation)
    return folder


@pytest.fixture
def no_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARA_DATA_DIR", raising=False)


# -- names ------------------------------------------------------------------------------------------------------


def test_unknown_name_lists_near_matches_and_the_file_form() -> None:
    with pytest.raises(
        UsageError, match=r"unknown text 'wikitext-2'.*did you mean wikitext2.*c4.*python-docs"
    ) as error:
        check_text_spec("wikitext-2")
    assert "file:PATH" in (error.value.hint or "")
    assert error.value.exit_code == 2


def test_file_spec_is_checked_early(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names no file"):
        check_text_spec("file:")
    with pytest.raises(DataError, match="does not exist"):
        check_text_spec(f"file:{tmp_path / 'none.txt'}")
    with pytest.raises(DataError, match="is a folder"):
        check_text_spec(f"file:{tmp_path}")


def test_names_are_listed_without_torch() -> None:
    program = "import sys; from ara.data.texts import TEXTS; print(sorted({'torch', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- local data sets --------------------------------------------------------------------------------------------


@pytest.mark.data
def test_wikitext2_evaluation_joins_exactly(data_dir: Path) -> None:
    rows = _rows(data_dir / "wikitext2_raw/test.jsonl")
    documents = load_documents("wikitext2", "evaluation")
    assert documents.separator.join(documents.documents) == "\n\n".join(rows)
    assert len(documents.documents) == 4358  # as the split on the hub, empty rows included
    assert "" in documents.documents
    assert "test.jsonl" in documents.origin


def test_wikitext2_calibration_keeps_articles_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["", " = One = \n", "", " first\n", " = = Section = = \n", " second\n", " = Two = \n", " third\n"]
    _write_rows(tmp_path / "wikitext2_raw/train_first_1MB.jsonl", rows)
    monkeypatch.setenv("ARA_DATA_DIR", str(tmp_path))
    one, two = load_documents("wikitext2", "calibration").documents  # the blank start is dropped
    assert one == "\n\n".join(rows[1:6])
    assert two == "\n\n".join(rows[6:])


def test_c4_evaluation_drops_calibration_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARA_DATA_DIR", str(_c4_folder(tmp_path, ["a b", "c d"], ["e f", "c d\n", "g h", "a b"])))
    documents = load_documents("c4", "evaluation")
    assert documents.documents == ("e f", "g h")
    assert "2 documents" in documents.origin
    monkeypatch.setenv("ARA_DATA_DIR", str(_c4_folder(tmp_path, ["a b"], ["a b"])))
    with pytest.raises(DataError, match="nothing is left"):
        load_documents("c4", "evaluation")


@pytest.mark.parametrize("purpose", ["calibration", "evaluation"])
@pytest.mark.parametrize("name", ["c4", "wikitext2"])
def test_missing_local_file_names_path_text_and_remedy(
    name: str, purpose: Purpose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARA_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(texts, "_read_hub", lambda *_: pytest.fail("fell back to the hub in silence"))
    with pytest.raises(DataError) as error:
        load_documents(name, purpose)
    assert str(tmp_path) in str(error.value) and ".jsonl" in str(error.value)
    assert repr(name) in str(error.value) and purpose in str(error.value)
    assert "ARA_DATA_DIR" in (error.value.hint or "") and "python-docs" in (error.value.hint or "")


# -- python-docs ------------------------------------------------------------------------------------------------


def test_python_docs_split_at_a_document_near_85_percent(no_data_dir: None) -> None:
    from pydoc_data.topics import topics

    parts = [load_documents("python-docs", purpose).documents for purpose in ("calibration", "evaluation")]
    assert list(parts[0] + parts[1]) == [topics[name] for name in sorted(topics)]
    total = sum(len(text) for text in topics.values())
    front = sum(len(text) for text in parts[0])
    assert front <= 0.85 * total < front + len(parts[1][0])


def test_python_docs_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="pydoc_data"):
        load_documents("python-docs", "calibration")


# -- the hub ----------------------------------------------------------------------------------------------------


class _Hub:
    """Stands in for ``datasets.load_dataset`` and writes down how it was called."""

    def __init__(self, rows: list[str], error: Exception | None = None) -> None:
        self.rows, self.error, self.calls = rows, error, list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def __call__(self, *args: Any, **kwargs: Any) -> list[dict[str, str]]:
        self.calls.append((args, kwargs))
        if self.error:
            raise self.error
        return [{"text": row} for row in self.rows]


def _with_hub(monkeypatch: pytest.MonkeyPatch, hub: _Hub) -> _Hub:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", hub)
    return hub


def test_hub_c4_streams_one_shard_and_takes_its_front(no_data_dir: None, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _with_hub(monkeypatch, _Hub([f"document {number}" for number in range(1500)]))
    documents = load_documents("c4", "evaluation")
    assert len(documents.documents) == 1100
    (args, kwargs), *more = hub.calls
    assert args[0] == "allenai/c4" and not more
    assert kwargs["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert kwargs["split"] == "validation" and kwargs["streaming"] is True
    assert "allenai/c4" in documents.origin and "1,100" in documents.origin


def test_hub_wikitext2_keeps_every_row(no_data_dir: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["", " = One = \n", "", " text\n"]
    hub = _with_hub(monkeypatch, _Hub(rows))
    assert load_documents("wikitext2", "evaluation").documents == tuple(rows)
    (args, kwargs), *_ = hub.calls
    assert args == ("Salesforce/wikitext", "wikitext-2-raw-v1") and kwargs["split"] == "test"


@pytest.mark.parametrize("name", ["c4", "wikitext2"])
def test_unreachable_hub_says_what_to_do(name: str, no_data_dir: None, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_hub(monkeypatch, _Hub([], ConnectionError("no route")))
    with pytest.raises(DataError, match="no route") as error:
        load_documents(name, "calibration")
    for remedy in ("ARA_DATA_DIR", "python-docs", "file:PATH"):
        assert remedy in (error.value.hint or "")


# -- files ------------------------------------------------------------------------------------------------------


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\nthree")
    documents = load_documents(f"file:{path}", "evaluation")
    assert documents.documents == ("one\r\ntwo\n\nthree",)
    assert str(path) in documents.origin


def test_jsonl_is_cut_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one\u2028still one", "url": 1}\n\n{"text": "two"}', encoding="utf-8")
    assert load_documents(f"file:{path}", "calibration").documents == ("one\u2028still one", "two")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"text": "fine"}\n{"text": \n', r"line 2: not JSON"),
        (b'{"text": "fine"}\n{"txt": "x", "id": 3}\n', r"line 2: got an object with txt, id, expected .*'text'"),
        (b'{"text": 5}\n', r"line 1: field 'text' is a number, expected a string"),
        (b'{"text": null}\n', r"line 1: field 'text' is null, expected a string"),
        (b'{"text": "fine", "id": "\\udc00"}\n', r"line 1: .*surrogate"),
        (b'[\n{"text": "a"}\n]\n', r"one JSON document, expected JSON lines"),
        (b'\n\n["text"]\n', r"line 3: got list"),
        (b'{"text": "fine"}\n{"text": "\xff"}\n', r"line 2: not UTF-8"),
        (b'{"text": "\\ud800"}\n', r"line 1: .*surrogate"),
        (b"[" * 100_000, r"line 1: not JSON"),
        (b"", r"is empty"),
        (b'{"text": " \\n"}\n', r"is empty"),
    ],
)
def test_malformed_jsonl(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=complaint) as error:
        load_documents(f"file:{path}", "calibration")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("content", "complaint"), [(b"a\nb\n\xff", r"line 3: not UTF-8"), (b" \n", r"is empty")])
def test_malformed_text(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        load_documents(f"file:{path}", "calibration")
