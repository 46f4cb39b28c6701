"""The trainable form of a rounded model: whole numbers stay, the scales of their blocks are parameters.

A rounded weight is w = (q − z) s. The steps q and the zero points z are constants. A block with its scale s in common
has the gradient

    ∂L/∂s = Σ (q − z) ∂L/∂w,   over the weights of the block

Adam moves all numbers by similar amounts, whatever their size. A change of s moves a weight q − z times as far, which
is about 4 in 4 bits and 50 in 8 bits. So the learning rate of scales is divided by the root mean square of q − z in
their matrix: then weights move as far as if they were trained themselves.

Scales are float32 here, for their gradients, but each step rounds them to float16, as they are stored. The same holds
for all other parameters and the precision of the checkpoint. So what is measured is what will be written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ara.layout_names import LayoutName
from ara.layouts.modeling_ara import RoundedLinear, RoundedMatrix, replace_linear
from ara.models.weights import find_blocks
from ara.recovery.optimiser import Stored
from ara.recovery.trainable import TRAINED, to_trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows of a matrix whose steps are unpacked at once; it limits memory.
_ROWS = 4096


class ScaledLinear(RoundedLinear):
    """A linear layer of few bits whose scales are a parameter, (m, blocks) float32."""

    def __init__(self, layer: RoundedLinear) -> None:
        """Take the numbers of ``layer``, without copying steps and zero points."""
        super().__init__(**_shape(layer), device="meta")
        del self.scales
        self.steps, self.zeros, self.bias = layer.steps, layer.zeros, layer.bias
        self.scales = nn.Parameter(layer.scales.float(), requires_grad=False)

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (m, n) in ``dtype``, as a function of the scales."""
        weight: torch.Tensor = _Weight.apply(self.scales, self, dtype)
        return weight

    def scale_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the scales (m, blocks) float32 from that of the weight (m, n)."""
        found = torch.empty_like(self.scales)
        missing = self.scales.shape[1] * self.block - self.n
        for rows, offsets in self._offsets():
            parts = nn.functional.pad(offsets.mul_(gradient[rows]), (0, missing))
            found[rows] = parts.unflatten(-1, (-1, self.block)).sum(-1)
        return found

    def pace(self) -> float:
        """Return 1 / root mean square of q − z; 1 if all weights are zero."""
        squares = sum(float(offsets.square_().sum()) for _, offsets in self._offsets())
        return (self.m * self.n / squares) ** 0.5 if squares else 1.0

    def stored(self) -> RoundedLinear:
        """Return the layer that a checkpoint holds; its scales are float16."""
        layer = RoundedLinear(**_shape(self), device="meta")
        layer.steps, layer.zeros, layer.bias = self.steps, self.zeros, self.bias
        layer.scales = self.scales.detach().half()
        return layer

    def _offsets(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield q − z (rows, n) float32, some rows at a time."""
        ones = torch.ones_like(self.scales[:_ROWS])
        for at in range(0, self.m, _ROWS):
            rows = slice(at, at + _ROWS)
            steps, zeros = self.steps[rows], None if self.zeros is None else self.zeros[rows]
            yield rows, self._computed(steps, ones[: len(steps)], zeros)


class _Weight(torch.autograd.Function):
    """The weight as a function of the scales; plain operations would keep q − z as float32 for the backward pass."""

    @staticmethod
    def forward(ctx: Any, scales: torch.Tensor, layer: ScaledLinear, dtype: torch.dtype) -> torch.Tensor:
        ctx.layer = layer
        return layer.dense(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.layer.scale_gradient(gradients[0]), None, None


def to_scaled(model: PreTrainedModel, rounded: Mapping[str, RoundedMatrix], layout: LayoutName) -> None:
    """Let the rounded matrices of the decoder blocks compute from their numbers, with trainable scales, in place.

    Embedding and head stay ordinary matrices: they are not trained. Low-rank layers keep their parts. Only layers of
    two factors that are not rounded are balanced (:func:`ara.recovery.trainable.balanced`).

    Args:
        model: with ordinary matrices in place of the rounded ones.
        rounded: path → module of few bits.
        layout: of the low-rank layers.
    """
    inside = f"{find_blocks(model)[0]}."
    for path, module in rounded.items():
        if isinstance(module, RoundedLinear) and path.startswith(inside):
            replace_linear(model, path, ScaledLinear(module.to(model.device)))
    if layout == TRAINED:
        to_trainable(model, layout)


def from_scaled(model: nn.Module, rounded: Mapping[str, RoundedMatrix]) -> dict[str, RoundedMatrix]:
    """Undo :func:`to_scaled`, in place, and return path → module with the present scales, for a checkpoint."""
    found = dict(rounded)
    for path in rounded:
        if isinstance(layer := model.get_submodule(path), ScaledLinear):
            found[path] = layer.stored()
            replace_linear(model, path, found[path])
    return found


def stored_parameters(model: nn.Module, dtype: torch.dtype, rounded: Mapping[str, RoundedMatrix]) -> dict[str, Stored]:
    """Return how every parameter will be stored: scales in float16, others in ``dtype``; round them so, in place.

    Rounded matrices in ordinary form, such as the embedding, are no parameters of the checkpoint and stay as they are.
    """
    ordinary = {f"{path}.weight" for path in rounded}
    found = {
        name: Stored(dtype)
        for name, value in model.named_parameters()
        if value.is_floating_point() and name not in ordinary
    }
    for name, module in model.named_modules():
        if isinstance(module, ScaledLinear):
            found[f"{name}.scales"] = Stored(torch.float16, module.pace(), linear=False)
    with torch.no_grad():
        for name, stored in found.items():
            parameter = model.get_parameter(name)
            parameter.copy_(parameter.to(stored.dtype))
    return found


def _shape(layer: RoundedLinear) -> dict[str, Any]:
    """Return the arguments of a layer of the same shape."""
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bits": layer.bits,
        "block": layer.block,
        "zero_points": layer.zeros is not None,
        "bias": layer.bias is not None,
        "transposed": layer.transposed,
    }
