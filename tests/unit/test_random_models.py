"""The random models of the benchmarks of memory: complete, of the wanted size, and no activation explodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig

import ara
from ara.models.sources import resolve
from ara.models.weights import find_linears
from benchmarks.random_models import empty_model, uniform_rank, write_model

IDS = torch.arange(12)[None]


def config(tied: bool) -> LlamaConfig:
    """Return a config with widths that all differ."""
    return LlamaConfig(
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=51,
        tie_word_embeddings=tied,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_model(tied: bool, tmp_path: Path) -> None:
    size = write_model(tmp_path / "model", config(tied), torch.bfloat16)
    # Loading compares names and shapes with the files.
    model = resolve(str(tmp_path / "model")).load_model(torch.bfloat16)
    assert size >= 2 * sum(parameter.numel() for parameter in model.parameters())
    hidden = model(IDS, output_hidden_states=True).hidden_states
    assert float(hidden[1].float().std()) > 0.3 and float(hidden[-2].float().std()) < 3
    files = sorted(path.name for path in (tmp_path / "model").glob("model-[0-9]*"))
    assert files == [f"model-{block:03d}.safetensors" for block in range(3)]
    with safe_open(tmp_path / "model" / files[1], "pt") as file:
        assert {name.split(".")[2] for name in file.keys()} == {"1"}  # noqa: SIM118


def test_a_compressed_model(tmp_path: Path) -> None:
    write_model(tmp_path / "model", config(False), torch.float16, keep=0.6)
    specs = find_linears(empty_model(config(False)))
    model = ara.load(tmp_path / "model", "cpu")
    assert model.dtype == torch.float16
    for spec in specs:
        layer = model.get_submodule(spec.name)
        rank = uniform_rank(spec, 0.6)
        assert layer.A.weight.shape == (rank, spec.n) and layer.B.weight.shape == (spec.m, rank)
        assert spec.cost(rank) <= 0.6 * spec.dense_cost < spec.cost(rank + 1)
    assert model(IDS).logits.isfinite().all()
