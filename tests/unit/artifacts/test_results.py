"""The typed results of all kinds: read, written, checked; and nobody else looks into a manifest for them."""

from __future__ import annotations

import ast
import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from ara.artifacts.base import Results
from ara.artifacts.training import TrainingResults
from ara.errors import CorruptedError
from ara.pipeline import KINDS, stages
from tests.reported import manifest, training
from tests.stored import FIGURES, SETTINGS

REPOSITORY = Path(__file__).resolve().parents[3]


def results_class(kind: str) -> type[Results]:
    found = next(one for one in KINDS if one.name == kind).load()
    assert isinstance(found, type) and issubclass(found, Results)
    return found


@pytest.mark.parametrize("stage", [stage.name for stage in stages()])
def test_what_is_read_is_written_again(stage: str) -> None:
    kind = next(one.produces for one in stages() if one.name == stage)
    results = results_class(kind).parse(FIGURES[stage])
    assert is_dataclass(results)
    with pytest.raises(AttributeError):
        setattr(results, fields(results)[0].name, None)
    plain = json.loads(json.dumps(results.plain()))
    assert plain.items() >= FIGURES[stage].items()
    assert results_class(kind).parse(plain) == results


@pytest.mark.parametrize("stage", [stage.name for stage in stages()])
def test_another_form_is_named_with_the_place(stage: str) -> None:
    kind = next(one.produces for one in stages() if one.name == stage)
    strange = manifest(
        stage, "strange", {**FIGURES[stage], next(iter(FIGURES[stage])): [[]]}, config=SETTINGS.get(stage, {})
    )
    with pytest.raises(CorruptedError, match=f"{stage}/strange was written in another form .results: ") as caught:
        results_class(kind).read(strange)
    assert caught.value.hint is not None and "--force" in caught.value.hint
    assert (results_class(kind).problem(strange) is not None) == results_class(kind).vital


@pytest.mark.parametrize("wrong", ["3.5", float("nan"), None])
def test_a_text_is_no_number(wrong: object) -> None:
    made = training()
    budgets = {"0.8": {**made.results["budgets"]["0.8"], "held_out": wrong}}
    with pytest.raises(CorruptedError, match=r"budgets\.0\.8\.held_out"):
        TrainingResults.read(made.model_copy(update={"results": {**made.results, "budgets": budgets}}))


def test_nobody_else_reads_results_of_a_manifest() -> None:
    """``manifest.results`` is written and read by ``ara/artifacts`` and by the writer of the workspace alone."""
    allowed = {"ara/artifacts", "ara/workspace"}
    found = []
    for top in ("ara", "ara_cli", "export", "benchmarks"):
        for path in (REPOSITORY / top).rglob("*.py"):
            place = path.relative_to(REPOSITORY)
            if place.parent.as_posix() in allowed:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr == "results" and _is_manifest(node.value):
                    found.append(f"{place}:{node.lineno}")
    assert not found


def _is_manifest(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute | ast.Name) and (
        node.attr if isinstance(node, ast.Attribute) else node.id
    ) in ("manifest", "made")
