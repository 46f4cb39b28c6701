"""Training by predictions: it learns, keeps the best, resumes bit for bit, and stops where it must."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from ara.config import RecoverConfig
from ara.errors import DataError, ModelError, NumericalError, UnavailableError, UsageError
from ara.layouts.modeling_ara import LowRankLinear
from ara.models import recompute
from ara.models.losses import token_losses
from ara.recovery import distill
from ara.recovery.base import Recovery, RecoveryText
from ara.recovery.distill import Distill, trained_parameters
from ara.recovery.optimiser import MasterOptimiser
from tests.recovery import MemorySaved, tiny_recovery, weights_of
from tests.tiny import tiny_model

FAST: dict[str, Any] = {"steps": 6, "batch": 6, "batch_size": 2, "check_every": 2, "save_every": 2, "rate": 2e-3}


def kl(recovery: Recovery) -> float:
    """Return the KL to the dense model on all held-out tokens, in nats."""
    with torch.no_grad():
        ids = recovery.held_out.ids
        return float(token_losses(recovery.model(ids).logits, ids, recovery.dense(ids).logits).double().mean())


@pytest.mark.parametrize("family", ["gemma", "gpt2", "qwen2"])
@pytest.mark.parametrize("train", ["all", "factors", "lora"])
def test_the_divergence_falls_and_ranks_stay(tmp_path, family, train):
    recovery = tiny_recovery(tmp_path, family, train=train, **FAST)
    before, dense, start = kl(recovery), weights_of(recovery.dense), weights_of(recovery.model)
    outcome = Distill().repair(recovery)
    after = weights_of(recovery.model)
    assert kl(recovery) < 0.9 * before
    assert outcome.details["held_out_kl"]["before"] == pytest.approx(before, rel=1e-5)
    assert outcome.details["held_out_kl"]["after"] == pytest.approx(kl(recovery), rel=1e-4)
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in start.items()}
    assert all(torch.equal(dense[name], value) for name, value in weights_of(recovery.dense).items())
    assert not any(parameter.requires_grad for parameter in recovery.model.parameters())
    assert outcome.tokens == 6 * 6 * 24 and outcome.interrupted is None


@pytest.mark.parametrize("family", ["gemma", "gpt2", "phi", "opt"])
def test_what_is_trained(tmp_path, family):
    recovery = tiny_recovery(tmp_path, family, **FAST)
    start = weights_of(recovery.model)
    Distill().repair(recovery)
    changed = {name for name, value in weights_of(recovery.model).items() if not torch.equal(value, start[name])}
    head = {"lm_head.weight", "lm_head.bias"}
    embeddings = {
        name for name in start if "embed" in name or name in ("transformer.wte.weight", "transformer.wpe.weight")
    }
    # The bias of keys adds the same to all scores of a query, so it has no gradient.
    assert not changed & (head | embeddings)
    rest = {name for name in start if not name.endswith("k_proj.bias") and not name.endswith("k_proj.B.bias")}
    assert rest - changed - head - embeddings == set()


def test_factors_alone(tmp_path):
    recovery = tiny_recovery(tmp_path, "qwen2", train="factors", **FAST)
    start = weights_of(recovery.model)
    Distill().repair(recovery)
    changed = {name for name, value in weights_of(recovery.model).items() if not torch.equal(value, start[name])}
    layers = [name for name, module in recovery.model.named_modules() if isinstance(module, LowRankLinear)]
    assert changed == {f"{name}.{part}.weight" for name in layers for part in "AB"}


def test_factors_of_a_dense_model_are_refused(tmp_path):
    recovery = tiny_recovery(tmp_path, train="factors", **FAST)
    with pytest.raises(ModelError, match="all layers are dense"):
        Distill().repair(replace(recovery, model=tiny_model("llama")))


def test_only_answers_count(tmp_path):
    """Other tokens, whatever they are, change no gradient but through the answers that read them."""
    recovery = tiny_recovery(tmp_path, windows=2, **{**FAST, "batch": 2})
    counted = torch.zeros_like(recovery.train.ids, dtype=torch.bool)
    counted[:, 5:11] = True
    gradients = []
    for after in (0, 3):
        ids = recovery.train.ids.clone()
        # Predictions of tokens 5 … 10 read tokens 0 … 9.
        ids[:, 11:] = (ids[:, 11:] + after) % 200
        training = _training(replace(recovery, train=RecoveryText(ids, counted)))
        losses, count = training._losses(training.recovery.train, training.teacher, torch.tensor([0, 1]))
        losses.sum().backward()
        gradients.append({name: value.grad.clone() for name, value in training.parameters.items()})
        training.optimiser.clear()
        assert count == 2 * 6
        assert not losses[:, [0, 1, 2, 3, 10, 11, 22]].any() and bool((losses[:, 4:10] > 0).all())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_the_step_is_the_mean_over_counted_tokens(tmp_path):
    """Micro-batches of any size give the gradient of one batch."""
    norms = []
    for size in (1, 4):
        recovery = tiny_recovery(tmp_path, **{**FAST, "batch_size": size, "steps": 1})
        counted = torch.rand(recovery.train.ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3
        outcome = Distill().repair(replace(recovery, train=replace(recovery.train, counted=counted)))
        row = _log(recovery)[1]
        norms.append((float(row["gradient"]), float(row["loss"]), outcome.details["held_out_kl"]["after"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_text_without_answers_is_refused(tmp_path):
    recovery = tiny_recovery(tmp_path, **FAST)
    none = torch.zeros_like(recovery.train.ids, dtype=torch.bool)
    # The first token is never predicted.
    none[:, 0] = True
    with pytest.raises(DataError, match="no token of the training windows counts"):
        Distill().repair(replace(recovery, train=RecoveryText(recovery.train.ids, none)))


class _Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("train", "dtype", "steps"),
    [("all", torch.float32, 4), ("all", torch.bfloat16, 3), ("lora", torch.float32, 3), ("factors", torch.float32, 2)],
)
def test_a_resumed_training_gives_the_same_bytes(tmp_path, monkeypatch, train, dtype, steps):
    settings = {**FAST, "train": train, "dtype": dtype, "steps": steps, "save_every": 1}
    whole = tiny_recovery(tmp_path / "a", "gemma", **settings)
    expected = Distill().repair(whole)
    for killed_at in range(1, steps):
        saved = MemorySaved(tmp_path / f"b{killed_at}")
        with monkeypatch.context() as patch:
            _kill_before_step(patch, killed_at + 1)
            with pytest.raises(_Killed):
                Distill().repair(tiny_recovery(tmp_path / "a", "gemma", saved=saved, **settings))
        again = tiny_recovery(tmp_path / "a", "gemma", saved=saved, **settings)
        outcome = Distill().repair(again)
        assert outcome == expected
        assert _same(weights_of(again.model), weights_of(whole.model))
        assert [row["step"] for row in _log(again)] == [str(step) for step in range(steps + 1)]


def test_a_damaged_state_starts_again(tmp_path):
    saved = MemorySaved(tmp_path / "saved")
    saved.save_state({"weight:x": torch.zeros(3)}, {"rows": [{"step": 4}]})
    whole, again = tiny_recovery(tmp_path / "a", **FAST), tiny_recovery(tmp_path / "a", saved=saved, **FAST)
    assert Distill().repair(again) == Distill().repair(whole)


def test_early_stop_gives_the_start_back(tmp_path, monkeypatch):
    recovery = tiny_recovery(tmp_path, **{**FAST, "steps": 40, "check_every": 1, "patience": 3})
    start = weights_of(recovery.model)
    seen = _checks_give(monkeypatch, [1.0, 1.5, 1.2, 1.1])
    outcome = Distill().repair(recovery)
    assert outcome.details["steps"] == 3 and outcome.details["best_step"] == 0
    assert "stopped after step 3 of 40: 3 checks without improvement" in outcome.notes
    assert any("nothing has changed: try a lower --rate" in note for note in outcome.notes)
    assert _same(weights_of(recovery.model), start) and not _same(seen[1], start)


def test_the_best_in_between_is_kept(tmp_path, monkeypatch):
    recovery = tiny_recovery(tmp_path, **{**FAST, "check_every": 1, "steps": 4})
    seen = _checks_give(monkeypatch, [5.0, 4.0, 3.0, 4.5, 3.5])
    outcome = Distill().repair(recovery)
    assert outcome.details["best_step"] == 2
    assert outcome.details["held_out_kl"] == {"before": 5.0, "after": 3.0}
    assert [_same(weights_of(recovery.model), weights) for weights in seen] == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("settings", "start", "rate"),
    [
        ({"rate": None}, 2.0, 5e-5),
        ({"rate": None}, 0.1, 8.5e-6),
        ({"rate": None}, 0.0, 1e-12),
        ({"rate": None, "train": "lora"}, 0.1, 5e-5),
        ({"rate": 2e-3}, 0.1, 2e-3),
    ],
)
def test_near_the_dense_model_the_default_rate_is_low(tmp_path, monkeypatch, settings, start, rate):
    recovery = tiny_recovery(tmp_path, "qwen2", **{**FAST, "steps": 4, **settings})
    _checks_give(monkeypatch, [start] * 3)
    Distill().repair(recovery)
    # The warm-up takes one step.
    assert float(_log(recovery)[1]["rate"]) == pytest.approx(rate)


def test_a_resumed_run_has_the_rate_of_its_start(tmp_path, monkeypatch):
    saved = MemorySaved(tmp_path / "saved")
    settings = {**FAST, "rate": None}
    whole = tiny_recovery(tmp_path / "a", **settings)
    expected = Distill().repair(whole)
    with monkeypatch.context() as patch:
        _interrupt_in_step(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            Distill().repair(tiny_recovery(tmp_path / "a", saved=saved, **settings))
    again = tiny_recovery(tmp_path / "a", saved=saved, **settings)
    assert Distill().repair(again) == expected
    assert _same(weights_of(again.model), weights_of(whole.model))


def test_divergence_says_what_to_do(tmp_path, monkeypatch):
    recovery = tiny_recovery(tmp_path, **{**FAST, "check_every": 1, "patience": 10})
    _checks_give(monkeypatch, [1.0, 3.5, 4.0])
    with pytest.raises(NumericalError, match=r"grown by 2\.5 nats") as caught:
        Distill().repair(recovery)
    assert "--rate" in str(caught.value.hint)


def test_nan_says_what_to_do(tmp_path):
    recovery = tiny_recovery(tmp_path, **FAST)
    with torch.no_grad():
        recovery.model.get_parameter("model.norm.weight")[3] = torch.nan
    with pytest.raises(NumericalError, match="the held-out loss is nan") as caught:
        Distill().repair(recovery)
    assert "--dtype float32" in str(caught.value.hint)


def test_ctrl_c_keeps_the_best(tmp_path, monkeypatch):
    recovery = replace(tiny_recovery(tmp_path, **FAST), keep_on_interrupt=True)
    before = kl(recovery)
    _interrupt_in_step(monkeypatch, 5)
    outcome = Distill().repair(recovery)
    assert outcome.interrupted == "interrupted after step 4 of 6"
    assert outcome.details["best_step"] == 4 and kl(recovery) < before
    other = tiny_recovery(tmp_path, **FAST)
    with pytest.raises(KeyboardInterrupt):
        Distill().repair(other)


def test_half_precision_has_float32_masters(tmp_path):
    """Steps far below the resolution of bfloat16 add up."""
    recovery = tiny_recovery(tmp_path, "gemma", dtype=torch.bfloat16, **{**FAST, "rate": 3e-4, "steps": 12})
    before = kl(recovery)
    Distill().repair(recovery)
    assert recovery.model.dtype == torch.bfloat16
    assert kl(recovery) < 0.95 * before


def test_recomputed_activations_give_the_same_bytes(tmp_path, monkeypatch):
    kept = tiny_recovery(tmp_path, **FAST)
    Distill().repair(kept)
    monkeypatch.setattr(recompute, "available_bytes", lambda device: 1000)
    facts = []
    again = tiny_recovery(tmp_path, **FAST)
    monkeypatch.setattr(type(again.report), "fact", lambda self, text: facts.append(text))
    Distill().repair(again)
    assert any("computed again in the backward pass" in text for text in facts)
    assert _same(weights_of(kept.model), weights_of(again.model))


def test_settings_are_checked_first(monkeypatch):
    with pytest.raises(UsageError, match="--keep-adapter needs --train lora"):
        Distill().check(RecoverConfig(keep_adapter=True))
    monkeypatch.setitem(sys.modules, "peft", None)
    Distill().check(RecoverConfig())
    with pytest.raises(UnavailableError, match="--train lora needs the package peft") as caught:
        Distill().check(RecoverConfig(train="lora"))
    assert "pip install peft" in str(caught.value.hint)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UnavailableError, match="tensorboard"):
        Distill().check(RecoverConfig(tensorboard=True))


def test_the_log_has_a_row_per_step(tmp_path):
    recovery = tiny_recovery(tmp_path, **FAST)
    outcome = Distill().repair(recovery)
    rows = _log(recovery)
    assert [row["step"] for row in rows] == list("0123456")
    assert [bool(row["held_out"]) for row in rows] == [True, False, True, False, True, False, True]
    assert rows[0]["loss"] == "" and float(rows[6]["tokens"]) == outcome.tokens
    assert [row["loss"] for row in outcome.details["curve"]][1:] == [float(row["loss"]) for row in rows[1:]]


def _training(recovery: Recovery) -> Any:
    return distill._Training(recovery, trained_parameters(recovery))


def _log(recovery: Recovery) -> list[dict[str, str]]:
    return list(csv.DictReader(recovery.saved.log_file("log.csv").read_text().splitlines()))


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def _checks_give(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> list[dict[str, torch.Tensor]]:
    """Let the held-out checks give ``values``; return a list that collects the weights at each check."""
    seen: list[dict[str, torch.Tensor]] = []

    def held_out(training: Any) -> float:
        seen.append(weights_of(training.recovery.model))
        return values[len(seen) - 1]

    monkeypatch.setattr(distill._Training, "_held_out", held_out)
    return seen


def _kill_before_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    step = distill._Training._step

    def killed(training: Any) -> None:
        if training.history.step == number - 1:
            raise _Killed
        step(training)

    monkeypatch.setattr(distill._Training, "_step", killed)


def _interrupt_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Press Ctrl+C after the parameters of a step have changed."""
    step = MasterOptimiser.step

    def interrupted(optimiser: MasterOptimiser, scale: float = 1.0) -> float:
        norm = step(optimiser, scale)
        if optimiser.done == number:
            raise KeyboardInterrupt
        return norm

    monkeypatch.setattr(MasterOptimiser, "step", interrupted)
