"""What differs between layouts is a method of their classes: nothing else compares with the name of one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ara.layout_names import LAYOUT_NAMES

REPOSITORY = Path(__file__).resolve().parents[3]
FOLDERS = ("ara", "ara_cli", "export", "benchmarks")
OWN = REPOSITORY / "ara" / "layouts"
CLASSES = {"LowRankLinear", "PivotedLinear", "FactorsLayout", "PivotedLayout"}


def questions(source: str) -> list[str]:
    """Return the comparisons of a source with the name of a layout, and the classes of single layouts it imports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and any(_names_layout(part) for part in [node.left, *node.comparators]):
            text = ast.unparse(node)
            # "factors" is a kind of artifact and a word of everyday use, too.
            if "layout" in text.lower() or "pivoted" in text:
                found.append(text)
        elif isinstance(node, ast.MatchValue) and _names_layout(node.value):
            found.append(f"case {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if alias.name in CLASSES]
    return found


def _names_layout(part: ast.expr) -> bool:
    """Tell whether an operand is the name of a layout, or a collection with one."""
    parts = part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part]
    return any(isinstance(one, ast.Constant) and one.value in LAYOUT_NAMES for one in parts)


def test_no_module_asks_for_a_layout_by_name() -> None:
    sources = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py") if OWN not in path.parents]
    assert len(sources) > 100
    found = {path.relative_to(REPOSITORY).as_posix(): questions(path.read_text(encoding="utf-8")) for path in sources}
    assert {path: asked for path, asked in found.items() if asked} == {}


@pytest.mark.parametrize(
    "source",
    [
        'x = 1 if spec.layout == "pivoted" else 2',
        'if kind != "pivoted": pass',
        'if asked not in ("factors", layout): pass',
        'x = {"layout": 1}["layout"] in ["factors"]',
        'match name:\n    case "pivoted": pass',
        "from ara.layouts.modeling_ara import PivotedLinear",
    ],
)
def test_questions_are_seen(source: str) -> None:
    assert len(questions(source)) == 1


@pytest.mark.parametrize(
    "source",
    ['if kind == "factors": pass', "x = layout == DEFAULT_LAYOUT", "from ara.layouts.modeling_ara import densify"],
)
def test_other_comparisons_are_none(source: str) -> None:
    assert questions(source) == []
