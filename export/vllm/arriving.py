"""Tensors of a checkpoint on their way into a layer of vLLM: they are checked, collected and cut to a process's share.

vLLM hands over one tensor after the other, in the order of the files. A matrix is complete when all its tensors have
arrived. It is cut at once, so at most the matrices in progress are in memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ara.errors import ModelError
from ara.layouts import layout_named
from ara.layouts.base import Layout, Piece
from ara.layouts.modeling_ara import CompressedLinear, RoundedLinear
from export.vllm.sharing import Share
from export.vllm.stacking import Stack, cut, stack

_AGAIN = "the checkpoint is damaged or was changed: write it again, or copy it again"
# An empty tensor of this name keeps software without ARA from reading a compressed layer as a dense one.
_GUARD = "weight"


class Matrix:
    """One matrix of a layer.

    Args:
        name: its path in the checkpoint, for errors.
        module: as the checkpoint stores it, on the meta device and without a bias.
        share: what this process holds of it.
        layout: of a low-rank matrix; ``None`` for a dense one.
    """

    def __init__(self, name: str, module: nn.Module, share: Share, layout: Layout | None = None) -> None:
        self.name, self.share, self._layout = name, share, layout
        self._module: nn.Module | None = module
        self._expected = module.state_dict()
        self._arrived: dict[str, torch.Tensor] = {}

    @property
    def keys(self) -> list[str]:
        """Names of its tensors, such as ``A.weight``."""
        return list(self._expected)

    @property
    def missing(self) -> list[str]:
        """Full names of the tensors that have not arrived."""
        return [f"{self.name}.{key}" for key in self._expected if key not in self._arrived]

    def put(self, key: str, tensor: torch.Tensor) -> None:
        """Take a tensor.

        Raises:
            ModelError: it does not belong to this matrix, or has another shape or type than ``config.json`` says.
        """
        expected = self._expected.get(key)
        found = f"{self.name}.{key} of shape {list(tensor.shape)} and type {str(tensor.dtype).removeprefix('torch.')}"
        if expected is None:
            if key == _GUARD and not tensor.numel():
                return
            raise ModelError(f"the checkpoint holds {found}, which its config.json does not mention", _AGAIN)
        same_kind = tensor.is_floating_point() if expected.is_floating_point() else tensor.dtype == expected.dtype
        if tensor.shape != expected.shape or not same_kind:
            raise ModelError(f"the checkpoint holds {found}; its config.json asks for {list(expected.shape)}", _AGAIN)
        self._arrived[key] = tensor

    def finish(self, dtype: torch.dtype, device: torch.device | str) -> Piece:
        """Return the share of the complete matrix, and forget its tensors.

        Raises:
            ModelError: the tensors contradict one another.
        """
        module, self._module = self._module, None
        assert module is not None
        module.load_state_dict(self._arrived, assign=True)
        if isinstance(module, CompressedLinear) and (problem := module.problem()):
            raise ModelError(f"the checkpoint cannot be used: {self.name}.{problem}", _AGAIN)
        piece = cut(module, self._layout, self.share, dtype, device)
        self._arrived = dict.fromkeys(self._expected, torch.empty(0))
        return piece


class Layer:
    """The matrices of a layer of vLLM, while its weights are loaded.

    Args:
        matrices: in the order of the layer's outputs.
        dtype: of the layer's weights.
        device: where they are to be.
    """

    def __init__(self, matrices: Sequence[Matrix], dtype: torch.dtype, device: torch.device | str) -> None:
        self._matrices, self._dtype, self._device = matrices, dtype, device
        self._pieces: list[Piece | None] = [None] * len(matrices)

    @property
    def keys(self) -> list[str]:
        """Names of all tensors that may arrive, without those of biases."""
        return sorted({_GUARD, *(key for matrix in self._matrices for key in matrix.keys)})

    def put(self, shard: Any, key: str, tensor: torch.Tensor) -> None:
        """Take a tensor.

        Args:
            shard: vLLM's name of the part of the layer: q, k, v, an index, or ``None`` for all of it.
            key: name of the tensor within its matrix.
            tensor: the whole one; any device.

        Raises:
            ModelError: as :meth:`Matrix.put` and :meth:`Matrix.finish`.
        """
        index = self._index(shard)
        matrix = self._matrices[index]
        matrix.put(key, tensor)
        if self._pieces[index] is None and not matrix.missing:
            self._pieces[index] = matrix.finish(self._dtype, self._device)

    def finish(self) -> Stack:
        """Return the layer.

        Raises:
            ModelError: a tensor is missing.
        """
        missing = [name for matrix in self._matrices for name in matrix.missing]
        if missing:
            raise ModelError(f"the checkpoint lacks {len(missing)} tensors of a layer, such as {missing[0]}", _AGAIN)
        return stack([piece for piece in self._pieces if piece is not None])

    def _index(self, shard: Any) -> int:
        if len(self._matrices) == 1 and shard is None:
            return 0
        index = {"q": 0, "k": 1, "v": 2}.get(shard, shard)
        if type(index) is not int or not 0 <= index < len(self._matrices):
            names = ", ".join(matrix.name for matrix in self._matrices)
            raise ModelError(f"vLLM loads part {shard!r} of a layer that consists of {names}")
        return index


def empty_matrix(
    name: str, share: Share, layout: str, ranks: Mapping[str, int], rounded: Mapping[str, Sequence[Any]]
) -> Matrix:
    """Return a matrix that waits for its tensors.

    Args:
        name: its path.
        share: what this process holds of it.
        layout: of the low-rank matrices.
        ranks: path → rank k of the low-rank matrices.
        rounded: path of a dense matrix, or of a part of a low-rank one such as ``….A`` → bits, length of blocks,
            whether there are zero points.

    Raises:
        ModelError: the rank is above that of the layer.
    """

    def linear(path: str, m: int, n: int) -> nn.Module:
        if path in rounded:
            bits, block, zero_points = rounded[path]
            return RoundedLinear(n, m, bits, block, zero_points, False, device="meta")
        return nn.Linear(n, m, bias=False, device="meta")

    m, n, rank = share.m, share.n, ranks.get(name)
    if rank is None:
        return Matrix(name, linear(name, m, n), share)
    if rank > min(m, n):
        raise ModelError(f"the checkpoint has rank {rank} for {name}, a layer of {m} × {n}", _AGAIN)
    form = layout_named(layout)
    module = form.module(n, m, rank, False, device="meta")
    for part, old in list(module.named_children()):
        assert isinstance(old, nn.Linear)
        setattr(module, part, linear(f"{name}.{part}", old.out_features, old.in_features))
    return Matrix(name, module, share, form)
