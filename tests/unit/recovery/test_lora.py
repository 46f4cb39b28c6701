"""LoRA adapters: merged they change numbers and no rank; kept they belong to the stored model."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ara.layouts.modeling_ara import CompressedLinear
from ara.recovery.base import Recovery
from ara.recovery.distill import Distill
from ara.recovery.lora import Adapters
from ara.recovery.trainable import from_trainable
from tests.recovery import MemorySaved, tiny_recovery, weights_of

peft = pytest.importorskip("peft")

KEPT: dict[str, Any] = {"train": "lora", "keep_adapter": True, "steps": 4, "batch": 4, "check_every": 2, "rate": 1e-2}


@pytest.mark.parametrize("family", ["gemma", "gpt2", "qwen2"])
def test_merged_adapters_give_the_same_logits_and_ranks(tmp_path, family, recwarn):
    recovery = tiny_recovery(tmp_path, family)
    model, ids = recovery.model, recovery.held_out.ids
    start, ranks = model(ids).logits, _ranks(recovery)
    shapes = {name: value.shape for name, value in weights_of(model).items()}
    adapters = Adapters(model, recovery.specs, 3, seed=0)
    assert torch.equal(model(ids).logits, start)
    _disturb(adapters)
    changed = model(ids).logits
    adapters.merge()
    torch.testing.assert_close(model(ids).logits, changed, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed, start, atol=1e-2)
    assert _ranks(recovery) == ranks
    assert {name: value.shape for name, value in weights_of(model).items()} == shapes
    assert not recwarn.list


def test_every_part_of_every_factorised_layer_has_an_adapter(tmp_path):
    recovery = tiny_recovery(tmp_path, "gpt2")
    ranks = _ranks(recovery)
    found = Adapters(recovery.model, recovery.specs, 3, seed=0).parameters()
    parts = 2 * len(ranks) + len(recovery.specs) - len(ranks)
    assert len(found) == 2 * parts and 0 < len(ranks) < len(recovery.specs)
    assert {value.shape[0 if "lora_A" in name else 1] for name, value in found.items()} == {3}


def test_removed_adapters_leave_the_weights(tmp_path):
    recovery = tiny_recovery(tmp_path)
    start = weights_of(recovery.model)
    adapters = Adapters(recovery.model, recovery.specs, 3, seed=0)
    _disturb(adapters)
    adapters.remove()
    assert _same(weights_of(recovery.model), start)


def test_the_start_follows_from_the_seed(tmp_path):
    state = torch.random.get_rng_state()
    one, same, other = (
        Adapters(recovery.model, recovery.specs, 3, seed).parameters()
        for seed, recovery in ((1, tiny_recovery(tmp_path)), (1, tiny_recovery(tmp_path)), (2, tiny_recovery(tmp_path)))
    )
    assert _same(one, same) and not _same(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_a_kept_adapter_fits_the_stored_model(tmp_path, family, layout):
    recovery = tiny_recovery(tmp_path, family, **KEPT)
    recovery = replace(recovery, specs=[replace(spec, layout=layout) for spec in recovery.specs])
    start, ids = weights_of(recovery.model), recovery.held_out.ids
    recovery.model.name_or_path = "/home/somebody/model"
    outcome = Distill().repair(recovery)
    assert outcome.details["held_out_kl"]["after"] < outcome.details["held_out_kl"]["before"]
    assert "the LoRA adapter of rank 16 is in adapter/" in outcome.notes[-1]
    assert _same(weights_of(recovery.model), start)
    folder = _folder(recovery) / "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
    assert not any(b"somebody" in path.read_bytes() for path in folder.iterdir())
    from_trainable(recovery.model, layout, recovery.model.dtype)
    stored = recovery.model(ids).logits
    # PEFT warns about GPT-2's transposed layers, and handles them.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(recovery.model, str(folder)).eval()
    with torch.no_grad():
        after = _divergence(recovery, loaded(ids).logits)
    assert not torch.allclose(stored, loaded(ids).logits, atol=1e-3)
    assert after == pytest.approx(outcome.details["held_out_kl"]["after"], rel=1e-4)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 16


def test_a_failed_training_removes_the_adapters(tmp_path, monkeypatch):
    recovery = tiny_recovery(tmp_path, **KEPT)
    start = weights_of(recovery.model)
    monkeypatch.setattr(MemorySaved, "write_folder", _fails)
    with pytest.raises(OSError, match="no room"):
        Distill().repair(recovery)
    assert _same(weights_of(recovery.model), start)


def _fails(self: MemorySaved, name: str, write: object) -> None:
    raise OSError("no room")


def _folder(recovery: Recovery) -> Path:
    assert isinstance(recovery.saved, MemorySaved)
    return recovery.saved.folder


def _divergence(recovery: Recovery, logits: torch.Tensor) -> float:
    p, q = logits[:, :-1].double().log_softmax(-1), recovery.dense(recovery.held_out.ids).logits[:, :-1].double()
    return float(torch.nn.functional.kl_div(p, q.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean())


def _disturb(adapters: Adapters) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in adapters.parameters().values():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))


def _ranks(recovery: Recovery) -> dict[str, int]:
    return {name: layer.rank for name, layer in recovery.model.named_modules() if isinstance(layer, CompressedLinear)}


def _same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
