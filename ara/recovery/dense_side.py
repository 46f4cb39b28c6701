"""What the dense model computes in one block, for all groups of layers that are corrected in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ara.models.blocks import Stream, hidden_states
from ara.models.memory import available_bytes

# Part of the free memory that may be filled: one over this.
_SHARE = 4


@dataclass(frozen=True)
class Leader:
    """A layer whose input is observed.

    Attributes:
        module: the linear layer in the dense model.
        writes: whether its output is added to the block's output as it is.
    """

    module: nn.Module
    writes: bool


@dataclass(frozen=True)
class Observed:
    """One batch at a layer.

    Attributes:
        input: of the layer (b, t, n).
        beside: the block's output less the layer's, (b, t, d); ``None`` if the layer does not write to it.
    """

    input: torch.Tensor
    beside: torch.Tensor | None

    def kept(self) -> Observed:
        """Return it on the CPU."""
        return Observed(self.input.cpu(), None if self.beside is None else self.beside.cpu())

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.input.nbytes + (0 if self.beside is None else self.beside.nbytes)


class DenseSide:
    """The dense model's passes through its present block.

    Corrections do not change the dense model, so one pass per batch gives the inputs of all groups of a block. They are
    kept only if they fit into memory.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._kept: list[dict[nn.Module, Observed]] = []
        self._outputs: list[Any] = []

    def open_block(self, leaders: Sequence[Leader]) -> None:
        """Run the block on all batches and keep what ``leaders`` get, unless that takes too much memory."""
        self._kept, self._outputs = [], []
        if not leaders:
            return
        count, room = len(self.stream.batches), available_bytes("cpu") // _SHARE
        for index in range(count):
            seen, output = self._observe(index, leaders)
            self._kept.append({leader.module: one.kept() for leader, one in zip(leaders, seen, strict=True)})
            self._outputs.append(self.stream.kept(output))
            if index == 0 and count * sum(one.nbytes for one in seen) > room:
                self._kept, self._outputs = [], []
                return

    def at(self, index: int, leader: Leader) -> Observed:
        """Return what a layer of the open block gets in batch ``index``."""
        if not self._kept:
            return self._observe(index, [leader])[0][0] if leader.writes else self._input(index, leader)
        device, found = next(leader.module.parameters()).device, self._kept[index][leader.module]
        return Observed(found.input.to(device), None if found.beside is None else found.beside.to(device))

    def advance(self) -> None:
        """Go to the next block."""
        self.stream.advance(self._outputs or self.stream.outputs())
        self._kept, self._outputs = [], []

    def _input(self, index: int, leader: Leader) -> Observed:
        return Observed(self.stream.input_of(index, leader.module), None)

    @torch.no_grad()
    def _observe(self, index: int, leaders: Sequence[Leader]) -> tuple[list[Observed], Any]:
        """Run the block on one batch; return what the layers get, and the block's output."""
        seen, output = self.stream.observe(index, [leader.module for leader in leaders])
        hidden = hidden_states(output)
        found = [
            Observed(x, hidden - made if leader.writes else None)
            for leader, (x, made) in zip(leaders, seen, strict=True)
        ]
        return found, output
