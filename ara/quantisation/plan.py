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
        layers: path of a factorised layer → bits; layers without an entry stay.
        embedding_bits: of the embedding and the head; ``None``: they stay.
        block, zero_points: of all grids.
    """

    layers: Mapping[str, Bits]
    embedding_bits: Bits | None
    block: int
    zero_points: bool

    def __str__(self) -> str:
        widths = " and ".join(map(str, sorted(set(self.layers.values()))))
        layers = [f"layers to {widths} bits"] if widths else []
        ends = [f"embedding and head to {self.embedding_bits} bits"] if self.embedding_bits else []
        return ", ".join(layers + ends)

    def grids(self, model: PreTrainedModel) -> dict[str, Grid]:
        """Return path of a layer, of the embedding or of the head → grid.

        Raises:
            UnsupportedModelError: embedding and head of the model cannot be rounded.
            UsageError: a block is longer than a row of the embedding.
        """
        found = {name: Grid(bits, self.block, self.zero_points) for name, bits in self.layers.items()}
        if self.embedding_bits is not None:
            found |= find_embeddings(model).on(Grid(self.embedding_bits, self.block, self.zero_points))
        return found
