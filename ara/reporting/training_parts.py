"""Parts of the report about ``ara train-masks``: the training that the ranks come from."""

from __future__ import annotations

from ara.reporting.part import Part


class Step(Part):
    """One step of a training; ``loss`` is the objective, ``held_out`` the loss on held-out text, where measured."""

    step: int
    loss: float | None
    keep: float
    held_out: float | None


class Curve(Part):
    """The training at one budget; ``won`` is how far the held-out loss has fallen since the start."""

    keep: float
    steps: int
    best_step: int
    start_held_out: float
    held_out: float
    won: float
    seconds: float
    backward_passes: int
    log: tuple[Step, ...]


class Trained(Part):
    """The training that the ranks come from."""

    name: str
    objective: str
    loss: str
    curves: tuple[Curve, ...]
