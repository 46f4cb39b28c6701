"""What of a model is rounded, and to how many bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ara.layouts.grid import Bits, Grid
from ara.models.embeddings import find_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RoundingPlan:
    """What is rounded to how many bits.

    Attributes:
        layers: path of a factorised layer → grid; layers without an entry stay.
        ends: grid of the embedding and the head; ``None``: they stay.
    """

    layers: Mapping[str, Grid]
    ends: Grid | None

    @property
    def embedding_bits(self) -> Bits | None:
        """Bits of the embedding and the head; ``None``: they stay."""
        return None if self.ends is None else self.ends.bits

    @property
    def blocks(self) -> tuple[int, ...]:
        """All lengths of blocks in use."""
        ends = [] if self.ends is None else [self.ends]
        return tuple(sorted({grid.block for grid in (*self.layers.values(), *ends)}))

    def __str__(self) -> str:
        widths = " and ".join(map(str, sorted({grid.bits for grid in self.layers.values()})))
        layers = [f"layers to {widths} bits"] if widths else []
        ends = [f"embedding and head to {self.embedding_bits} bits"] if self.embedding_bits else []
        return ", ".join(layers + ends)

    def grids(self, model: PreTrainedModel) -> dict[str, Grid]:
        """Return path of a layer, of the embedding or of the head → grid.

        Raises:
            UnsupportedModelError: embedding and head of the model cannot be rounded.
            UsageError: a block is longer than a row of the embedding.
        """
        found = dict(self.layers)
        if self.ends is not None:
            found |= find_embeddings(model).on(self.ends)
        return found
