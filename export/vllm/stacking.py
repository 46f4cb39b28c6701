"""Matrices of a layer as two products: all first factors as one matrix, the second ones block by block.

With A_i, B_i of the low-rank matrices and the dense weights W_j, the first product is [A_1; W_2; A_3; …] x. A part of
its result is an output already (dense), goes through a second product (factors), or both (pivoted). All outputs are put
in order once, at the end, and only if a matrix is pivoted. The structure depends on the checkpoint alone, so compilers
see straight code. Shapes: ``m`` out features, ``n`` in features, ``k`` rank, ``t`` tokens; r and c are the rows and
columns of a weight (m, n) that a process holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ara.layouts.base import Layout, Piece
from ara.layouts.modeling_ara import RoundedMatrix
from export.vllm.sharing import Share

# A weight, and its product with an input: (t, width) → (t, rows).
Product = Callable[[torch.Tensor], torch.Tensor]


class Part(NamedTuple):
    """The structure of a piece.

    Attributes:
        width: f, rows of the first product.
        second: index of the second product; ``None`` if there is none.
        kept: whether the first product is among the outputs.
    """

    width: int
    second: int | None
    kept: bool


class Stack(NamedTuple):
    """A layer.

    Attributes:
        first: (Σ f, c).
        seconds: one (s, f) for each piece that has one.
        parts: the structure of each piece.
        order: (Σ r) int64, or ``None`` if the outputs are in order: output i is element ``order[i]`` of all products.
    """

    first: torch.Tensor
    seconds: list[torch.Tensor]
    parts: tuple[Part, ...]
    order: torch.Tensor | None


def cut(
    module: nn.Module, layout: Layout | None, share: Share, dtype: torch.dtype, device: torch.device | str
) -> Piece:
    """Return the share of a matrix.

    Args:
        module: the whole matrix, as a checkpoint stores it; its parts may be rounded to few bits.
        layout: of a low-rank matrix; ``None`` for a dense one.
        share: the rows and columns to hold.
        dtype: of the piece; matrices of few bits are computed in float32 and rounded to it once.
        device: where the piece is to be.
    """

    def weight(part: Any) -> torch.Tensor:
        return part.dense(dtype) if isinstance(part, RoundedMatrix) else part.weight.to(dtype)

    def place(tensor: torch.Tensor | None) -> torch.Tensor | None:
        # A view would keep the whole matrix in memory.
        return None if tensor is None else tensor.to(device).clone(memory_format=torch.contiguous_format)

    if layout is None:
        whole = weight(module)
        piece = Piece(torch.cat([whole[span, share.columns] for span in share.rows]), kept=True)
    else:
        tensors = {f"{name}.weight": weight(part) for name, part in module.named_children()}
        tensors |= {name: one.detach().to(dtype) for name, one in module.named_parameters(recurse=False)}
        tensors |= dict(module.named_buffers(recurse=False))
        piece = layout.cut(tensors, share.rows, share.columns)
    first = place(piece.first)
    assert first is not None
    return Piece(first, place(piece.second), piece.kept, place(piece.order))


def stack(pieces: Sequence[Piece]) -> Stack:
    """Return the pieces of a layer as one stack; their outputs follow one another."""
    seconds: list[torch.Tensor] = []
    parts, orders, start = [], [], 0
    for piece in pieces:
        width = len(piece.first)
        index = None
        if piece.second is not None and len(piece.second):
            index = len(seconds)
            seconds.append(piece.second)
        parts.append(Part(width, index, piece.kept))
        computed = (width if piece.kept else 0) + (0 if index is None else len(seconds[index]))
        order = torch.arange(computed, device=piece.first.device) if piece.order is None else piece.order
        orders.append(order + start)
        start += computed
    ordered = any(piece.order is not None for piece in pieces)
    first = pieces[0].first if len(pieces) == 1 else torch.cat([piece.first for piece in pieces])
    return Stack(first, seconds, tuple(parts), torch.cat(orders) if ordered else None)


def multiply(
    x: torch.Tensor, first: Product, seconds: Sequence[Product], parts: Sequence[Part], order: torch.Tensor | None
) -> torch.Tensor:
    """Return the outputs (t, Σ r) of a layer for inputs (t, c), without its bias.

    Args:
        x: the inputs.
        first: the first product.
        seconds: the second products.
        parts: the structure of the stack.
        order: of the stack.
    """
    outputs = []
    for part, h in zip(parts, first(x).split([part.width for part in parts], -1), strict=True):
        if part.kept:
            outputs.append(h)
        if part.second is not None:
            outputs.append(seconds[part.second](h))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    # On CPUs gather is several times as fast as index_select, which copies one number at a time.
    return y if order is None else y.gather(-1, order.expand(*y.shape[:-1], -1))
