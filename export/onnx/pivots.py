"""How a graph puts the outputs of a pivoted layer in order: [h; C h] has the pivots first, wherever they belong.

Copying numbers one by one takes ONNX Runtime on a CPU longer than the multiplications that are saved. Two remedies:

- **Blocks.** Which k rows of a matrix of rank k are its pivots is free (:mod:`ara.layouts.pivoting`). Where a
  checkpoint has taken single rows, pivots are chosen anew, in blocks of 16 neighbouring rows: the same matrix, with
  at most 15 more pivots than its rank, in the order of which whole blocks are copied. Coefficients grow by that
  (:func:`choose_blocks` keeps the volume of the pivot rows large, so not by much), and with them what rounding the
  pivots' outputs costs: for float32 graphs only.
- **Rows.** Between two transpositions whole rows are copied (:func:`ordering`): for all others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from export.onnx.export_report import Provider
from export.onnx.stored_weights import Checkpoint, LinearLayer

BLOCK = 16


class BlockPivots:
    """A checkpoint whose pivoted layers have their pivots in blocks; the rest is as it is.

    Args:
        checkpoint: pivoted.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._layers: dict[str, LinearLayer] = {}
        self._last: tuple[str, dict[str, torch.Tensor]] | None = None

    def names(self) -> list[str]:
        """List the tensors."""
        return self.checkpoint.names()

    def has(self, name: str) -> bool:
        """Tell whether a tensor is there."""
        return self.checkpoint.has(name)

    def expect(self, name: str, *shape: int) -> str:
        """Return ``name`` if the tensor has this shape; see :meth:`Checkpoint.expect`."""
        return self.checkpoint.expect(name, *shape)

    def linear(self, path: str, m: int, n: int) -> LinearLayer:
        """Return how a linear layer is to be computed: see :meth:`Checkpoint.linear`.

        A layer whose outputs are no whole number of blocks, or all of which would become pivots, stays as it is.
        """
        layer = self.checkpoint.linear(path, m, n)
        if not layer.pivoted or layer.rank is None or m % BLOCK:
            return layer
        pivots = -(-layer.rank // BLOCK) * BLOCK
        if pivots >= m:
            return layer
        self._layers[path] = replace(layer, rank=pivots, block=BLOCK)
        return self._layers[path]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        path, _, part = _split(name)
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
        """Return one tensor; those of the layer that was asked for last are kept until another one is asked for."""
        path, _, part = _split(name)
        if path not in self._layers or part not in ("A.weight", "C.weight", "order"):
            return self.checkpoint.tensor(name)
        if self._last is None or self._last[0] != path:
            self._last = None  # let go of one layer before the next one is made
            a, c, order = (self.checkpoint.tensor(f"{path}.{part}") for part in ("A.weight", "C.weight", "order"))
            self._last = path, dict(zip(("A.weight", "C.weight", "order"), in_blocks(a, c, order), strict=True))
        return self._last[1][part]


def ordering(rank: int | None, provider: Provider) -> list[tuple[str, str, dict[str, Any]]]:
    """Return how a graph puts the outputs of a pivoted layer in order.

    A Gather along the last axis copies single numbers, which on a CPU takes ONNX Runtime longer than all that pivots
    save; between two transpositions it copies whole rows, and the three together take a seventh of the time.

    Args:
        rank: of the tensor, whose last axis is ordered; where it is not known, a Gather has to do.
        provider: that is to run it.

    Returns:
        Operator, name and attributes of each node; a Gather reads the order as its second input.
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
    """Choose the pivots of a matrix anew, in blocks.

    Args:
        a: (k, n) pivot rows.
        c: (m − k, k) coefficients of the others.
        order: (m); row i of the matrix is row ``order[i]`` of [a; c a].
        size: rows of a block; divides m.

    Returns:
        The same of p = ⌈k / size⌉ · size pivots: (p, n) and (m − p, p), float32, and (m / size) int64: block i of the
        matrix is block ``order[i]`` of [a; c a].
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
    """Return ⌈k / size⌉ blocks of rows of ``b`` (m, k) that together span all of them, one after the other.

    Each time the block with the largest volume outside of the span of those before: a blockwise Gram–Schmidt.
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


def _split(name: str) -> tuple[str, str, str]:
    """Split the name of a tensor into module, dot, and part: ``….up_proj``, ``.``, ``A.weight``."""
    for part in ("A.weight", "C.weight", "order"):
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), ".", part
    return name, "", ""
