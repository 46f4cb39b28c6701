"""The one reader of foreign JSON: one line for whatever is wrong."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from ara.errors import DataError, ModelError, NumericalError
from ara.jsonfile import MAX_DEPTH, dump, first_problem, parse, read_object


def _nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"a": NaN}',
        "-Infinity",
        "1e999",
        '"\\ud800"',
        '{"\\udfff": 1}',
        "9" * 5000,
        _nested(MAX_DEPTH + 1),
        _nested(100_000),
        '{"a":' * 100_000,
    ],
    ids=lambda text: text[:12],
)
def test_everything_wrong_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


def test_what_is_valid_comes_through() -> None:
    assert parse('{"a": [1, -2.5e3, "Ä\\u00e4\\ud83d\\ude00", null, true]}') == {"a": [1, -2500.0, "Ää😀", None, True]}
    parse(_nested(MAX_DEPTH))


def test_infinities_are_read_where_they_are_allowed() -> None:
    assert parse("[Infinity, 1e999]", finite=False) == [float("inf"), float("inf")]


def test_pairs_are_seen_in_their_order() -> None:
    assert parse('{"a": 1, "a": 2}', pairs=list) == [("a", 1), ("a", 2)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "holds a JSON list, expected an object"),
        (b"\xff", "is not JSON"),
        (b'{"a": ' * 100_000, f"is not JSON (more than {MAX_DEPTH} levels inside each other)"),
    ],
)
def test_the_line_names_the_file_and_has_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as found:
        read_object(path, "do this", DataError)
    assert str(found.value).startswith(str(path)) and said in str(found.value) and "\n" not in str(found.value)
    assert found.value.hint == "do this"


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("none", "No such file"), ("pipe", "it is a pipe"), (".", "Is a directory")):
        with pytest.raises(ModelError, match=said):
            read_object(tmp_path / name, None)


class _Loss(BaseModel):
    nats: float


class _Schema(BaseModel):
    ranks: dict[str, int]


@pytest.mark.parametrize(("content", "place"), [({}, "ranks"), ({"ranks": {"a": "x"}}, "ranks.a")])
def test_a_wrong_type_is_named_with_its_place(content: dict[str, Any], place: str) -> None:
    with pytest.raises(ValidationError) as found:
        _Schema.model_validate(content)
    told = first_problem(found.value)
    assert told.startswith(f"{place}: ") and "\n" not in told


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (math.nan, "it (nan)"),
        ({"a": [1.0, {"b": math.inf}]}, "a.1.b (inf)"),
        ({"a": (0.5, -math.inf)}, "a.1 (-inf)"),
        ({"deep": _Loss(nats=math.nan)}, "deep.nats (nan)"),
    ],
)
def test_no_number_is_written_that_a_reader_refuses(value: Any, place: str) -> None:
    with pytest.raises(NumericalError) as found:
        dump(value, "results.json")
    assert str(found.value).startswith(f"results.json: {place} is not a finite number")


def test_what_is_written_is_read_again() -> None:
    value = {"a": [1.5, None, "ü"], "b": {"c": True}}
    assert parse(dump(value, "x", indent=1)) == value
    assert parse(dump({"loss": _Loss(nats=2.5)}, "x")) == {"loss": {"nats": 2.5}}
