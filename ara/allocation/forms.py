"""The ways to make a model smaller that are compared at equal bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Form:
    """One way to make a model smaller.

    Attributes:
        title: in tables.
        bits: bits per weight to choose from; 16 means that the weights are not rounded, whatever their dtype is.
        sized: whether it is made for a given size. Otherwise all layers are dense in the only width.
        ranks: whether layers may be factorised.
        method: of rounding.
    """

    title: str
    bits: tuple[Literal[4, 8, 16], ...]
    sized: bool = False
    ranks: bool = False
    method: Literal["calibrated", "nearest"] = "calibrated"

    @property
    def rounds(self) -> bool:
        """Whether weights may have few bits; then the embedding and the head may have them as well."""
        return self.bits != (16,)


JOINT = "joint"
# By the name that keys and files have.
FORMS = {
    "dense": Form("dense", (16,)),
    "int8": Form("dense int8", (8,)),
    "int4-nearest": Form("dense int4, nearest", (4,), method="nearest"),
    "int4": Form("dense int4, calibrated", (4,)),
    "mixed": Form("dense, 8 and 4 bits", (8, 4), sized=True),
    "ranks": Form("ranks, not rounded", (16,), sized=True, ranks=True),
    "ranks-int8": Form("ranks in int8", (8,), sized=True, ranks=True),
    JOINT: Form("ranks and bits", (16, 8, 4), sized=True, ranks=True),
}
