"""The trainable form of a compressed model: every low-rank layer as two balanced factors.

Layers with rounded parts keep them (:mod:`ara.recovery.rounded`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import nn

from ara.layout_names import LayoutName
from ara.layouts import layout_named
from ara.layouts.modeling_ara import CompressedLinear, RoundedMatrix, replace_linear
from ara.models.kept import Keep
from ara.progress import SILENT, Reporter

# The layout of the trainable form.
TRAINED: LayoutName = "factors"


def balanced(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors of the same product B A with equal Gram matrices, A Aᵀ = Bᵀ B.

    Adam moves all numbers by similar amounts, whatever their size. So the factors should have the same scale, and no
    component of one should be large because that of the other is small.

    Args:
        a: (k, n), any floating dtype.
        b: (m, k).

    Returns:
        A (k, n) and B (m, k) float64, with orthogonal rows and columns, largest component first.
    """
    (qb, rb), (qa, ra) = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    root = s.sqrt()
    return (qa @ (vt.T * root)).T, (qb @ u) * root


def to_trainable(model: nn.Module, layout: LayoutName, keep: Keep | None = None) -> None:
    """Replace the low-rank layers of ``model``, stored in ``layout``, by two balanced factors each, in place.

    Device and dtype stay. Biases are not copied.

    Args:
        model: with or without low-rank layers.
        layout: of these.
        keep: if given, every parameter becomes the copy that it makes, one layer at a time.
    """
    names = _low_rank(model)
    if keep is not None:
        inside = {id(parameter) for name in names for parameter in model.get_submodule(name).parameters()}
        _replace_data((parameter for parameter in model.parameters() if id(parameter) not in inside), keep)
    for name in names:
        layer = _layer(model, name)
        a, b = balanced(*layout_named(layout).join(dict(layer.state_dict())))
        weight, bias = layer.A.weight, None if layer.bias is None else layer.bias.detach()
        built = layout_named(TRAINED).build(a, b, bias, layer.transposed, device=weight.device, dtype=weight.dtype)
        if keep is not None:
            _replace_data(built.parameters(), keep)
        replace_linear(model, name, built)


def from_trainable(
    model: nn.Module,
    layout: LayoutName,
    dtype: torch.dtype,
    report: Reporter = SILENT,
    keep: Keep | None = None,
) -> None:
    """Store the low-rank layers of ``model``, two factors each, in ``layout`` and ``dtype``, in place.

    Args:
        model: in trainable form.
        layout: of the result.
        dtype: of the low-rank layers.
        report: progress, for a layout whose layers take time to build.
        keep: if given, the parameters of every new layer become the copies that it makes.
    """
    form, names = layout_named(layout), _low_rank(model)
    with report.bar(form.progress, len(names)) if form.progress else nullcontext() as bar:
        for name in names:
            layer = _layer(model, name)
            a, b = factors_of(layer)
            bias = None if layer.bias is None else layer.bias.detach().to(dtype)
            built = form.build(a, b, bias, layer.transposed, device=a.device, dtype=dtype)
            if keep is not None:
                _replace_data(built.parameters(), keep)
            replace_linear(model, name, built)
            if bar is not None:
                bar.advance()


def factors_of(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (k, n) and B (m, k) of a low-rank layer in trainable form; views, without gradient."""
    return layout_named(TRAINED).join(dict(layer.state_dict()))


def set_factors(model: nn.Module, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Overwrite the factors of a low-rank layer by balanced ones with the product of ``b`` (m, k) and ``a`` (k, n).

    Args:
        model: in trainable form.
        name: path of the layer.
        a: (k, n), any floating dtype.
        b: (m, k).
    """
    stored = factors_of(model.get_submodule(name))
    with torch.no_grad():
        for old, new in zip(stored, balanced(a, b), strict=True):
            old.copy_(new)


def block_tensors(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """Return parameters and buffers below the path ``prefix`` by their path in the model, as in a state dict."""
    return {
        f"{prefix}.{name}": tensor.detach().cpu() for name, tensor in model.get_submodule(prefix).state_dict().items()
    }


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Overwrite parameters and buffers of ``model`` by path.

    Raises:
        ValueError: the model has no such tensor, or one of another shape.
    """
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            found = "nothing" if name not in own else f"the shape {tuple(own[name].shape)}"
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, the model has {found} there")
        own[name].copy_(tensor)


def _replace_data(parameters: Iterable[nn.Parameter], keep: Keep) -> None:
    for parameter in parameters:
        parameter.data = keep(parameter.data)


def _low_rank(model: nn.Module) -> list[str]:
    """Return the paths of the low-rank layers, without those whose parts are rounded."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear) and not isinstance(module.A, RoundedMatrix)
    ]


def _layer(model: nn.Module, name: str) -> CompressedLinear:
    found = model.get_submodule(name)
    assert isinstance(found, CompressedLinear)
    return found
