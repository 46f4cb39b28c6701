"""Order of the passes and statistics by a clock that is no clock; caches of real models."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ara.errors import UnsupportedModelError
from ara.evaluation.cost import Case, count_model
from ara.evaluation.speed import Prepared, TorchRunner, interleaved_seconds, ratio
from tests.tiny import FAMILIES, tiny_config, tiny_model


class Machine:
    """Its clock moves by what its runners take; everything that happens is noted."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []  # type: float, list[str]

    def clock(self) -> float:
        return self.now

    def runner(self, name: str, seconds: list[float]) -> Any:
        left = iter(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += next(left)

        def rewind() -> None:
            self.log.append(f"rewind {name}")
            self.now += 1000

        def prepare(case: Case) -> Prepared:
            self.log.append(f"prepare {name}")
            self.now += 1000
            return Prepared(run, rewind)

        return SimpleNamespace(prepare=prepare)


def test_models_do_their_passes_in_rotating_order_and_the_first_round_does_not_count() -> None:
    machine, told = Machine(), []
    runners = {name: machine.runner(name, [100, i + 1, i + 2, i + 3]) for i, name in enumerate("abc")}
    seconds = interleaved_seconds(
        runners, Case(1, 0, 1), 3, clock=machine.clock, advance=lambda: told.append(machine.now)
    )
    assert seconds == {"a": [1, 2, 3], "b": [2, 3, 4], "c": [3, 4, 5]}
    assert machine.log[:3] == ["prepare a", "prepare b", "prepare c"]
    assert machine.log[3::2] == list("abc" + "bca" + "cab" + "abc")
    assert all(after == f"rewind {before}" for before, after in pairwise(machine.log[3:]) if " " not in before)
    assert len(told) == 12


def test_a_clock_that_stands_still_gives_finite_speeds() -> None:
    machine = Machine()
    seconds = interleaved_seconds({"a": machine.runner("a", [0] * 4)}, Case(1, 0, 1), 3, clock=machine.clock)
    assert all(math.isfinite(1 / value) for value in seconds["a"])


def test_a_ratio_is_that_of_rounds_and_its_interval_that_of_the_exact_bootstrap() -> None:
    """A resample's median is at most the k-th of n values if at least half of n draws are: a binomial tail."""
    draw, n = random.Random(3), 9
    other = [draw.uniform(1, 2) for _ in range(n)]
    ratios = sorted(draw.uniform(0.8, 1.7) for _ in range(n))
    base = [r * value for r, value in zip(ratios, other, strict=True)]
    found = ratio(base, other)

    def at_most(k: int) -> float:
        return sum(math.comb(n, i) * (k / n) ** i * (1 - k / n) ** (n - i) for i in range((n + 1) // 2, n + 1))

    low, high = (ratios[next(k for k in range(1, n + 1) if at_most(k) >= p) - 1] for p in (0.025, 0.975))
    assert found.median == pytest.approx(ratios[n // 2])
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert ratio(base, other) == found
    # A slow spell that hits a whole round changes nothing.
    slowed = ratio(
        [value * (5 if i == 4 else 1) for i, value in enumerate(base)], [*other[:4], 5 * other[4], *other[5:]]
    )
    assert slowed.median == pytest.approx(found.median)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoded_token_stands_behind_the_same_past(family: str) -> None:
    runner = TorchRunner(tiny_model(family))
    prepared = runner.prepare(Case(2, 11, 1))
    lengths = []
    for _ in range(3):
        lengths.append(prepared.run().get_seq_length())  # type: ignore[attr-defined]
        prepared.rewind()
    assert lengths == [12, 12, 12]


def test_windows_that_are_full_are_put_back() -> None:
    config = tiny_config("mistral")
    config.sliding_window = 6
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    prepared = TorchRunner(model).prepare(Case(2, 11, 1))
    states = []
    for _ in range(3):
        cache: Any = prepared.run()
        states.append((cache.get_seq_length(), cache.layers[0].keys.clone()))
        prepared.rewind()
    for length, keys in states:
        assert length == 12 and keys.shape[-2] == 5
        assert torch.equal(keys, states[0][1])


def test_a_prompt_is_read_behind_nothing_each_time() -> None:
    prepared = TorchRunner(tiny_model("llama")).prepare(Case(2, 0, 7))
    for _ in range(3):
        assert prepared.run().get_seq_length() == 7  # type: ignore[attr-defined]
        prepared.rewind()


@pytest.mark.parametrize("last", [True, False])
def test_logits_are_asked_for_as_counted(last: bool) -> None:
    model = tiny_model("llama")
    shapes = []
    model.register_forward_hook(lambda module, args, result: shapes.append(result.logits.shape))
    runner = TorchRunner(model, last_logits=last)
    runner.prepare(Case(2, 0, 7)).run()
    assert shapes == [(2, 1 if last else 7, 260)]
    assert runner.cost == count_model(model, last_logits=last)
    assert runner.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert runner.weight_bytes == 4 * runner.parameters


def test_a_model_without_caches_is_refused() -> None:
    model = tiny_model("llama")
    runner = TorchRunner(model, call=lambda **options: SimpleNamespace(logits=None))
    runner.prepare(Case(1, 0, 3)).run()
    with pytest.raises(UnsupportedModelError, match="no key-value cache"):
        runner.prepare(Case(1, 3, 1))
