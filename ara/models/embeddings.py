"""Finds the embedding and the head of a model: the two matrices outside of the decoder blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ara.errors import UnsupportedModelError, UsageError
from ara.layouts.grid import Grid
from ara.layouts.modeling_ara import scale_of
from ara.models.weights import WeightRef

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Embeddings:
    """The embedding and the head of a model, both (m, n).

    Attributes:
        embedding: its path in the model.
        head: its path.
        tied: whether they are one matrix.
        m: tokens.
        n: width of the residual stream.
    """

    embedding: str
    head: str
    tied: bool
    m: int
    n: int

    @property
    def matrices(self) -> tuple[str, ...]:
        """Paths under which the matrices are stored: that of the embedding alone if the head is tied to it."""
        return (self.embedding,) if self.tied else (self.embedding, self.head)

    @property
    def parameters(self) -> int:
        """Parameters of the matrices."""
        return len(self.matrices) * self.m * self.n

    def on(self, grid: Grid) -> dict[str, Grid]:
        """Return path of a matrix → its grid.

        Raises:
            UsageError: a block is longer than a row, which would store more numbers than there are.
        """
        if grid.block > self.n:
            raise UsageError(
                f"--block {grid.block} is longer than a row of the embedding, which has {self.n} numbers",
                "use a smaller --block, or leave the embedding as it is: --embedding-bits 16",
            )
        return dict.fromkeys(self.matrices, grid)

    def stored_bytes(self, grid: Grid) -> int:
        """Bytes of the matrices on a grid.

        Raises:
            UsageError: as of :meth:`on`.
        """
        return sum(one.bytes(self.m, self.n) for one in self.on(grid).values())


def find_embeddings(model: PreTrainedModel) -> Embeddings:
    """Return the embedding and the head of a model.

    Raises:
        UnsupportedModelError: one is missing, of an unknown kind, or their shapes differ.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    known = isinstance(embedding, nn.Embedding) and scale_of(embedding) is not None and isinstance(head, nn.Linear)
    if not known or embedding.weight.shape != head.weight.shape:
        kinds = " and ".join(type(one).__name__ for one in (embedding, head))
        raise UnsupportedModelError(
            f"the embedding and the head of {type(model).__name__} cannot be rounded: they are {kinds}, expected an "
            "Embedding and a Linear of the same shape",
            "leave them as they are: --embedding-bits 16",
        )
    paths = {module: name for name, module in model.named_modules()}
    names = paths[embedding], paths[head]
    m, n = WeightRef(names[0]).read(model).shape
    return Embeddings(*names, tied=head.weight is embedding.weight, m=m, n=n)
