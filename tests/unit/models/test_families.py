"""The table of families is that of the pinned transformers, complete, and says why."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import transformers

from ara.models.families import Table, known_families
from tests.families.probe import architectures

_PINNED = re.search(
    r"^transformers==(.+)$", (Path(__file__).parents[3] / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
)


def test_it_is_for_the_pinned_transformers() -> None:
    assert _PINNED is not None
    assert known_families().transformers == _PINNED[1], "make families writes it anew"


@pytest.mark.skipif(
    transformers.__version__ != known_families().transformers,
    reason=f"transformers {transformers.__version__}; the table is for {known_families().transformers}",
)
@pytest.mark.parametrize("table", get_args(Table))
def test_it_lists_exactly_the_architectures_of_transformers(table: Table) -> None:
    found = {family.model_type: family.architecture for family in getattr(known_families(), table)}
    assert found == architectures(table)


def test_every_family_works_or_has_a_reason() -> None:
    for family in (*known_families().language, *known_families().multimodal):
        assert family.outcome in ("works", "refused", "not built"), family
        assert bool(family.kinds) == (family.outcome == "works"), family
        assert bool(family.reason) == (family.outcome != "works"), family
        assert "\n" not in family.reason and "/" not in family.reason.partition(" (")[0], family
