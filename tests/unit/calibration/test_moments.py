"""Streamed second moments: against a float64 sum over tokens, over all families, and without reaching the head."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from ara.calibration.moments import InputAccumulator, InputStats, collect_moments, shared_inputs
from ara.errors import NumericalError, UnsupportedModelError
from ara.layouts.modeling_ara import separate_experts
from ara.models.blocks import BlockRunner
from ara.models.weights import LinearSpec, find_blocks, find_linears
from tests.oracles import moments as oracle
from tests.tiny import FAMILIES, VOCABULARY, tiny_model

CPU = torch.device("cpu")


def _windows(count: int, length: int = 13, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (count, length), generator=generator)


# -- InputAccumulator -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 37, 255, 256, 257, 300, 520])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulator_equals_the_float64_sum(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    batches = [
        (torch.randn(*shape, width, generator=generator) * torch.linspace(0.01, 3, width)).to(dtype)
        for shape in ((3, 11), (1, 5), (2, 2, 4))
    ]
    sums = InputAccumulator(width, CPU)
    for batch in batches:
        sums.add(batch)
    stats = sums.result()
    inputs = torch.cat([batch.reshape(-1, width) for batch in batches]).double().numpy()
    gram, absolute = oracle.moments(inputs)
    assert stats.tokens == len(inputs) == 33 + 5 + 16
    assert stats.second_moment.dtype == stats.abs_mean.dtype == torch.float32
    np.testing.assert_allclose(stats.second_moment.double().numpy(), gram, rtol=0, atol=2e-6 * gram.max())
    np.testing.assert_allclose(stats.abs_mean.double().numpy(), absolute, rtol=2e-6)
    assert torch.equal(stats.second_moment, stats.second_moment.T)


def test_half_precision_inputs_are_summed_in_float32() -> None:
    """1000 tokens of 1.0: bfloat16 would stop counting at 256, float16 overflow at the square of 300."""
    sums = InputAccumulator(3, CPU)
    for _ in range(1000):
        sums.add(torch.ones(1, 3, dtype=torch.bfloat16))
    assert torch.equal(sums.gram.triu(), torch.full((3, 3), 1000.0).triu())
    sums = InputAccumulator(3, CPU)
    sums.add(torch.full((7, 3), 300.0, dtype=torch.float16))
    assert torch.equal(sums.result().second_moment, torch.full((3, 3), 90_000.0))


def test_nothing_added_is_zero_and_memory_is_told_right() -> None:
    sums = InputAccumulator(37, CPU)
    stats = sums.result()
    assert stats.tokens == 0 and not stats.second_moment.any() and not stats.abs_mean.any()
    assert InputAccumulator.bytes_for(37) == sum(t.numel() * t.element_size() for t in (sums.gram, sums.abs_sum))


# -- shared_inputs ----------------------------------------------------------------------------------------------

_GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "mistral": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "qwen2": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "qwen3": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gemma": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "phi": [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]],  # attention and MLP side by side
    "opt": [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt2": [["c_attn"], ["attn.c_proj"], ["c_fc"], ["mlp.c_proj"]],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_with_the_same_input_are_found(family: str) -> None:
    model = tiny_model(family)
    linears = find_linears(model)
    owners = shared_inputs(model, linears, _windows(1))
    assert set(owners) == {spec.name for spec in linears}
    groups: dict[str, set[str]] = {}
    for spec in linears:
        groups.setdefault(owners[spec.name], set()).add(spec.name)
    expected = [
        {next(s.name for s in linears if s.layer == layer and s.kind.endswith(end)) for end in ends}
        for layer in range(3)
        for ends in _GROUPS[family]
    ]
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, expected))
    assert all(leader in members for leader, members in groups.items())


def test_no_hook_is_left_behind() -> None:
    model = tiny_model("llama")
    linears = find_linears(model)
    windows = _windows(2)
    _collect(model, linears, windows, 1)
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks and not module._forward_hooks, name


def test_a_layer_that_is_never_called_is_named() -> None:
    model = tiny_model("llama")
    block = find_blocks(model)[1][1]
    block.mlp.unused = nn.Linear(60, 7)
    block.mlp.idle = nn.Linear(60, 7)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.unused and 1 more .*not called") as caught:
        shared_inputs(model, find_linears(model), _windows(1))
    assert "--exclude" in (caught.value.hint or "")


# -- collect_moments --------------------------------------------------------------------------------------------


def _collect(
    model: nn.Module, linears: Sequence[LinearSpec], windows: torch.Tensor, batch_size: int = 2
) -> dict[str, InputStats]:
    return collect_moments(BlockRunner(model, windows, batch_size), linears, shared_inputs(model, linears, windows[:1]))


def _inputs_seen(model: nn.Module, names: Sequence[str], windows: torch.Tensor) -> dict[str, np.ndarray]:
    """Record the inputs of layers over one forward pass of all windows, the head included."""
    seen: dict[str, np.ndarray] = {}

    def keep(name: str) -> object:
        return model.get_submodule(name).register_forward_pre_hook(
            lambda module, args: seen.update({name: args[0].reshape(-1, args[0].shape[-1]).double().numpy()})
        )

    handles = [keep(name) for name in names]
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    for handle in handles:
        handle.remove()  # type: ignore[attr-defined]
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_of_every_layer_equal_those_of_its_recorded_inputs(family: str) -> None:
    model = tiny_model(family)
    linears = find_linears(model)
    windows = _windows(5)
    owners = shared_inputs(model, linears, windows[:1])
    stats = collect_moments(BlockRunner(model, windows, 2), linears, owners)
    seen = _inputs_seen(model, [spec.name for spec in linears], windows)
    assert set(stats) == set(owners.values())
    for spec in linears:
        ours = stats[owners[spec.name]]
        gram, absolute = oracle.moments(seen[spec.name])
        assert ours.tokens == windows.numel()
        assert ours.second_moment.shape == (spec.n, spec.n)
        np.testing.assert_allclose(ours.second_moment.numpy(), gram, rtol=0, atol=1e-4 * gram.max())
        np.testing.assert_allclose(ours.abs_mean.numpy(), absolute, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_pass_ends_before_the_head_and_later_blocks(family: str) -> None:
    model = tiny_model(family)
    linears = [spec for spec in find_linears(model) if spec.layer < 2]
    windows = _windows(2)
    owners = shared_inputs(model, linears, windows[:1])

    def refuse(*_: object) -> None:
        raise AssertionError("went too far")

    model.get_output_embeddings().register_forward_pre_hook(refuse)
    find_blocks(model)[1][2].register_forward_pre_hook(refuse)
    assert len(collect_moments(BlockRunner(model, windows, 2), linears, owners)) == len(set(owners.values()))


def test_collecting_in_chunks_equals_collecting_at_once() -> None:
    model = tiny_model("llama")
    linears = find_linears(model)
    windows = _windows(5)
    owners = shared_inputs(model, linears, windows[:1])
    whole = collect_moments(BlockRunner(model, windows, 2), linears, owners)
    parts: dict[str, InputStats] = {}
    for layers in ((0,), (1, 2)):
        part = collect_moments(BlockRunner(model, windows, 2), [s for s in linears if s.layer in layers], owners)
        assert not set(part) & set(parts)
        parts |= part
    assert set(parts) == set(whole)
    for name, stats in whole.items():
        assert torch.equal(parts[name].second_moment, stats.second_moment)
        assert torch.equal(parts[name].abs_mean, stats.abs_mean)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    model = tiny_model("qwen2")
    linears = find_linears(model)
    windows = _windows(5)
    once, batched = _collect(model, linears, windows, 2), _collect(model, linears, windows, batch_size)
    for name, stats in once.items():
        torch.testing.assert_close(batched[name].second_moment, stats.second_moment, rtol=1e-4, atol=1e-4)
        assert batched[name].tokens == stats.tokens == windows.numel()


def test_a_leader_that_is_left_out_does_not_take_its_group_with_it() -> None:
    model = tiny_model("llama")
    linears = find_linears(model, ["*.q_proj"])
    stats = _collect(model, linears, _windows(2))
    assert "model.layers.0.self_attn.k_proj" in stats
    assert len(stats) == 3 * 4


def test_a_bfloat16_model_gives_float32_moments() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    linears = find_linears(model)
    windows = _windows(3)
    stats = _collect(model, linears, windows, batch_size=3)
    name = "model.layers.2.mlp.down_proj"
    gram, _ = oracle.moments(_inputs_seen(model, [name], windows)[name])
    assert stats[name].second_moment.dtype == torch.float32
    np.testing.assert_allclose(stats[name].second_moment.numpy(), gram, rtol=0, atol=1e-5 * gram.max())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_are_refused_with_the_first_layer_that_sees_them(value: float) -> None:
    model = tiny_model("llama")
    linears = find_linears(model)
    owners = shared_inputs(model, linears, _windows(1))
    with torch.no_grad():
        find_blocks(model)[1][1].self_attn.o_proj.weight[3, 5] = value
    with pytest.raises(NumericalError, match=r"the inputs of model\.layers\.1\.mlp\.gate_proj hold NaN") as caught:
        collect_moments(BlockRunner(model, _windows(2), 2), linears, owners)
    assert "float32" in (caught.value.hint or "")


def test_progress_counts_the_windows() -> None:
    model = tiny_model("gpt2")
    linears = find_linears(model)
    steps: list[int] = []

    class Bar:
        def advance(self, amount: int = 1) -> None:
            steps.append(amount)

    class Report:
        @contextmanager
        def bar(self, title: str, total: int):  # type: ignore[no-untyped-def]
            assert (title, total) == ("Reading inputs of blocks 1 to 3", 5)
            yield Bar()

    windows = _windows(5)
    collect_moments(BlockRunner(model, windows, 2), linears, shared_inputs(model, linears, windows[:1]), Report())  # type: ignore[arg-type]
    assert steps == [2, 2, 1]


def test_experts_with_few_tokens_are_shrunk_towards_all_of_them() -> None:
    """G = (Σ x xᵀ + n Ḡ) / (t + n), and Ḡ for an expert that saw nothing."""
    model = separate_experts(tiny_model("mixtral"))
    linears = find_linears(model)
    pool = [spec for spec in linears if spec.layer == 1 and spec.kind == "mlp.experts.down_proj"]
    # One window: some experts see few tokens.
    ids = torch.arange(3, 3 + 9)[None]
    seen: dict[str, list[torch.Tensor]] = {spec.name: [] for spec in pool}
    hooks = [spec.weight.on_input(model, seen[spec.name].append) for spec in pool]
    owners = shared_inputs(model, linears, ids)
    for hook in hooks:
        hook.remove()
    found = collect_moments(BlockRunner(model, ids, 1), linears, owners)
    inputs = {name: torch.cat(xs).double() if xs else torch.zeros(0, 92).double() for name, xs in seen.items()}
    together = torch.cat(list(inputs.values()))
    assert len(together) == 2 * 9
    assert any(len(x) == 0 for x in inputs.values())
    mean = together.T @ together / len(together)
    for name, x in inputs.items():
        assert found[name].tokens == len(x)
        expected = (x.T @ x + 92 * mean) / (len(x) + 92)
        torch.testing.assert_close(found[name].second_moment.double(), expected, atol=1e-5, rtol=1e-4)
        shrunk = (x.abs().sum(0) + 92 * together.abs().mean(0)) / (len(x) + 92)
        torch.testing.assert_close(found[name].abs_mean.double(), shrunk, atol=1e-5, rtol=1e-4)
