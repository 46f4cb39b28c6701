"""Times several passes in turn, so that a change of the machine's speed affects all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from ara.evaluation.timing import synchronize
from ara_cli.console import Console


def seconds_in_turn(
    console: Console,
    passes: Mapping[str, Callable[[], None]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of every pass in each of ``rounds`` rounds; a first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    with console.bar("Timing", (rounds + 1) * len(passes)) as bar:
        for number in range(rounds + 1):
            for name, step in passes.items():
                begun = clock()
                step()
                synchronize(device)
                if number:
                    seconds[name].append(clock() - begun)
                bar.advance()
    return seconds
