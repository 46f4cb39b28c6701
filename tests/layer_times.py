"""A runner of layers whose times are made up, so that ranks chosen by time are the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ara.evaluation.layer_times import LayerRuntime
from ara.evaluation.speed import Prepared
from ara.models.weights import LinearSpec

Seconds = Callable[[LinearSpec, int | None], float]


@dataclass
class Clock:
    """A clock that passes move."""

    now: float = 0.0


class FakeRuntime(LayerRuntime):
    """A runtime whose clock is made up."""

    def __init__(self, library: str, time: Clock) -> None:
        super().__init__("fake", "cpu", "float32", 1, library)
        object.__setattr__(self, "_time", time)  # frozen, and no field: it does not describe the runtime

    @property
    def clock(self) -> Callable[[], float]:
        """Return the made-up time."""
        return lambda: self._time.now  # type: ignore[attr-defined,no-any-return]


class FakeLayers:
    """Layers that take the seconds of a function; see :class:`ara.evaluation.layer_times.LayerRunner`.

    Attributes:
        asked: shape, rank and tokens of every layer that was prepared.
    """

    def __init__(self, seconds: Seconds, library: str = "fake 1.0") -> None:
        self.seconds, self.time = seconds, Clock()
        self.runtime = FakeRuntime(library, self.time)
        self.asked: list[tuple[int, int, int | None, int]] = []

    def prepare(self, spec: LinearSpec, rank: int | None, tokens: int) -> Prepared:
        """Return a pass that moves the clock."""
        self.asked.append((spec.m, spec.n, rank, tokens))

        def run() -> None:
            self.time.now += self.seconds(spec, rank)

        return Prepared(run)


def by_parameters(spec: LinearSpec, rank: int | None) -> float:
    """Return a microsecond per thousand parameters, and half of one per product."""
    return 1e-9 * (spec.dense_cost if rank is None else spec.cost(rank)) + 5e-7 * (1 if rank is None else 2)
