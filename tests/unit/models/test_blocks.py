"""Passes through some blocks against whole passes, bit for bit; which blocks run; what is left behind."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ara.calibration.gradients import GradientStats, collect_gradients
from ara.calibration.moments import InputStats, collect_moments, shared_inputs
from ara.errors import DiskFullError
from ara.models import kept, recompute
from ara.models.blocks import BlockRunner, independent_starts, keeping_outputs, starting_at
from ara.models.forwards import ending_before_head
from ara.models.scores import ChunkLoss
from ara.models.weights import find_blocks, find_linears
from ara.progress import SilentReporter
from tests.recorder import Recorder
from tests.tiny import FAMILIES, gemma_with_shared_keys, tiny_model

WIDTH = 22
BATCHES = 3


def _windows(count: int = 5, length: int = 11) -> torch.Tensor:
    return torch.randint(4, 50, (count, length), generator=torch.Generator().manual_seed(0))


class _Block(nn.Module):
    """Adds a function of all tokens before."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 31)
        self.down = nn.Linear(31, WIDTH)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.down(torch.tanh(self.up(x).cumsum(1)))


class _InATuple(_Block):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


class _WithASecondOutput(_Block):
    """Gradients flow through the second output as well."""

    def forward(self, x: torch.Tensor, total: torch.Tensor | float) -> Any:  # type: ignore[override]
        return super().forward(x), total + torch.tanh(x)


class _Leaving(_Block):
    """Leaves something in its module."""

    def forward(self, x: torch.Tensor) -> Any:
        self.left = super().forward(x)
        return self.left


class _Model(nn.Module):
    """Four blocks in order; subclasses do something else."""

    block: type[_Block] = _Block

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(self.block(generator) for _ in range(4))
        self.head = nn.Linear(WIDTH, 50)
        nn.init.normal_(self.embed.weight, generator=generator)
        nn.init.normal_(self.head.weight, std=0.3, generator=generator)
        self.eval().requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.body(self.embed(input_ids))))

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Tuples(_Model):
    """Blocks return tuples."""

    block = _InATuple

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)[0]
        return x


class _BetweenBlocks(_Model):
    """The model itself does something between its blocks."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        embedded = x
        for block in self.blocks:
            x = block(x * 0.9 + 0.1 * embedded)
        return x


class _SecondOutputs(_Model):
    """Blocks hand on two tensors."""

    block = _WithASecondOutput

    def body(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor | float = 0.0
        for block in self.blocks:
            x, total = block(x, total)
        return x + total


class _Left(_Model):
    """The last block reads what the first one has left in its module."""

    block = _Leaving

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[:-1]:
            x = block(x)
        last: torch.Tensor = self.blocks[-1](x + self.blocks[0].left)
        return last


class _Skip(_Model):
    """The last block also reads the output of the first."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [x]
        for block in self.blocks[:-1]:
            outputs.append(block(outputs[-1]))
        last: torch.Tensor = self.blocks[-1](outputs[-1] + outputs[1])
        return last


class _Backwards(_Model):
    """Blocks run in another order than that of the list."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x


class _Twice(_Model):
    """All blocks run twice."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return super().body(super().body(x))


def _counted(model: nn.Module) -> Counter[int]:
    """Count how often blocks run, inside: what stands in for a block never gets there."""
    runs: Counter[int] = Counter()
    for index, block in enumerate(find_blocks(model)[1]):
        next(m for m in block.modules() if isinstance(m, nn.Linear)).register_forward_pre_hook(
            lambda *_, index=index: runs.update([index])
        )
    return runs


def _read(
    model: nn.Module,
    groups: list[tuple[int, ...]],
    starts: dict[int, int] | None,
    report: Any = None,
    folder: Path | None = None,
) -> tuple[dict[str, InputStats], dict[str, GradientStats]]:
    """Read inputs and gradients of all layers, one group of blocks after the other."""
    model.requires_grad_(False)
    windows, linears = _windows(), find_linears(model)
    owners = shared_inputs(model, linears, windows[:1])
    report = report or SilentReporter()
    forward, backward = (BlockRunner(model, windows, 2, starts, report, folder) for _ in range(2))
    inputs: dict[str, InputStats] = {}
    gradients: dict[str, GradientStats] = {}
    for group in groups:
        some = [spec for spec in linears if spec.layer in group]
        inputs |= collect_moments(forward, some, owners)
        gradients |= collect_gradients(backward, some, seed=3)
    return inputs, gradients


def _assert_same(
    found: tuple[dict[str, InputStats], dict[str, GradientStats]],
    expected: tuple[dict[str, InputStats], dict[str, GradientStats]],
) -> None:
    for some, others in zip(found, expected, strict=True):
        assert set(some) == set(others) and some
        for name, stats in others.items():
            assert torch.equal(some[name].second_moment, stats.second_moment), name
            assert some[name].tokens == stats.tokens >= _windows().numel()
        assert any(stats.second_moment.any() for stats in others.values())


# -- where passes may start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_may_start_at_every_block_of_the_families(family: str) -> None:
    assert independent_starts(tiny_model(family), _windows(1), [1, 2]) == {1: 11 * 60 * 4, 2: 11 * 60 * 4}


@pytest.mark.parametrize("kind", [_Model, _Tuples, _BetweenBlocks])
def test_passes_may_start_at_independent_blocks(kind: type[_Model]) -> None:
    assert independent_starts(kind(), _windows(1), [1, 2, 3]) == dict.fromkeys((1, 2, 3), 11 * WIDTH * 4)


@pytest.mark.parametrize("kind", [_Left, _Skip, _Backwards, _Twice])
def test_passes_may_not_start_where_blocks_see_more(kind: type[_Model]) -> None:
    model = kind()
    assert independent_starts(model, _windows(1), [1, 2, 3]) == {}
    assert independent_starts(model, _windows(1), [2]) == {}


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_passes_may_not_start_where_blocks_reuse_keys_and_values(kind: str) -> None:
    model = gemma_with_shared_keys(kind)
    assert independent_starts(model, _windows(1), [2]) == {}
    _assert_same(_read(model, [(0, 1), (2, 3)], {}), _read(model, [(0, 1, 2, 3)], None))


def test_running_out_of_memory_is_not_taken_for_a_dependence(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(BlockRunner, "_run", run)
    with pytest.raises(MemoryError):
        independent_starts(_Model(), _windows(1), [1])


def test_without_starts_nothing_runs() -> None:
    model = _Model()
    runs = _counted(model)
    assert independent_starts(model, _windows(1), []) == {}
    assert not runs


# -- the same bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("groups", [[(0,), (1,), (2,)], [(0, 1), (2,)], [(1,), (2,)]], ids=str)
def test_groups_of_blocks_give_the_bits_of_whole_passes(family: str, groups: list[tuple[int, ...]]) -> None:
    model = tiny_model(family)
    starts = independent_starts(model, _windows(1), [group[-1] + 1 for group in groups[:-1]])
    assert len(starts) == len(groups) - 1
    _assert_same(_read(model, groups, starts), _read(model, [sum(groups, ())], None))


@pytest.mark.parametrize("kind", [_Tuples, _BetweenBlocks, _SecondOutputs])
def test_odd_models_give_the_bits_of_whole_passes(kind: type[_Model]) -> None:
    model = kind()
    starts = independent_starts(model, _windows(1), [1, 2, 3])
    assert set(starts) == {1, 2, 3}
    _assert_same(_read(model, [(0,), (1,), (2,), (3,)], starts), _read(model, [(0, 1, 2, 3)], None))


@pytest.mark.parametrize("room", [0, 1, 2, 3, 6])
def test_what_does_not_fit_into_memory_is_run_again(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory holds only ``room`` block outputs, each over all windows."""
    model = _Model()
    starts = independent_starts(model, _windows(1), [1, 2, 3])
    expected = _read(model, [(0, 1, 2, 3)], None)
    monkeypatch.setattr(kept, "available_bytes", lambda device: kept._SHARE * room * 5 * 11 * WIDTH * 4)
    report = Recorder()
    _assert_same(_read(model, [(0,), (1,), (2,), (3,)], starts, report), expected)
    assert len(report.facts) == {0: 2, 6: 0}.get(room, 1)
    assert all("do not fit into memory" in fact for fact in report.facts)


@pytest.mark.parametrize("kind", [_Model, _Tuples, _BetweenBlocks])
def test_what_does_not_fit_into_memory_is_kept_in_files(
    kind: type[_Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits are the same, no block runs again, and no file is left."""
    model = kind()
    starts = independent_starts(model, _windows(1), [1, 2, 3])
    groups = [(0,), (1,), (2,), (3,)]
    runs = _counted(model)
    expected = _read(model, groups, starts)
    often = dict(runs)
    runs.clear()
    monkeypatch.setattr(kept, "available_bytes", lambda device: 0)
    report = Recorder()
    _assert_same(_read(model, groups, starts, report, tmp_path / "outputs"), expected)
    assert runs == often
    assert len(report.facts) == 2 and all(f"kept in {tmp_path / 'outputs'}" in fact for fact in report.facts)
    assert not list((tmp_path / "outputs").iterdir())


def test_a_full_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = _Model()
    starts = independent_starts(model, _windows(1), [1])
    monkeypatch.setattr(kept, "available_bytes", lambda device: 0)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(DiskFullError):
        _read(model, [(0,), (1, 2, 3)], starts, None, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_give_the_same_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    starts = independent_starts(model, _windows(1), [1, 2])
    groups = [(0,), (1,), (2,)]
    expected = _read(model, groups, starts)
    monkeypatch.setattr(recompute, "available_bytes", lambda device: 0)
    report = Recorder()
    _assert_same(_read(model, groups, starts, report), expected)
    assert len(report.facts) == 1 and "computed again" in report.facts[0]


# -- which blocks run -------------------------------------------------------------------------------------------


def test_no_block_runs_twice_over_the_inputs() -> None:
    model = _Model()
    linears = find_linears(model)
    owners = shared_inputs(model, linears, _windows(1))
    runner = BlockRunner(model, _windows(), 2, independent_starts(model, _windows(1), [1, 2, 3]))
    runs = _counted(model)
    for layer in range(4):
        collect_moments(runner, [spec for spec in linears if spec.layer == layer], owners)
        assert runs == dict.fromkeys(range(layer + 1), BATCHES)


def test_the_backward_pass_recomputes_each_block_once() -> None:
    model = _Model()
    linears = find_linears(model)
    runner = BlockRunner(model, _windows(), 2, independent_starts(model, _windows(1), [1, 2, 3]))
    runs = _counted(model)
    for layer in range(4):
        collect_gradients(runner, [spec for spec in linears if spec.layer == layer])
        # The first group runs the whole model.
        expected = {block: BATCHES * (1 + (0 < block <= layer)) for block in range(4)}
        expected[0] += 1  # measures how much memory its activations take
        assert runs == expected


def test_an_earlier_block_than_the_kept_ones_is_run_from_the_embeddings() -> None:
    model = _Model()
    runner = BlockRunner(model, _windows(), 2, independent_starts(model, _windows(1), [1, 2, 3]))
    runner.forward(0, 2, lambda _: None)
    runs = _counted(model)
    runner.forward(1, 1, lambda _: None)
    assert runs == {0: BATCHES, 1: BATCHES}


# -- what is left behind ----------------------------------------------------------------------------------------


def _loss(ids: torch.Tensor) -> ChunkLoss:
    return lambda logits, place: place.of(logits.square().sum(-1))


@pytest.mark.parametrize("failing", [False, True])
def test_no_hook_and_no_stand_in_is_left_behind(failing: bool) -> None:
    model = _Model()
    starts = independent_starts(model, _windows(1), [1, 2])
    runner = BlockRunner(model, _windows(), 2, starts)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for first, last in ((0, 0), (1, 1), (2, 3)):
        runner.forward(first, last, lambda _: None)
        runner.backward(first, last, _loss, lambda _: None)
    if failing:
        for run in (
            lambda: runner.forward(2, 3, fail),
            lambda: runner.backward(2, 3, _loss, fail),
        ):
            with pytest.raises(KeyboardInterrupt):
                run()
    for block in find_blocks(model)[1]:
        assert "forward" not in vars(block)
        assert not block._forward_hooks and not block._forward_pre_hooks


def test_a_block_that_is_handed_on_may_have_its_own_forward() -> None:
    model = _Model()
    own = model.blocks[0].forward
    vars(model.blocks[0])["forward"] = own
    with keeping_outputs(model.blocks) as outputs:
        logits = model(_windows(2)).logits
    assert len(outputs) == 4
    with starting_at(list(model.blocks), 2, outputs[1]):
        assert torch.equal(model(_windows(2)).logits, logits)
        assert torch.equal(model(_windows(2).flip(1)).logits, logits), "the ids do not matter any more"
    assert vars(model.blocks[0])["forward"] is own and "forward" not in vars(model.blocks[1])


def test_passes_that_look_for_starts_and_inputs_make_no_logits() -> None:
    model, calls = tiny_model("llama"), []
    ids = _windows(1)
    linears = find_linears(model)
    with model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1)):
        assert independent_starts(model, ids, [1])
        owners = shared_inputs(model, linears, ids)
        assert not calls
        with ending_before_head(model):
            model(input_ids=ids)
        assert not calls
        model(input_ids=ids)
    assert calls and set(owners) == {spec.name for spec in linears}
