"""Torchrun's variables."""

from __future__ import annotations

import pytest

from ara.distributed.launch import Launch, launched, local_processes
from ara.errors import UsageError

TWO = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}, {"RANK": "5"}])
def test_without_several_processes_there_is_one(environ: dict[str, str]) -> None:
    assert launched(environ) == Launch(0, 1, 0, 1)


def test_variables_are_read() -> None:
    assert launched(TWO) == Launch(rank=3, size=4, local_rank=1, local_size=2)
    assert local_processes(TWO) == 2


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_missing_variable_is_named(name: str) -> None:
    environ = {key: value for key, value in TWO.items() if key != name}
    with pytest.raises(UsageError, match=f"WORLD_SIZE is 4, and {name} is not set") as caught:
        launched(environ)
    assert "torchrun" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"), ("RANK", "-1"), ("LOCAL_RANK", "²")]
)
def test_a_value_that_is_no_such_number_is_named(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is '{value}', expected a number"):
        launched({**TWO, name: value})


@pytest.mark.parametrize(("name", "value"), [("RANK", "4"), ("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "5")])
def test_contradictions_are_refused(name: str, value: str) -> None:
    with pytest.raises(UsageError, match="contradict each other"):
        launched({**TWO, name: value})


@pytest.mark.parametrize("value", ["", "0", "many"])
def test_memory_is_not_divided_by_what_is_no_number(value: str) -> None:
    assert local_processes({"LOCAL_WORLD_SIZE": value}) == 1
