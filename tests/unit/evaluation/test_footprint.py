"""Peak memory in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from ara.errors import UnavailableError
from ara.evaluation.cost import Case
from ara.evaluation.footprint import peak_memory
from tests.hungry import Hungry, die, refuse

CASE = Case(1, 0, 1)
MIB = 2**20


def test_what_a_model_takes_is_in_its_peak_and_not_in_ours(capfd: pytest.CaptureFixture[str]) -> None:
    held = bytearray(b"x") * (300 * MIB)  # ours
    small, large = (peak_memory(partial(Hungry, size * MIB), [CASE]) for size in (1, 200))
    assert small < 150 * MIB
    assert large - small == pytest.approx(199 * MIB, rel=0.05)
    assert len(held) == 300 * MIB
    assert "a library that prints" not in capfd.readouterr().out


@pytest.mark.parametrize(("load", "words"), [(refuse, "the weights are torn"), (die, "ended by the system")])
def test_a_failure_has_its_reason(load: Callable[[], Any], words: str) -> None:
    with pytest.raises(UnavailableError, match=words):
        peak_memory(load, [CASE])
