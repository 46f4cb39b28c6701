"""Mixtures of experts go the whole way: every expert has its own factors, moments and rank."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ara
from ara.artifacts.factors import FactorsResults
from ara.config import (
    DecomposeConfig,
    EvalConfig,
    QuantiseConfig,
    RecoverConfig,
    TruncateConfig,
)
from ara.layouts.modeling_ara import CompressedLinear, SeparateExperts, fused_experts
from ara.models.low_rank import low_rank_layers
from ara.models.sources import resolve
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.evaluate import evaluate
from ara.stages.quantise import quantise
from ara.stages.recover import recover
from ara.stages.truncate import truncate
from tests.mixtures import CPU, Made, first_components, logits, make_mixture
from tests.recorder import Recorder
from tests.tiny import MIXTURES, tiny_model


@pytest.fixture(scope="module", params=MIXTURES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Made:
    """Return one family with trained ranks, truncated."""
    return make_mixture(tmp_path_factory.mktemp(request.param), request.param, tiny_text)


def test_separate_experts_compute_what_fused_ones_do(made: Made) -> None:
    dense = tiny_model(made.family)
    assert fused_experts(dense)
    separate = resolve(made.model).load_model(torch.float32)
    assert not fused_experts(separate)
    assert any(isinstance(module, SeparateExperts) for module in separate.modules())
    torch.testing.assert_close(logits(separate), logits(dense), atol=1e-5, rtol=1e-5)


def test_every_expert_is_a_layer_with_its_own_rank(made: Made) -> None:
    layers = FactorsResults.read(made.factors).modules
    experts = [layer for layer in layers if ".experts." in layer.name and layer.name[-1].isdigit()]
    blocks = len({layer.layer for layer in experts})
    assert blocks in (2, 3)
    assert len(experts) == 2 * 5 * blocks
    assert {layer.kind.rpartition(".")[2] for layer in experts} == {"gate_up_proj", "down_proj"}
    ranks = json.loads((made.ranks.path / "ranks.json").read_text())["ranks"]
    assert len({ranks[layer.name] for layer in experts}) > 1


def test_checkpoint_is_the_model_with_the_first_components(made: Made) -> None:
    expected = logits(first_components(made))
    assert (logits(tiny_model(made.family)) - expected).abs().max() > 0.05
    folder = made.checkpoint.path / "checkpoint"
    for loaded in (
        ara.load(folder, "cpu"),
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
    ):
        assert set(low_rank_layers(loaded)) == made.low_rank.keys()
        torch.testing.assert_close(logits(loaded.eval()), expected, atol=5e-4, rtol=1e-3)


def test_loaded_checkpoint_saved_again_is_the_same(made: Made, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(made.checkpoint.path / "checkpoint").eval()
    loaded.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(loaded))


def test_densified_checkpoint_is_an_ordinary_one(made: Made) -> None:
    view = truncate(TruncateConfig(densify=True), Run(made.root))
    model = AutoModelForCausalLM.from_pretrained(view.path / "checkpoint").eval()
    assert fused_experts(model)
    assert not any(isinstance(module, (CompressedLinear, SeparateExperts)) for module in model.modules())
    compressed = ara.load(made.checkpoint.path / "checkpoint", "cpu")
    torch.testing.assert_close(logits(model), logits(compressed), atol=5e-4, rtol=1e-3)


def test_repair_evaluation_and_rounding(made: Made, tiny_text: str) -> None:
    run = Run(made.root, report=made.report)
    settings = {"text": tiny_text, "samples": 24, "held_out": 16, "seq_len": 32}
    config = RecoverConfig(level="closed", **settings, **CPU)
    repaired = recover(config, run, checkpoint=made.checkpoint.key)
    (level,) = repaired.manifest.results["recovery"]["levels"]
    assert level["after"] < level["before"]
    view = evaluate(EvalConfig(tasks=(tiny_text,), seq_len=48, max_windows=2, **CPU), run, checkpoint=repaired.key)
    (task,) = view.manifest.results["tasks"].values()
    assert all(math.isfinite(row["perplexity"]) for row in task["models"].values())
    few = QuantiseConfig(bits=8, inputs="own", samples=8, held_out=4, tolerance=1, **CPU)
    rounded = quantise(few, run, checkpoint=repaired.key)
    exact, found = (logits(ara.load(one.path / "checkpoint", "cpu")) for one in (repaired, rounded))
    # A token may go to another expert, and then differs much.
    assert 0 < (exact - found).abs().median() < 0.05


def test_experts_with_few_tokens_are_named(made: Made, tiny_text: str, tmp_path: Path) -> None:
    (warning,) = (text for text in made.report.warnings if "experts saw fewer" in text)
    assert re.search(r": block \d \(\d of 5, the least \d+\)", warning)
    assert "--calibrate-all-experts" in warning
    report = Recorder()
    config = DecomposeConfig(
        model=made.model,
        text=tiny_text,
        samples=12,
        seq_len=32,
        method="whitened",
        calibrate_all_experts=True,
        **CPU,
    )
    decompose(config, Run(tmp_path / "ws", report=report))
    assert not [text for text in report.warnings if "experts saw fewer" in text]
