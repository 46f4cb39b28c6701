"""``ranks.json``: out, edited, back in; and every way in which an edit can go wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ara.artifacts.ranks_file import RANKS_FORMAT, ranks_document, read_layout, read_ranks
from ara.errors import DataError, ProblemsError
from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation

SPECS = [
    LinearSpec("model.layers.0.q_proj", 0, "q_proj", 84, 60),  # ranks 1 to 34
    LinearSpec("model.layers.0.k_proj", 0, "k_proj", 28, 60),  # ranks 1 to 19
    LinearSpec("model.layers.1.q_proj", 1, "q_proj", 84, 60),
    LinearSpec("model.layers.1.odd", 1, "odd", 1, 19),  # dense only
]
GOOD: dict[str, Any] = {
    "model.layers.0.q_proj": 34,
    "model.layers.0.k_proj": 1,
    "model.layers.1.q_proj": "dense",
    "model.layers.1.odd": "dense",
}


def _write(path: Path, ranks: Any = None, **changes: Any) -> Path:
    document = {"format_version": RANKS_FORMAT, "about": {}, "ranks": GOOD if ranks is None else ranks, **changes}
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_round_trip(tmp_path: Path) -> None:
    allocation = Allocation.of_ranks(
        SPECS, {spec.name: rank for spec, rank in zip(SPECS, (34, 1, None, None), strict=True)}
    )
    path = tmp_path / "ranks.json"
    path.write_text(ranks_document(allocation, "factors", {"method": "energy"}, SPECS), encoding="utf-8")
    assert read_ranks(path, SPECS) == allocation
    document = json.loads(path.read_text())
    assert document == {"format_version": 1, "layout": "factors", "about": {"method": "energy"}, "ranks": GOOD}
    assert '"model.layers.0.q_proj": 34,\n' in path.read_text()  # one layer a line, for people


def test_order_and_about_do_not_matter(tmp_path: Path) -> None:
    path = _write(tmp_path / "r.json", dict(reversed(GOOD.items())))
    assert list(read_ranks(path, SPECS).ranks) == [spec.name for spec in SPECS]
    path.write_text(json.dumps({"format_version": 1, "ranks": GOOD}))
    assert read_ranks(path, SPECS).ranks["model.layers.0.q_proj"] == 34


@pytest.mark.parametrize(
    ("rank", "complaint"),
    [
        (0, "0 is neither a whole number of at least 1"),
        (-3, "-3 is neither"),
        (True, "True is neither"),
        (2.0, r"2\.0 is neither"),
        ("12", "'12' is neither"),
        ("Dense", "'Dense' is neither"),
        (None, "None is neither"),
        ([3], r"\[3\] is neither"),
        (35, r'rank 35 costs as much as the dense weight; write "dense" or at most 34'),
        (10**9, "rank 1000000000 costs as much"),
    ],
)
def test_a_rank_that_cannot_be_is_named(tmp_path: Path, rank: Any, complaint: str) -> None:
    path = _write(tmp_path / "r.json", {**GOOD, "model.layers.0.q_proj": rank})
    with pytest.raises(ProblemsError, match=f"model.layers.0.q_proj: {complaint}") as caught:
        read_ranks(path, SPECS)
    assert len(caught.value.problems) == 1
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)


def test_a_layer_without_any_useful_rank_can_only_be_dense(tmp_path: Path) -> None:
    path = _write(tmp_path / "r.json", {**GOOD, "model.layers.1.odd": 1})
    with pytest.raises(ProblemsError, match=r'write "dense"') as caught:
        read_ranks(path, SPECS)
    assert "at most 0" not in str(caught.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    ranks = {
        "model.layers.0.q_proj": 35,
        "model.layers.0.k_proj": "x",
        "model.layers.1.q_prj": 3,
        "model.layers.1.odd": "dense",
    }
    path = _write(tmp_path / "r.json", ranks, comment="mine")
    with pytest.raises(ProblemsError) as caught:
        read_ranks(path, SPECS)
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 5
    for words in (
        "unknown key 'comment'",
        "model.layers.1.q_prj: not a factorised layer; did you mean model.layers.1.q_proj",
        "model.layers.1.q_proj: missing",
        "model.layers.0.k_proj: 'x' is neither",
        "model.layers.0.q_proj: rank 35 costs",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", 'has no "ranks" table'),
        ("{}", 'has no "ranks" table'),
        ('{"format_version": 1, "ranks": [1]}', 'has no "ranks" table'),
        ('{"ranks": {}}', "has format_version None, expected 1"),
        ('{"format_version": 5, "ranks": {}}', "has format_version 5, expected 1 to 4"),
        ('{"format_version": 4, "block": 48, "ranks": {}}', "has block 48, expected one of 16, 32, 64, 128, 256"),
        ('{"format_version": 4, "block": true, "ranks": {}}', "has block True, expected one of"),
        ('{"format_version": 4, "zero_points": 0, "ranks": {}}', "has zero_points 0, expected true or false"),
        ('{"format_version": 2, "embedding_bits": 16, "ranks": {}}', "has embedding_bits 16, expected 4 or 8"),
        ('{"format_version": "1", "ranks": {}}', "has format_version '1', expected 1"),
        ('{"format_version": true, "ranks": {}}', "has format_version True, expected 1"),
        ('{"format_version": 1.0, "ranks": {}}', r"has format_version 1\.0, expected 1"),
        ('{"format_version": 1, "layout": ["factors"], "ranks": {}}', r"has layout \['factors'\], known are"),
        ('{"format_version": 1, "ranks": {"a": 1e400}}', "is not JSON .*1e400 is too large a number"),
        ('{"format_version": 1, "ranks": {"a": NaN}}', "is not JSON .*NaN"),
        ('{"format_version": 1, "ranks": {"a": ' + "9" * 5000 + "}}", "is not JSON .*"),
        ('{"format_version": 1, "ranks": {"\\ud800": 1}}', "is not JSON .*surrogate"),
        ('{"format_version": 1, "ranks": ' + "[" * 100_000, "is not JSON .*levels"),
        ('{"format_version": 1, "ranks": {"a": ' + "[" * 100 + "]" * 100 + "}}", "is not JSON .*levels"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(DataError, match=complaint) as caught:
        read_ranks(path, [] if read_layout(path) else SPECS)
    assert str(path) in str(caught.value) and caught.value.hint
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json cannot be read \(No such file"):
        read_ranks(tmp_path / "none.json", SPECS)
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory"):
        read_ranks(tmp_path, SPECS)
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "it is a pipe"), (Path("/dev/zero"), "it is a device")):
        with pytest.raises(DataError, match=rf"cannot be read \({words}, expected a regular file\)"):
            read_ranks(path, SPECS)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(DataError, match="it has more than 67,108,864 bytes"):
        read_ranks(tmp_path / "huge", SPECS)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not JSON"):
        read_ranks(tmp_path / "binary", SPECS)


def test_a_layer_named_twice_is_refused(tmp_path: Path) -> None:
    """JSON readers keep the last one and forget the first: an edit would be lost in silence."""
    path = _write(tmp_path / "r.json")
    text = path.read_text().replace('"ranks": {', '"ranks": {"model.layers.0.k_proj": 2, ')
    path.write_text(text)
    with pytest.raises((DataError, ProblemsError), match=r"model\.layers\.0\.k_proj"):
        read_ranks(path, SPECS)


def test_a_file_that_does_not_fit_at_all_is_told_in_few_lines(tmp_path: Path) -> None:
    strange = {"\x1b[31m\n": 3, "x" * 5000: 3, "model.layers.0.q_proj": ["y" * 5000], "model.layers.0.k_proj": 10**3000}
    path = _write(tmp_path / "r.json", {**strange, **{f"layer.{number}": 1 for number in range(50_000)}})
    with pytest.raises(ProblemsError) as caught:
        read_ranks(path, SPECS)
    assert len(caught.value.problems) == 21
    assert all(problem.isprintable() and len(problem) < 400 for problem in caught.value.problems)
    assert caught.value.problems[0] == r"'\x1b[31m\n': not a factorised layer"
    assert caught.value.problems[-1] == "and 49,986 more"
