"""Builds the low-rank layers of a model from factors, and lists them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from ara.errors import NumericalError
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.layouts import layout_named
from ara.layouts.base import Layout
from ara.layouts.modeling_ara import CompressedLinear
from ara.models.weights import WeightRef, bias_of
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_factors(
    model: PreTrainedModel,
    ranks: Mapping[str, int],
    files: Mapping[str, Path],
    layout: LayoutName = DEFAULT_LAYOUT,
    report: Reporter = SILENT,
) -> None:
    """Replace linear layers of ``model`` by low-rank ones, in place.

    Args:
        model: dense; its biases are kept.
        ranks: module path → kept rank k.
        files: module path → safetensors file with its factors ``<path>.A`` and ``<path>.B``; only the first k
            components are read.
        layout: how the new layers are stored.
        report: progress, for a layout whose layers take time to build.

    Raises:
        NumericalError: factors become infinite in the dtype of the model.
    """
    form = layout_named(layout)
    with report.bar(form.progress, len(ranks)) if form.progress else nullcontext() as bar:
        for path in dict.fromkeys(files[name] for name in ranks):
            with safe_open(path, "pt") as file:
                for name in (name for name in ranks if files[name] == path):
                    ref = WeightRef(name)
                    module = ref.owner(model)
                    layer = build_layer(
                        file,
                        name,
                        ranks[name],
                        form,
                        bias_of(module),
                        isinstance(module, Conv1D),
                        device=model.device,
                        dtype=model.dtype,
                    )
                    ref.replace(model, layer)
                    if bar is not None:
                        bar.advance()


def build_layer(
    file: safe_open,
    name: str,
    rank: int,
    form: Layout,
    bias: torch.Tensor | None,
    transposed: bool,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype,
) -> CompressedLinear:
    """Return one low-rank layer.

    Args:
        file: opened, with the factors; only the first components are read.
        name: module path, with which the names of the factors begin.
        rank: k.
        form: how the layer is stored.
        bias: (m), used as it is.
        transposed: whether the layer replaces a ``Conv1D``.
        device: of the layer.
        dtype: of the layer.

    Raises:
        ValueError: the factors have fewer components.
        NumericalError: factors become infinite in ``dtype``.
    """
    a, b = file.get_slice(f"{name}.A")[:rank], file.get_slice(f"{name}.B")[:, :rank]
    if len(a) < rank:
        raise ValueError(f"rank {rank} of {name} is above {len(a)}, the largest one that is stored")
    layer = form.build(a, b, bias, transposed, device=device, dtype=dtype)
    if not all(bool(parameter.isfinite().all()) for parameter in layer.parameters()):
        raise NumericalError(
            f"the factors of {name} exceed the range of {str(dtype).removeprefix('torch.')}",
            "use --dtype bfloat16 or --dtype float32",
        )
    return layer


def low_rank_layers(model: nn.Module) -> dict[str, int]:
    """Return module path → rank of the low-rank layers of a model."""
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
