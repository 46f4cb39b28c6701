"""Checkpoints for benchmarks of speed: dense, and at uniform ranks; each is made once in a folder to work in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ara.allocation.uniform import Uniform
from ara.artifacts.factors import factor_files
from ara.config import DecomposeConfig
from ara.layout_names import LayoutName
from ara.layouts import layout_named
from ara.layouts.modeling_ara import replace_linear
from ara.models.checkpoint import save_checkpoint
from ara.models.low_rank import apply_factors
from ara.models.placement import torch_dtype
from ara.models.silence import silence_transformers
from ara.models.weights import find_linears
from ara.solver.problem import Budget, Module
from ara.stages.common import Run, model_of
from ara.stages.decompose import decompose
from ara.stages.modules import load_modules

# SmolLM2-135M with its own weights; two blocks of LLaMA-7B's shape; two small ones, to try a benchmark.
DEMO = "demo"
_RANDOM = {
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 8},
}
SHAPES = (DEMO, *_RANDOM)


def dense_folder(workspace: Path, shapes: str, dtype: str = "float32") -> Path:
    """Return a folder with the dense model; it is made if it does not exist.

    Args:
        workspace: where to work.
        shapes: one of :data:`SHAPES`.
        dtype: of random weights; those of the demo are float32.
    """
    folder = workspace / "dense"
    if shapes == DEMO:
        return save_dense(folder, DEMO)
    if (folder / "config.json").exists():
        return folder
    with silence_transformers():
        from transformers import AutoModelForCausalLM, LlamaConfig

        from ara.models.sources import resolve

        config = LlamaConfig(**_RANDOM[shapes], num_hidden_layers=2, vocab_size=1000, max_position_embeddings=4096)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.to(torch_dtype(dtype)).save_pretrained(folder)
        resolve("demo").load_tokenizer().save_pretrained(folder)
    return folder


def save_dense(folder: Path, name: str) -> Path:
    """Save a model in float32 with its tokenizer, if the folder does not exist, and return the folder.

    Args:
        folder: to write.
        name: of the model, as ``ara decompose`` takes it.
    """
    from ara.models.sources import resolve

    if not (folder / "config.json").exists():
        source = resolve(name)
        with silence_transformers():
            source.load_model(torch.float32).save_pretrained(folder)
            source.load_tokenizer().save_pretrained(folder)
    return folder


def compressed_folder(workspace: Path, shapes: str, run: Run, dense: Path, keep: float, layout: LayoutName) -> Path:
    """Return a folder with the model at uniform ranks; it is made if it does not exist, by plain SVD.

    Args:
        workspace: where to work.
        shapes: one of :data:`SHAPES`; those with random weights get random low-rank layers.
        run: workspace for the factors, and reporter.
        dense: folder of the dense model.
        keep: share of the parameters to keep.
        layout: of the low-rank layers.
    """
    folder = workspace / f"keep-{keep:g}-{layout}"
    if (folder / "config.json").exists():
        return folder
    if shapes != DEMO:
        draw_layers(dense, folder, keep, layout)
        return folder
    view = decompose(DecomposeConfig(model=str(dense), method="plain", device="cpu", dtype="float32"), run)
    modules = load_modules(view, layout)
    specs = [module.spec for module in modules]
    ranks = Uniform().allocate(modules, Budget.for_keep(specs, keep)).low_rank()
    source = model_of(view, run)
    model = source.load_model(torch.float32)
    apply_factors(model, ranks, factor_files(view, specs), layout, run.report)
    save_checkpoint(model, source.load_tokenizer(), folder, ranks=ranks, provenance={}, layout=layout)
    return folder


def draw_layers(dense: Path, folder: Path, keep: float, layout: LayoutName) -> None:
    """Write a random model's checkpoint with random low-rank layers in its dtype; factoring it would take minutes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with silence_transformers():
        model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    specs = [replace(spec, layout=layout) for spec in find_linears(model)]
    flat = [Module(spec, torch.ones(spec.full_rank, dtype=torch.float64)) for spec in specs]
    ranks = Uniform().allocate(flat, Budget.for_keep(specs, keep)).low_rank()
    for spec in (spec for spec in specs if spec.name in ranks):
        # A new layer has random weights, but its indices are in order, which would be faster than in a real layer.
        layer = layout_named(layout).module(spec.n, spec.m, ranks[spec.name], bias=False)
        for indices in layer.buffers(recurse=False):
            indices.copy_(torch.randperm(len(indices)))
        replace_linear(model, spec.name, layer.to(model.dtype))
    save_checkpoint(model, AutoTokenizer.from_pretrained(dense), folder, ranks=ranks, provenance={}, layout=layout)
