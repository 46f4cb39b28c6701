"""How a graph puts the outputs of a pivoted layer in order: [h; C h] starts with the pivots, which may belong anywhere.

In ONNX Runtime on a CPU, copying single numbers takes longer than the multiplications that pivots save. Two remedies:

- **Blocks**, in float32 graphs. The pivots of a matrix of rank k may be any k rows that span it
  (:mod:`ara.layouts.pivoted`). The pivots are therefore chosen again, as blocks of 16 neighbouring rows. The matrix
  stays the same, with at most 15 more pivots than its rank, and its order copies whole blocks. The coefficients become
  larger, and so do rounding errors of the pivots' outputs, which only float32 tolerates. :func:`choose_blocks` limits
  both by keeping the volume of the pivot rows large.
- **Rows**, in all other graphs. Between two transpositions whole rows are copied (:func:`ordering`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from export.onnx.export_report import Provider
from export.onnx.stored_weights import Checkpoint, LinearLayer

BLOCK = 16
# Tensors of a pivoted layer that change with its pivots.
_PARTS = ("A.weight", "C.weight", "order")


class BlockPivots:
    """A checkpoint whose pivoted layers have their pivots in blocks; everything else is unchanged.

    Args:
        checkpoint: pivoted.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.rounded = checkpoint.rounded
        self._layers: dict[str, LinearLayer] = {}
        self._last: tuple[str, dict[str, torch.Tensor]] | None = None

    def names(self) -> list[str]:
        """List the tensors."""
        return self.checkpoint.names()

    def has(self, name: str) -> bool:
        """Tell whether a tensor exists."""
        return self.checkpoint.has(name)

    def expect(self, name: str, *shape: int) -> str:
        """Return ``name`` if the tensor has this shape; see :meth:`Checkpoint.expect`."""
        return self.checkpoint.expect(name, *shape)

    def linear(self, path: str, m: int, n: int, *, transposed: bool = False) -> LinearLayer:
        """Return how a linear layer is computed; see :meth:`Checkpoint.linear`.

        A layer stays unchanged if a block does not divide its outputs, or if all of them would become pivots.
        """
        layer = self.checkpoint.linear(path, m, n, transposed=transposed)
        if layer.rank is None or m % BLOCK:
            return layer
        pivots = -(-layer.rank // BLOCK) * BLOCK
        if pivots >= m:
            return layer
        self._layers[path] = replace(layer, rank=pivots, block=BLOCK)
        return self._layers[path]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        path, part = _split(name)
        layer = self._layers.get(path)
        if layer is None:
            return self.checkpoint.shape(name)
        assert layer.rank is not None
        shapes = {
            "A.weight": (layer.rank, layer.n),
            "C.weight": (layer.m - layer.rank, layer.rank),
            "order": (layer.m // BLOCK,),
        }
        return shapes.get(part) or self.checkpoint.shape(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor; those of one layer are computed together and kept until another is read."""
        path, part = _split(name)
        if path not in self._layers or part not in _PARTS:
            return self.checkpoint.tensor(name)
        if self._last is None or self._last[0] != path:
            self._last = None  # release one layer before the next one is computed
            a, c, order = (self.checkpoint.tensor(f"{path}.{part}") for part in _PARTS)
            self._last = path, dict(zip(_PARTS, in_blocks(a, c, order), strict=True))
        return self._last[1][part]


def ordering(rank: int | None, provider: Provider) -> list[tuple[str, str, dict[str, Any]]]:
    """Return how a graph puts the outputs of a pivoted layer in order.

    A Gather along the last axis copies single numbers. Between two transpositions it copies whole rows, and on a CPU
    the three nodes together take a seventh of the time.

    Args:
        rank: number of axes of the tensor, whose last axis is ordered; ``None`` if unknown, which leaves the Gather.
        provider: where the graph will run.

    Returns:
        Operator, name and attributes of each node; the Gather takes the order as its second input.
    """
    if provider == "cuda" or rank is None:
        return [("Gather", "ordered", {"axis": -1})]
    axes = list(range(rank))
    return [
        ("Transpose", "columns", {"perm": [*axes[-1:], *axes[:-1]]}),
        ("Gather", "ordered", {"axis": 0}),
        ("Transpose", "whole", {"perm": [*axes[1:], 0]}),
    ]


def in_blocks(
    a: torch.Tensor, c: torch.Tensor, order: torch.Tensor, size: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the pivots of a matrix again, in blocks.

    Args:
        a: (k, n) pivot rows.
        c: (m − k, k) coefficients of the others.
        order: (m); row i of the matrix is row ``order[i]`` of [a; c a].
        size: rows per block; divides m.

    Returns:
        The same for p = ⌈k / size⌉ · size pivots: (p, n) and (m − p, p), float32, and the order (m / size) int64:
        block i of the matrix is block ``order[i]`` of [a; c a].
    """
    k, m = len(a), len(order)
    b = torch.cat([torch.eye(k, dtype=torch.float64), c.double()])[order.long()]
    chosen = choose_blocks(b.float(), size)
    others = [block for block in range(m // size) if block not in set(chosen)]
    blocks = b.view(m // size, size, k)
    pivots, rest = blocks[chosen].flatten(0, 1), blocks[others].flatten(0, 1)
    # rest = C pivots, by least squares where there are more pivots than the rank: pivots = Q R has full column rank.
    q, r = torch.linalg.qr(pivots)
    coefficients = torch.linalg.solve_triangular(r, rest, upper=True, left=False) @ q.T
    place = torch.empty(m // size, dtype=torch.int64)
    place[torch.tensor(chosen + others)] = torch.arange(m // size)
    return (pivots @ a.double()).float(), coefficients.float(), place


def choose_blocks(b: torch.Tensor, size: int) -> list[int]:
    """Return ⌈k / size⌉ blocks of rows of ``b`` (m, k) that together span all rows.

    Each step takes the block with the largest volume outside the span of the earlier ones: a blockwise Gram–Schmidt.
    """
    m, k = b.shape
    left = b.clone()
    blocks = left.view(m // size, size, k)
    chosen: list[int] = []
    for found in range(0, k, size):
        most = min(size, k - found)
        volumes = torch.linalg.eigvalsh(blocks @ blocks.transpose(1, 2))[:, -most:].clamp_min(1e-30).log().sum(-1)
        volumes[chosen] = -torch.inf
        chosen.append(int(volumes.argmax()))
        directions = torch.linalg.svd(blocks[chosen[-1]], full_matrices=False).Vh[:most]
        left -= (left @ directions.T) @ directions
    return chosen


def _split(name: str) -> tuple[str, str]:
    """Split the name of a pivoted layer's tensor into module and part: ``….up_proj``, ``A.weight``."""
    part = next((part for part in _PARTS if name.endswith(f".{part}")), "")
    return name.removesuffix(f".{part}"), part
