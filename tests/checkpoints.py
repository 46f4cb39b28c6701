"""Small checkpoints that other runtimes can run, with heads that fused attention can rotate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ara.decomposition.plain import Plain
from ara.layout_names import DEFAULT_LAYOUT
from ara.layouts.grid import Grid
from ara.layouts.modeling_ara import separate_experts
from ara.models.checkpoint import save_checkpoint
from ara.models.embeddings import find_embeddings
from ara.models.low_rank import apply_factors
from ara.models.silence import silence_transformers
from ara.models.weights import LinearSpec, find_linears
from ara.progress import SILENT
from ara.quantisation.sequential import Parts, round_model
from tests.decoders import DECODERS, UNKNOWN, decoder_config
from tests.tiny import tiny_config, tiny_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 102, "head_dim": 16, "max_position_embeddings": 200}


@dataclass(frozen=True)
class Made:
    """A checkpoint on the disk, and the model that it holds."""

    folder: Path
    model: PreTrainedModel


def make_checkpoint(
    root: Path,
    family: str,
    layout: Any,
    grid: Grid | Sequence[Grid | None] | None = None,
    embedding: Grid | None = None,
    factorised: str = "",
    **changes: Any,
) -> Made:
    """Save a checkpoint below ``root``: dense where ``layout`` is ``None``, else with low-rank layers.

    The matrices of these layers are rounded to ``grid``, if there is one, and embedding and head to ``embedding``.
    Several grids take turns from layer to layer; ``None`` among them: not rounded. Layers without ``factorised`` in
    their names stay dense.
    """
    config = decoder_config(family, **changes) if family in (*DECODERS, *UNKNOWN) else _wider(family, changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.1)
            elif "norm" in name or parameter.ndim == 1:  # weights of one would hide a norm that lost its own
                torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # zeros would hide a lost one
                buffer.normal_(std=0.1)
    folder = root / "checkpoint"
    if layout is None and grid is None and embedding is None:
        with silence_transformers():
            model.save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        return Made(folder, model)
    linears = find_linears(separate_experts(model))
    chosen = [spec for spec in linears if factorised in spec.name]
    ranks = {} if layout is None else _factorise(model, chosen, root / "factors.safetensors", layout)
    in_turn = cycle([grid] if grid is None or isinstance(grid, Grid) else grid)
    grids = {spec.name: one for spec, one in zip(linears, in_turn, strict=False) if one is not None}
    if embedding is not None:
        grids |= find_embeddings(model).on(embedding)
    rounded = round_model(model, linears, grids, None, 1, _NoParts(), SILENT) if grids else None
    stored = DEFAULT_LAYOUT if layout is None else layout
    save_checkpoint(model, tiny_tokenizer(), folder, ranks=ranks, provenance={}, layout=stored, rounded=rounded)
    return Made(folder, model)


def _wider(family: str, changes: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of a family of :mod:`tests.tiny` with :data:`SIZES` and these changes."""
    tiny = tiny_config(family)
    values = {key: value for key, value in tiny.to_dict().items() if key not in ("rope_parameters", "layer_types")}
    return type(tiny)(**{**values, **SIZES, **changes})


def _factorise(model: PreTrainedModel, linears: list[LinearSpec], file: Path, layout: Any) -> dict[str, int]:
    """Replace all linear layers but one by low-rank ones, and return their ranks."""
    tensors = {}
    for spec in linears:
        factors = Plain().decompose(spec.weight.read(model), None)
        tensors[f"{spec.name}.A"] = factors.a.float().contiguous()
        tensors[f"{spec.name}.B"] = factors.b.float().contiguous()
    save_file(tensors, file)
    ranks = {spec.name: max(1, spec.full_rank // 2 - spec.layer) for spec in linears if spec.name != linears[1].name}
    apply_factors(model, ranks, dict.fromkeys(ranks, file), layout)
    return ranks


class _NoParts(Parts):
    """Rounding to nearest resumes nothing."""
