"""Block training on tiny models: errors fall, worse blocks are taken back, a resumed run gives the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ara.errors import NumericalError, UnsupportedModelError
from ara.models.blocks import hidden_states, keeping_outputs
from ara.models.losses import sampled_targets
from ara.models.weights import find_blocks
from ara.recovery import block as module
from ara.recovery.base import Passes, Recovery, RecoveryText
from ara.recovery.block import Block, batch_order
from ara.recovery.fisher import block_fisher
from ara.recovery.metric import DAMPING, Metric
from ara.recovery.optimiser import MasterOptimiser
from ara.recovery.side_by_side import SideBySide
from tests.recorder import Recorder
from tests.recovery import MemorySaved, stored, tiny_recovery, weights_of
from tests.tiny import gemma_with_shared_keys, tiny_model

BATCH = 3
SETTINGS: dict[str, Any] = {
    "windows": 8,
    "length": 17,
    "batch_size": BATCH,
    "block_rate": 2e-3,
    "block_metric": "plain",
}


def recovery_of(folder: Path, family: Any = "llama", **more: Any) -> Recovery:
    recovery = tiny_recovery(folder, family, **{**SETTINGS, **more})
    recovery.report = Recorder()
    return recovery


def states(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the output of every block."""
    with torch.no_grad(), keeping_outputs(find_blocks(model)[1]) as outputs:
        model(input_ids=ids, use_cache=False)
    return [hidden_states(output) for output in outputs]


def errors(recovery: Recovery) -> list[float]:
    """Return the squared error at every block's output, relative to the target, on the held-out windows."""
    ids = recovery.held_out.ids
    pairs = zip(states(recovery.model, ids), states(recovery.dense, ids), strict=True)
    return [float((own - target).square().sum() / target.square().sum()) for own, target in pairs]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("metric", ["plain", "channels", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_errors_fall_on_held_out_text(tmp_path: Path, family: str, metric: str) -> None:
    recovery = recovery_of(tmp_path, family, block_metric=metric)
    before, dense = errors(recovery), weights_of(recovery.dense)
    outcome = Block().repair(recovery)
    after = errors(recovery)
    assert all(new < 0.95 * old for new, old in zip(after, before, strict=True))
    assert outcome.tokens == recovery.config.block_epochs * recovery.train.ids.numel()
    assert outcome.interrupted is None
    records = outcome.details["blocks"]
    assert [record["kept"] for record in records] == [True] * 3
    assert all(record["after"] < record["before"] for record in records)
    assert "median of 3 blocks" in outcome.notes[0] and outcome.notes[1] == "0 of 3 blocks taken back"
    assert same(dense, weights_of(recovery.dense)), "the dense model is only read"
    assert not any(parameter.requires_grad for parameter in recovery.model.parameters())
    assert not any(parameter.requires_grad for parameter in recovery.dense.parameters())
    if metric == "plain":
        assert records[0]["before"] == pytest.approx(before[0], rel=1e-5)
        assert [record["after"] for record in records] == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_everything_in_the_blocks_is_trained_and_nothing_else(tmp_path: Path, family: str) -> None:
    recovery = recovery_of(tmp_path, family, look_ahead=True)
    before = weights_of(recovery.model)
    Block().repair(recovery)
    after = weights_of(recovery.model)
    prefix = find_blocks(recovery.model)[0]
    names = {name for name, _ in recovery.model.named_parameters()}
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    # A bias of all keys shifts all scores of a query alike: it has no effect and a gradient of rounding errors.
    inside = {name for name in names if name.startswith(prefix + ".")}
    assert changed <= inside
    assert inside - changed <= {name for name in inside if name.endswith("k_proj.B.bias")}
    assert {name.rpartition(".")[2] for name in changed} == ({"weight"} if family == "llama" else {"weight", "bias"})


def test_a_model_whose_blocks_reuse_keys_of_others_is_trained_from_the_embeddings(tmp_path: Path) -> None:
    recovery = recovery_of(tmp_path, gemma_with_shared_keys("gemma4_text"), windows=4, held_out=2, block_epochs=1)
    before = errors(recovery)
    Block().repair(recovery)
    assert all(new < old for new, old in zip(errors(recovery), before, strict=True))
    assert isinstance(recovery.report, Recorder)
    assert any("every pass starts at the embeddings" in fact for fact in recovery.report.facts)


def test_look_ahead_needs_blocks_that_run_apart(tmp_path: Path) -> None:
    recovery = recovery_of(tmp_path, gemma_with_shared_keys("gemma4_text"), windows=2, held_out=1, look_ahead=True)
    with pytest.raises(UnsupportedModelError, match="blocks of this model reuse") as raised:
        Block().repair(recovery)
    assert "--look-ahead" in str(raised.value.hint)


def test_half_precision_blocks_learn_through_float32_copies(tmp_path: Path) -> None:
    recovery = recovery_of(tmp_path, dtype=torch.bfloat16, block_metric="channels")
    before = errors(recovery)
    Block().repair(recovery)
    assert {parameter.dtype for parameter in recovery.model.parameters()} == {torch.bfloat16}
    assert all(new < old for new, old in zip(errors(recovery), before, strict=True))


def test_a_block_that_gets_worse_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(self: Any, index: int, name: str, *args: object) -> None:
        with torch.no_grad():
            for parameter in self.recovery.model.get_submodule(name).parameters():
                parameter.mul_(1.3 if index == 1 else 1)

    recovery = recovery_of(tmp_path)
    before = weights_of(recovery.model)
    monkeypatch.setattr(module._Training, "_fit", spoil)
    outcome = Block().repair(recovery)
    assert same(before, weights_of(recovery.model))
    record = outcome.details["blocks"][1]
    assert not record["kept"] and record["ratio"] == 1 and record["after"] > record["before"]
    assert outcome.notes[1] == "3 of 3 blocks taken back", "an error that stays the same is no reason to keep a change"


def test_a_block_without_error_is_left_alone(tmp_path: Path) -> None:
    recovery = recovery_of(tmp_path)
    recovery.model = tiny_model("llama").requires_grad_(False)
    before = weights_of(recovery.model)
    outcome = Block().repair(recovery)
    assert same(before, weights_of(recovery.model))
    assert outcome.details["blocks"] == [{"before": 0.0, "after": 0.0, "ratio": 1.0, "kept": True}] * 3


@pytest.mark.parametrize("rate", [10.0, 1e6])
def test_divergence_stops_with_advice(tmp_path: Path, rate: float) -> None:
    recovery = recovery_of(tmp_path, "gpt2", block_rate=rate)
    before = weights_of(recovery.model)
    with pytest.raises(NumericalError, match=r"training transformer\.h\.0: ") as raised:
        Block().repair(recovery)
    assert "--block-rate" in str(raised.value.hint)
    assert same(before, weights_of(recovery.model))


def test_a_broken_model_is_named(tmp_path: Path) -> None:
    recovery = recovery_of(tmp_path)
    recovery.model.get_submodule("model.layers.1.mlp.down_proj").weight[3, 5] = torch.nan
    with pytest.raises(NumericalError, match=r"outputs of model\.layers\.1 hold NaN"):
        Block().repair(recovery)


class _Killed(Exception):
    """Ends a run as a kill does."""


def _end_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """Let optimiser step number ``call`` raise ``error``."""
    real, calls = MasterOptimiser.step, []

    def step(self: Any, scale: float = 1.0) -> float:
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(self, scale)

    monkeypatch.setattr(MasterOptimiser, "step", step)


def _watch_inputs(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Return a list that will hold the inputs of every later block, on both texts."""
    real, seen = SideBySide.advance, []

    def advance(self: SideBySide, outputs: list[Any]) -> None:
        seen.append(outputs)
        real(self, outputs)

    monkeypatch.setattr(SideBySide, "advance", advance)
    return seen


@pytest.mark.parametrize(
    ("family", "more"),
    [("llama", {"block_metric": "full", "look_ahead": True}), ("gpt2", {"block_metric": "channels"})],
)
def test_a_resumed_run_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, more: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        inputs = _watch_inputs(patch)
        whole = recovery_of(tmp_path / "whole", family, **more)
        expected = Block().repair(whole)

    saved = MemorySaved(tmp_path / "saved")
    with monkeypatch.context() as patch:
        steps = 2 * -(-SETTINGS["windows"] // BATCH)
        _end_at(patch, steps + 4, _Killed())
        with pytest.raises(_Killed):
            Block().repair(recovery_of(tmp_path / "killed", family, saved=saved, **more))
    assert saved.finished == ["block-fisher", "block-000"]

    with monkeypatch.context() as patch:
        again = _watch_inputs(patch)
        patch.setattr(module, "block_fisher", None)  # is not read twice
        resumed = recovery_of(tmp_path / "resumed", family, saved=saved, **more)
        outcome = Block().repair(resumed)
    assert outcome == expected
    assert same(weights_of(whole.model), weights_of(resumed.model))
    assert saved.finished == whole.saved.finished  # type: ignore[attr-defined]
    assert all(same(stored(saved, name), stored(whole.saved, name)) for name in saved.finished)
    assert len(again) == len(inputs) == 4
    for one, other in zip(again, inputs, strict=True):
        assert all(torch.equal(hidden_states(a), hidden_states(b)) for a, b in zip(one, other, strict=True))


def test_an_interruption_keeps_the_finished_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 2 * -(-SETTINGS["windows"] // BATCH)
    recovery = recovery_of(tmp_path)
    recovery.keep_on_interrupt = True
    before = weights_of(recovery.model)
    _end_at(monkeypatch, 2 * steps + 3, KeyboardInterrupt())
    outcome = Block().repair(recovery)
    assert outcome.interrupted == "interrupted after block 2 of 3"
    assert len(outcome.details["blocks"]) == 2
    for name, tensor in recovery.model.state_dict().items():
        if name.startswith("model.layers.2."):
            assert torch.equal(tensor, before[name])
    assert not any(parameter.requires_grad for parameter in recovery.model.parameters())
    finished = stored(recovery.saved, "block-001")
    own = recovery.model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in finished.items())


def test_an_interruption_is_raised_if_nothing_is_to_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recovery = recovery_of(tmp_path)
    _end_at(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        Block().repair(recovery)


def test_the_order_of_batches_depends_on_seed_block_and_epoch() -> None:
    orders = [batch_order(20, *key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len(set(map(tuple, orders))) == len(orders)
    assert batch_order(20, 0, 1, 1) == orders[-1]


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fisher_information_against_autograd(family: str, answers: bool) -> None:
    model = tiny_model(family).requires_grad_(False)
    ids = torch.randint(4, 200, (3, 13), generator=torch.Generator().manual_seed(1))
    counted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.4 if answers else None
    text = RecoveryText(ids, counted)

    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    with keeping_outputs(find_blocks(model)[1]) as outputs:
        logits = model(inputs_embeds=embeddings, use_cache=False).logits
    targets = sampled_targets(logits, torch.Generator().manual_seed(5))[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    loss = losses.sum() if counted is None else losses[counted[:, 1:]].sum()
    gradients = torch.autograd.grad(loss, [hidden_states(output) for output in outputs])

    full = block_fisher(model, text, 3, full=True, seed=5)
    diagonal = block_fisher(model, text, 3, full=False, seed=5)
    for gradient, matrix, channels in zip(gradients, full, diagonal, strict=True):
        g = gradient.flatten(0, 1)
        torch.testing.assert_close(matrix, g.T @ g / len(g), rtol=1e-4, atol=1e-6 * float(matrix.abs().max()))
        torch.testing.assert_close(channels, g.square().mean(0), rtol=1e-4, atol=0)


def test_fisher_information_of_several_batches_counts_every_window_once() -> None:
    model = tiny_model("llama").requires_grad_(False)
    ids = torch.randint(4, 200, (5, 13), generator=torch.Generator().manual_seed(1))
    parts = block_fisher(model, RecoveryText(ids, torch.ones_like(ids, dtype=torch.bool)), 2, full=False)
    once = block_fisher(model, RecoveryText(ids), 2, full=False)
    assert all(torch.equal(one, other) for one, other in zip(parts, once, strict=True))
    counted = torch.zeros_like(ids, dtype=torch.bool)
    counted[3:] = True
    last = block_fisher(model, RecoveryText(ids, counted), 2, full=False)
    assert all((one > 0).all() and one.sum() < other.sum() for one, other in zip(last, once, strict=True))


def test_metrics_are_damped_quadratic_forms() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients, error = torch.randn(40, 7, generator=generator), torch.randn(3, 5, 7, generator=generator)
    fisher = gradients.T @ gradients / 40
    damping = DAMPING * float(fisher.diagonal().mean())
    torch.testing.assert_close(Metric()(error), error.square().sum(-1))
    expected = ((fisher.diagonal() + damping) * error.square()).sum(-1)
    torch.testing.assert_close(Metric(fisher.diagonal())(error), expected)
    expected = torch.einsum("bti,ij,btj->bt", error, fisher + damping * torch.eye(7), error)
    torch.testing.assert_close(Metric(fisher)(error), expected)
    for nothing in (torch.zeros(7), torch.zeros(7, 7)):
        torch.testing.assert_close(Metric(nothing)(error), error.square().sum(-1))


def _pair(recovery: Recovery, text: RecoveryText, ahead: bool) -> SideBySide:
    return SideBySide(recovery.dense, recovery.model, text, BATCH, Passes(independent=True), ahead)


@pytest.mark.parametrize("answers", [False, True])
def test_errors_of_a_block_and_of_the_next_dense_block(tmp_path: Path, answers: bool) -> None:
    recovery = recovery_of(tmp_path)
    ids = recovery.train.ids[:BATCH]
    counted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.4 if answers else None
    pair = _pair(recovery, RecoveryText(ids, counted), ahead=True)
    for index in range(2):
        pair.aim()
        if index == 0:
            pair.advance(pair.outputs())
    output = hidden_states(pair.run(0)).requires_grad_()
    forms = pair.forms(0, [Metric(), Metric()], output)

    # The whole dense model, with the output of block 1 replaced.
    blocks, targets = find_blocks(recovery.dense)[1], states(recovery.dense, ids)
    torch.testing.assert_close(output.detach(), states(recovery.model, ids)[1])
    replacing = blocks[1].register_forward_hook(lambda *call: output)
    with keeping_outputs(blocks[2:]) as outputs:
        recovery.dense(input_ids=ids, use_cache=False)
    replacing.remove()
    used = torch.ones_like(ids[:, 1:], dtype=torch.bool) if counted is None else counted[:, 1:]
    made = ((output, targets[1]), (hidden_states(outputs[0]), targets[2]))
    squares = [(state - target).square().sum(-1) for state, target in made]
    expected = [(value if counted is None else value[:, :-1][used]).sum() for value in squares]
    torch.testing.assert_close(forms, expected)

    gradients = [torch.autograd.grad(form, output, retain_graph=True)[0] for form in forms]
    directly = [torch.autograd.grad(form, output, retain_graph=True)[0] for form in expected]
    torch.testing.assert_close(gradients, directly, rtol=1e-4, atol=1e-5)
    assert float(gradients[1].norm()) > 0
    if answers:
        assert not gradients[0][:, :-1][~used].any() and gradients[0][:, :-1][used].any()


def test_look_ahead_trains_for_the_next_block(tmp_path: Path) -> None:
    """The error after the next dense block gets lower than by training for the block's own output alone."""
    after = {}
    for ahead in (False, True):
        recovery = recovery_of(tmp_path / str(ahead), look_ahead=ahead, block_epochs=8)
        Block().repair(recovery)
        pair = _pair(recovery, recovery.train, ahead=True)
        pair.aim()
        after[ahead] = pair.measure([Metric(), Metric()]).forms
    assert after[True][1] < after[False][1]
    assert after[True][0] > after[False][0]
