"""The alias table, and that looking at it stays cheap."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ara.models.aliases import ALIASES, DEMO
from ara.models.families import known_families
from ara.models.wheel import WHEEL_REQUIREMENT

_ROOT = Path(__file__).parents[3]


_FAMILIES = (*known_families().language, *known_families().multimodal)
_WORKS = {family.model_type for family in _FAMILIES if family.outcome == "works"}


def test_the_demo_comes_first() -> None:
    assert next(iter(ALIASES)) == DEMO


@pytest.mark.parametrize("alias", ALIASES.values(), ids=list(ALIASES))
def test_each_alias_names_a_repository_and_a_size(alias) -> None:
    assert ALIASES[alias.name] is alias
    assert re.fullmatch(r"[0-9.]+ [MB]", alias.parameters)
    assert alias.note and alias.licence
    assert alias.model_type in _WORKS
    if alias.name == DEMO:
        assert alias.repository == WHEEL_REQUIREMENT
    else:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", alias.repository)


def test_models_of_meta_and_google_say_that_they_are_gated() -> None:
    gated = [alias.name for alias in ALIASES.values() if "gated" in alias.licence]
    owners = ("meta-llama/", "google/")
    assert gated == [alias.name for alias in ALIASES.values() if alias.repository.startswith(owners)]


def test_importing_the_source_modules_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, ara.models.aliases, ara.models.sources, ara.models.placement, ara.models.wheel; "
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
