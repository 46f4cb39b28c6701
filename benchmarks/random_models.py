"""Models of random weights on the disk, dense or low-rank, for benchmarks of memory.

They are written block by block, a file each, so that a model of any depth takes the memory of one block.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from ara.layouts.modeling_ara import LAYERS, AraConfig
from ara.models.folder import INDEX
from ara.models.weights import LinearSpec, find_blocks, find_linears

if TYPE_CHECKING:
    from torch import nn
    from transformers import LlamaConfig


def empty_model(config: LlamaConfig) -> nn.Module:
    """Return the model of a config without numbers."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def uniform_rank(spec: LinearSpec, keep: float) -> int:
    """Return the largest rank whose two factors take at most the share ``keep`` of a layer's parameters."""
    return int(keep * spec.m * spec.n / (spec.m + spec.n))


def write_model(folder: Path, config: LlamaConfig, dtype: torch.dtype, keep: float | None = None) -> int:
    """Write a model of random weights; the tokenizer is not part of it.

    Args:
        folder: must not exist.
        config: of the model.
        dtype: of the weights.
        keep: write a compressed checkpoint with two factors per layer, which keep this share of its parameters.

    Returns:
        Bytes of the weight files.
    """
    folder.mkdir(parents=True)
    model = empty_model(config)
    ranks = {} if keep is None else {spec.name: uniform_rank(spec, keep) for spec in find_linears(model)}
    weights: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    path = f"{find_blocks(model)[0]}."
    for block, shapes in groupby(_stored(model, ranks), key=lambda item: _block_of(item[0], path)):
        tensors = {name: _random(name, shape, config, generator).to(dtype) for name, shape in shapes}
        file = f"model-{block}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weights.update(dict.fromkeys(tensors, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    document = config.to_dict() | {"dtype": str(dtype).removeprefix("torch."), "architectures": [type(model).__name__]}
    if ranks:
        document["quantization_config"] = AraConfig(ranks, LAYERS["factors"].since).to_dict()
    (folder / "config.json").write_text(json.dumps(document, indent=1))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _stored(model: nn.Module, ranks: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor to write, in the order of the model; tied ones once."""
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if (rank := ranks.get(layer)) is None:
            yield name, tuple(parameter.shape)
        else:
            m, n = parameter.shape
            yield f"{layer}.A.weight", (rank, n)
            yield f"{layer}.B.weight", (m, rank)


def _block_of(name: str, path: str) -> str:
    """Return the number of a tensor's block as a word, or what it is outside of the blocks."""
    return f"{int(name.removeprefix(path).split('.')[0]):03d}" if name.startswith(path) else name


def _random(name: str, shape: Iterable[int], config: LlamaConfig, generator: torch.Generator) -> torch.Tensor:
    """Return a tensor that keeps the size of activations: uniform numbers of variance 1 / n, ones for a norm."""
    shape = tuple(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    # Outputs of residual branches shrink with the depth, as in trained models.
    branches = 2 * config.num_hidden_layers if "o_proj" in name or "down_proj" in name else 1
    return (torch.rand(shape, generator=generator) * 2 - 1) * (3 / shape[-1] / branches) ** 0.5
