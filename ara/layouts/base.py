"""The interface of a layout: the cost of a rank, and how a layer is built, stored and multiplied."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple, TypeVar

import torch

from ara.layouts.modeling_ara import CompressedLinear

# Indices are int32.
_INDEX_BYTES = 4
Number = TypeVar("Number", int, float, torch.Tensor)


class Piece(NamedTuple):
    """What one of several processes holds of a weight (m, n): at most two products and an order.

    With inputs x of c columns, h is ``first`` x, and the r outputs are elements of [h; ``second`` h].

    Attributes:
        first: (f, c).
        second: (s, f), or ``None``.
        kept: whether h is among the outputs; else they are those of ``second`` alone.
        order: (r) int64: output i is element ``order[i]``; ``None``: the outputs are in order.
    """

    first: torch.Tensor
    second: torch.Tensor | None = None
    kept: bool = False
    order: torch.Tensor | None = None


class Layout(ABC):
    """One way to store a linear layer of rank k, with the weight W = B A of factors A (k, n) and B (m, k).

    A layer is stored as named tensors, such as ``A.weight``. In a checkpoint the path of the module precedes the name.

    Class attributes:
        module: class with these tensors whose forward pass multiplies by W. Checkpoints carry its code, so it is in
            the table ``LAYERS`` of :mod:`ara.layouts.modeling_ara`.
        bias: name of the bias (m), if the layer has one.
        indices: names of stored integer indices; they do not count as parameters.
        progress: label of the progress bar while layers are built; ``None`` if building is fast.
        free_basis: whether any factors with the same product may be stored.
        as_given: whether the stored tensors are the factors themselves.
    """

    module: ClassVar[type[CompressedLinear]]
    bias: ClassVar[str] = "bias"
    indices: ClassVar[tuple[str, ...]] = ()
    progress: ClassVar[str | None] = None
    free_basis: ClassVar[bool] = False
    as_given: ClassVar[bool] = False

    @abstractmethod
    def cost(self, m: int, n: int, k: Number) -> Number:
        """Return the parameters of rank k without the bias; at rank 0 none, and each further rank costs more.

        Args:
            m: out features.
            n: in features.
            k: a rank, a fraction between ranks, or a tensor of ranks.
        """

    @abstractmethod
    def store(self, m: int, n: int, k: int) -> dict[str, tuple[int, ...]]:
        """Return name → shape of the stored tensors of a layer of rank k, without the bias."""

    def stored_bytes(self, m: int, n: int, k: int, matrix: Callable[[int, int], int]) -> int:
        """Return the bytes of a layer of rank k without the bias.

        Args:
            m: out features.
            n: in features.
            k: rank.
            matrix: rows and columns of a matrix → its bytes.
        """
        shapes = self.store(m, n, k)
        numbers = sum(math.prod(shapes[name]) for name in self.indices)
        return sum(matrix(*shape) for shape in shapes.values() if len(shape) == 2) + _INDEX_BYTES * numbers

    @abstractmethod
    def split(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the stored tensors of the layer with the weight ``b`` (m, k) times ``a`` (k, n), without the bias."""

    @abstractmethod
    def join(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return factors A (k, n) and B (m, k) of a layer with these stored tensors; the inverse of :meth:`split`.

        They are views of the stored tensors, or new ones in the same dtype.
        """

    def cut(self, tensors: Mapping[str, torch.Tensor], rows: Sequence[slice], columns: slice) -> Piece:
        """Return what a process holds of a layer that is split over processes: A, and its rows of B.

        Processes with other inputs have the other columns of A, and their outputs are added up. A layout with a smaller
        form returns that. Tensors of the piece may be views.

        Args:
            tensors: those that :meth:`store` names.
            rows: the outputs of the process, in their order.
            columns: its inputs.
        """
        a, b = self.join(tensors)
        return Piece(a[:, columns], torch.cat([b[span] for span in rows]))

    def top_rank(self, m: int, n: int) -> int:
        """Return the largest rank that costs less than the dense weight, mn; 0 if there is none."""
        return bisect_left(range(1, min(m, n) + 1), m * n, key=lambda k: self.cost(m, n, k))

    def build(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        bias: torch.Tensor | None = None,
        transposed: bool = False,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> CompressedLinear:
        """Return the module with the weight ``b`` (m, k) times ``a`` (k, n).

        Args:
            a: any floating dtype.
            b: any floating dtype.
            bias: (m), used as it is, not copied.
            transposed: whether the module replaces a ``Conv1D``.
            device: where the module is to be, and the work is done.
            dtype: of the module; tensors are rounded to it once.
        """
        # Apple's GPUs have no float64.
        worker = "cpu" if torch.device(device).type == "mps" else device
        tensors = self.split(a.to(worker), b.to(worker))
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(tensor.dtype if name in self.indices else dtype).to(device).contiguous()
        if bias is not None:
            tensors[self.bias] = bias
        return self.hold(tensors, len(b), transposed)

    def hold(self, tensors: Mapping[str, torch.Tensor], m: int, transposed: bool = False) -> CompressedLinear:
        """Return the module with these stored tensors, which are not copied.

        Args:
            tensors: those that :meth:`store` names, and the bias if there is one.
            m: out features.
            transposed: whether the module replaces a ``Conv1D``.
        """
        k, n = tensors["A.weight"].shape
        layer = self.module(n, m, k, self.bias in tensors, transposed, device="meta")
        layer.load_state_dict(dict(tensors), assign=True)
        return layer.requires_grad_(False)

    def multiply(self, tensors: Mapping[str, torch.Tensor], m: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense weight (m, n) of a layer with these stored tensors, computed in ``dtype``."""
        return self.hold(tensors, m).product(dtype)
