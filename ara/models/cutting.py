"""Writes the checkpoint of a model whose weights and factors stay in their files until they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from ara.layout_names import LayoutName
from ara.layouts import layout_named
from ara.layouts.base import Layout
from ara.layouts.modeling_ara import CompressedLinear, densify, expert_layers, fuse_experts
from ara.models.accounting import parameter_count, weight_bytes
from ara.models.checkpoint import declare_compressed, finish_files, save_checkpoint
from ara.models.low_rank import apply_factors, build_layer
from ara.models.shards import write_model
from ara.models.silence import silence_transformers
from ara.models.stored_model import StoredModel, join_experts
from ara.models.weights import WeightRef
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ara.models.processor import Saveable


class Saved(NamedTuple):
    """A model that was written to a checkpoint folder.

    Attributes:
        parameters: number of parameters.
        weight_bytes: of its weights in memory.
    """

    parameters: int
    weight_bytes: int


def save_cut(
    stored: StoredModel,
    processor: Saveable,
    folder: Path,
    *,
    ranks: Mapping[str, int],
    files: Mapping[str, Path],
    provenance: dict[str, Any],
    layout: LayoutName,
    dense: bool = False,
    max_shard_size: str = "5GB",
    report: Reporter = SILENT,
) -> Saved:
    """Write the checkpoint of a dense model at some ranks, with one file and one layer in memory.

    The files are those of :func:`ara.models.low_rank.apply_factors` and
    :func:`ara.models.checkpoint.save_checkpoint` on the loaded model. These write them where transformers computes
    other weights while it loads them; that is reported.

    Args:
        stored: the dense model; its modules are replaced.
        processor: the tokenizer, or more; saved in the same folder.
        folder: created if missing.
        ranks: module path → kept rank of the low-rank layers.
        files: module path → file with its factors.
        provenance: stored in ``config.json``.
        layout: of the low-rank layers.
        dense: write an ordinary dense checkpoint.
        max_shard_size: largest file, such as ``5GB``.
        report: progress, for a layout whose layers take time to build.

    Raises:
        NumericalError: weights or factors are beyond the range of the model's dtype.
        ModelError: a file of the model is damaged.
    """
    # Products of the stored factors themselves give the most exact dense weights.
    built: LayoutName = "factors" if dense else layout
    separate = not dense and not ranks.keys().isdisjoint(expert_layers(stored.model))
    if (why := stored.converted(separate)) is not None:
        report.fact(f"{why}: the whole model is loaded")
        model = stored.load()
        apply_factors(model, ranks, files, built, report)
        saved = _size(model)
        how: dict[str, Any] = {"ranks": ranks, "provenance": provenance, "layout": layout, "dense": dense}
        save_checkpoint(model, processor, folder, max_shard_size=max_shard_size, **how)
        return saved
    folder.mkdir(parents=True, exist_ok=True)
    model, form = stored.model, layout_named(built)
    with report.bar(form.progress, len(ranks)) if form.progress and ranks else nullcontext() as bar:
        layers = _Layers(stored, ranks, files, form, dense, (lambda: None) if bar is None else bar.advance)
        if not separate:
            fuse_experts(model)
        state: Mapping[str, torch.Tensor] = model.state_dict()
        if ranks and not dense:
            quantizer = declare_compressed(model, folder, ranks=ranks, provenance=provenance, layout=layout)
            state = quantizer.get_state_dict_and_metadata(model)[0]
        with silence_transformers():
            write_model(model, state, partial(_read, state, layers, stored), folder, max_shard_size)
            processor.save_pretrained(folder)
    finish_files(folder)
    return _size(model)


def _size(model: nn.Module) -> Saved:
    return Saved(parameter_count(model), weight_bytes(model))


def _read(state: Mapping[str, torch.Tensor], layers: _Layers, stored: StoredModel, key: str) -> torch.Tensor:
    """Return a tensor of the checkpoint; only those without numbers are on the meta device."""
    if not state[key].is_meta:
        return state[key]

    def one(name: str) -> torch.Tensor:
        return layers.read(name) if name in layers else stored.read(name)

    fused = stored.fused.get(key)
    return one(key) if fused is None else join_experts(map(one, fused.parts), fused)


class _Layers:
    """The low-rank layers of a checkpoint. They replace those of the model, and are built one by one."""

    def __init__(
        self,
        stored: StoredModel,
        ranks: Mapping[str, int],
        files: Mapping[str, Path],
        form: Layout,
        dense: bool,
        built: Callable[[], None],
    ) -> None:
        self._stored, self._ranks, self._files, self._form, self._dense = stored, ranks, files, form, dense
        self._built = built
        # Name of a tensor → path of its layer; the last layer and its tensors.
        self._owners: dict[str, str] = {}
        self._last: tuple[str, Mapping[str, torch.Tensor]] = "", {}
        self._replaced: dict[str, Any] = {}
        for name, rank in ranks.items():
            ref = WeightRef(name)
            module: Any = ref.owner(stored.model)
            self._replaced[name] = module
            parts = ["weight"]
            if not dense:
                m, n = ref.read(stored.model).shape
                settings = {"device": "meta", "dtype": stored.model.dtype}
                empty = form.module(n, m, rank, module.bias is not None, isinstance(module, Conv1D), **settings)
                ref.replace(stored.model, empty.requires_grad_(False))
                parts = list(empty.state_dict())
            self._owners |= {f"{name}.{part}": name for part in parts}

    def __contains__(self, key: str) -> bool:
        return key in self._owners

    def read(self, key: str) -> torch.Tensor:
        """Return a tensor of a layer; tensors of the same layer are best read one after the other."""
        name = self._owners[key]
        if self._last[0] != name:
            layer: nn.Module = self._build(name)
            if self._dense:
                layer = densify(nn.Sequential(layer))[0]  # type: ignore[index]
            self._last = name, layer.state_dict()
            self._built()
        return self._last[1][key.removeprefix(f"{name}.")]

    def _build(self, name: str) -> CompressedLinear:
        module = self._replaced[name]
        bias = None if module.bias is None else self._stored.read(f"{name}.bias")
        with safe_open(self._files[name], "pt") as file:
            return build_layer(
                file,
                name,
                self._ranks[name],
                self._form,
                bias,
                isinstance(module, Conv1D),
                dtype=self._stored.model.dtype,
            )
