"""``--share-experts``: the experts of a block have one factor A for what maps up, through the whole pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ara
from ara.artifacts.factors import FactorsResults
from ara.config import (
    AllocateConfig,
    DecomposeConfig,
    PlanConfig,
    QuantiseConfig,
    RecoverConfig,
    TruncateConfig,
)
from ara.errors import UnsupportedModelError, UsageError
from ara.layouts.modeling_ara import fused_experts, shared_layers_of_experts
from ara.models.sources import resolve
from ara.planning.plan import make_plan
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.quantise import quantise
from ara.stages.recover import recover
from ara.stages.truncate import truncate
from export.onnx.stored_weights import Checkpoint
from tests.mixtures import CPU, Made, first_components, logits, make_mixture
from tests.recorder import Recorder
from tests.tiny import save_tiny, tiny_model


# Stored as (E, m, n), and as (E, n, m) with biases.
@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Made:
    """Return one family with trained ranks, truncated."""
    folder = tmp_path_factory.mktemp(request.param)
    return make_mixture(folder, request.param, tiny_text, share_experts=True, check=True)


def test_one_layer_and_one_rank_for_all_experts(made: Made) -> None:
    layers = FactorsResults.read(made.factors).modules
    together = [layer for layer in layers if layer.experts]
    assert len(together) == 3
    assert {(layer.kind.rpartition(".")[2], layer.experts, layer.m) for layer in together} == {
        ("gate_up_proj", 5, 5 * 2 * together[0].m // 10)
    }
    # What maps down has a rank for each expert.
    assert sum(".down_proj." in layer.name for layer in layers) == 15
    assert any(layer.name in made.low_rank for layer in together)


def test_checkpoint_is_the_model_with_the_first_components(made: Made) -> None:
    model = first_components(made, share_experts=True)
    assert any(name in made.low_rank for name in shared_layers_of_experts(model))
    expected = logits(model)
    folder = made.checkpoint.path / "checkpoint"
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["shared_experts"] is True
    for loaded in (
        ara.load(folder, "cpu"),
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
    ):
        torch.testing.assert_close(logits(loaded.eval()), expected, atol=5e-4, rtol=1e-3)
    stored = made.checkpoint.manifest.results["parameters"]
    assert stored == sum(parameter.numel() for parameter in ara.load(folder, "cpu").parameters())


def test_loaded_checkpoint_saved_again_is_the_same(made: Made, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(made.checkpoint.path / "checkpoint").eval()
    loaded.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(loaded))


def test_densified_checkpoint_is_an_ordinary_one(made: Made) -> None:
    view = truncate(TruncateConfig(densify=True), Run(made.root))
    model = AutoModelForCausalLM.from_pretrained(view.path / "checkpoint").eval()
    assert fused_experts(model)
    compressed = ara.load(made.checkpoint.path / "checkpoint", "cpu")
    torch.testing.assert_close(logits(model), logits(compressed), atol=5e-4, rtol=1e-3)


def test_repair_and_rounding(made: Made, tiny_text: str) -> None:
    run = Run(made.root, report=Recorder())
    settings = {"text": tiny_text, "samples": 24, "held_out": 16, "seq_len": 32}
    repaired = recover(RecoverConfig(level="closed", **settings, **CPU), run, checkpoint=made.checkpoint.key)
    (level,) = repaired.manifest.results["recovery"]["levels"]
    assert level["after"] < level["before"]
    few = {"bits": 8, "samples": 8, "held_out": 4, "tolerance": 1, **CPU}
    exact = logits(ara.load(repaired.path / "checkpoint", "cpu"))
    for inputs in ("own", "dense"):
        rounded = quantise(QuantiseConfig(inputs=inputs, **few), run, checkpoint=repaired.key, name=inputs)
        found = logits(ara.load(rounded.path / "checkpoint", "cpu"))
        assert 0 < (exact - found).abs().median() < 0.05


def test_graphs_refuse_a_shared_factor(made: Made) -> None:
    with pytest.raises(UnsupportedModelError, match=r"the experts of .* share a factor"):
        Checkpoint(made.checkpoint.path / "checkpoint")


def test_dense_experts_stay_as_they_were(made: Made, tiny_text: str) -> None:
    """At keep 1 nothing says that the experts share a factor; repair and rounding know it from the decomposition."""
    run = Run(made.root, report=Recorder())
    ranks = allocate(AllocateConfig(keep=1, method="uniform", **CPU), run, name="all")
    dense = truncate(TruncateConfig(), run, allocation=ranks.name, name="all")
    model = AutoModelForCausalLM.from_pretrained(dense.path / "checkpoint").eval()
    assert fused_experts(model)
    torch.testing.assert_close(logits(model), logits(tiny_model(made.family)), atol=1e-5, rtol=1e-5)
    few = QuantiseConfig(bits=8, inputs="own", samples=8, held_out=4, tolerance=1, **CPU)
    rounded = quantise(few, run, checkpoint=dense.key, name="all-8")
    found = logits(ara.load(rounded.path / "checkpoint", "cpu"))
    assert 0 < (logits(model) - found).abs().median() < 0.05


def test_weights_that_stay_in_their_files(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARA_CACHE_DIR", str(tmp_path))
    model = made.model
    loaded, mapped = (
        resolve(model, offload=offload).with_experts(True).load_model(torch.float32) for offload in ("none", "disk")
    )
    assert torch.equal(logits(mapped), logits(loaded))


def test_plan_counts_one_layer_for_all_experts(made: Made, tmp_path: Path) -> None:
    model = made.model
    shared, own = (
        make_plan(PlanConfig(model=model, share_experts=share, probe=False, seq_len=32, **CPU), tmp_path)
        for share in (True, False)
    )
    assert shared.parameters == own.parameters
    assert shared.layers == own.layers - 4 * 3


def test_a_model_without_experts_is_refused(tmp_path: Path, tiny_text: str) -> None:
    config = DecomposeConfig(
        model=str(save_tiny(tmp_path / "model", "llama")), text=tiny_text, seq_len=32, share_experts=True
    )
    with pytest.raises(UsageError, match="--share-experts: LlamaForCausalLM has no experts"):
        decompose(config, Run(tmp_path / "ws", report=Recorder()))
