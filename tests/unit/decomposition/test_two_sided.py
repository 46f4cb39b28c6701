"""The two-sided decomposition against its definition, and the gradients that it is made from."""

from functools import partial

import pytest
import torch

from ara.calibration.gradients import GradientStats, RowAccumulator, _add_gradient, collect_gradients, gradient_bytes
from ara.calibration.moments import InputAccumulator, InputStats
from ara.decomposition.two_sided import TwoSided, TwoSidedOptions
from ara.distributed.sharing import share_of_windows
from ara.layouts.modeling_ara import separate_experts
from ara.models.blocks import BlockRunner
from ara.models.losses import token_losses
from ara.models.weights import find_linears
from tests.tiny import tiny_model


def _problem(m, n):
    generator = torch.Generator().manual_seed(m * 100 + n)
    weight = torch.randn(m, n, generator=generator)
    x = torch.randn(4 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)
    g = torch.randn(4 * m, m, generator=generator) @ torch.randn(m, m, generator=generator)
    return weight, InputStats(x.T @ x / len(x), x.abs().mean(0), len(x)), GradientStats(g.T @ g / len(g), len(g))


@pytest.mark.parametrize(("m", "n"), [(45, 27), (26, 43), (33, 33)])
def test_every_rank_is_the_best_in_the_weighted_norm(m, n):
    """Eckart-Young in the metrics H and G, by the textbook route: roots of both, SVD, inverses."""
    weight, stats, gradients = _problem(m, n)
    damping = 0.01
    factors = TwoSided(TwoSidedOptions(damping=damping)).decompose(weight, stats, gradients)
    outputs = gradients.second_moment.double()
    outputs = outputs + damping * outputs.diagonal().mean() * torch.eye(m, dtype=torch.float64)
    left, right = torch.linalg.cholesky(outputs), torch.linalg.cholesky(stats.second_moment.double())
    u, s, v = torch.linalg.svd(left.T @ weight.double() @ right, full_matrices=False)
    for k in (1, 7, 20):
        best = torch.linalg.inv(left.T) @ (u[:, :k] * s[:k]) @ v[:k] @ torch.linalg.inv(right)
        ours = factors.b[:, :k] @ factors.a[:k]
        torch.testing.assert_close(ours, best, rtol=0, atol=1e-6 * float(weight.abs().max()))
        error = (left.T @ (weight.double() - ours) @ right).square().sum()
        torch.testing.assert_close(error, factors.spectrum[k:].sum(), rtol=1e-6, atol=0)


def test_equal_outputs_give_the_whitened_factors():
    from ara.decomposition.whitened import Whitened

    weight, stats, _ = _problem(26, 43)
    flat = GradientStats(torch.eye(26), 100)
    two, one = TwoSided().decompose(weight, stats, flat), Whitened().decompose(weight, stats)
    torch.testing.assert_close(two.b[:, :9] @ two.a[:9], one.b[:, :9] @ one.a[:9], rtol=0, atol=1e-8)


def test_a_layer_that_no_gradient_reaches_is_whitened():
    weight, stats, _ = _problem(26, 43)
    factors = TwoSided().decompose(weight, stats, GradientStats(torch.zeros(26, 26), 100))
    torch.testing.assert_close(factors.b @ factors.a, weight.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_gradients_are_those_of_autograd(family):
    """Against torch's own gradients at the outputs, with the text as targets."""
    model = tiny_model(family).requires_grad_(False)
    linears = find_linears(model)
    windows = torch.randint(4, 200, (3, 11), generator=torch.Generator().manual_seed(1))
    found = collect_gradients(BlockRunner(model, windows, 2), linears, targets="text")
    expected = {spec.name: torch.zeros(spec.m, spec.m) for spec in linears}
    kept = {}
    handles = [
        model.get_submodule(spec.name).register_forward_hook(
            lambda module, args, out, name=spec.name: kept.__setitem__(name, out)
        )
        for spec in linears
    ]
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    for window in windows:
        ids = window[None]
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        for name, gradient in zip(kept, torch.autograd.grad(loss, list(kept.values())), strict=True):
            flat = gradient.reshape(-1, gradient.shape[-1])
            expected[name] += flat.T @ flat / windows.numel()
    for handle in handles:
        handle.remove()
    for spec in linears:
        torch.testing.assert_close(found[spec.name].second_moment, expected[spec.name], rtol=1e-4, atol=1e-6)
        assert found[spec.name].tokens == windows.numel()


def test_a_later_block_alone_gives_the_same_gradients():
    model = tiny_model("llama").requires_grad_(False)
    linears = find_linears(model)
    windows = torch.randint(4, 200, (3, 11), generator=torch.Generator().manual_seed(1))
    whole = collect_gradients(BlockRunner(model, windows, 2), linears, targets="text")
    late = [spec for spec in linears if spec.layer == 2]
    for name, stats in collect_gradients(BlockRunner(model, windows, 2), late, targets="text").items():
        torch.testing.assert_close(stats.second_moment, whole[name].second_moment, rtol=1e-4, atol=1e-8)


def test_drawn_targets_are_the_same_for_the_same_seed():
    model = tiny_model("llama").requires_grad_(False)
    linears = find_linears(model)[:2]
    windows = torch.randint(4, 200, (3, 11), generator=torch.Generator().manual_seed(1))
    first, again, other = (collect_gradients(BlockRunner(model, windows, 2), linears, seed=seed) for seed in (3, 3, 4))
    name = linears[0].name
    assert torch.equal(first[name].second_moment, again[name].second_moment)
    assert not torch.equal(first[name].second_moment, other[name].second_moment)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_that_share_windows_draw_the_targets_of_one(size):
    """The shares add up to the whole; with other targets they would be far from it."""
    model = tiny_model("llama").requires_grad_(False)
    linears = find_linears(model)
    windows = torch.randint(4, 200, (7, 13), generator=torch.Generator().manual_seed(1))
    whole = collect_gradients(BlockRunner(model, windows, 2), linears, seed=3)
    sums = {name: torch.zeros_like(stats.second_moment) for name, stats in whole.items()}
    for rank in range(size):
        rows = share_of_windows(7, 2, rank, size)
        part = collect_gradients(BlockRunner(model, windows[rows], 2), linears, seed=3, rows=rows.tolist())
        for name, stats in part.items():
            sums[name] += stats.second_moment * (len(rows) / 7)
    for name, stats in whole.items():
        torch.testing.assert_close(sums[name], stats.second_moment, rtol=1e-4, atol=1e-5 * float(sums[name].max()))


def test_diagonal_output_metric_is_the_same_as_a_diagonal_matrix():
    for m, n in ((45, 27), (26, 43)):
        weight, stats, gradients = _problem(m, n)
        energies = gradients.second_moment.diagonal()
        whole = TwoSided().decompose(weight, stats, GradientStats(energies.diag(), 100))
        diagonal = TwoSided().decompose(weight, stats, GradientStats(energies, 100))
        torch.testing.assert_close(diagonal.spectrum, whole.spectrum)
        for k in (3, 20):
            ours, expected = (found.b[:, :k] @ found.a[:k] for found in (diagonal, whole))
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-8 * float(weight.abs().max()))
    weight, stats, _ = _problem(45, 27)
    none = TwoSided().decompose(weight, stats, GradientStats(torch.zeros(45), 100))
    torch.testing.assert_close(none.b @ none.a, weight.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_gradients_at_a_layer_of_all_experts(family):
    """Zero at the outputs of experts that a token does not have; of the same unit as for separate experts."""
    ids = torch.arange(3, 3 + 4 * 12).view(4, 12)
    model = separate_experts(tiny_model(family)).eval().requires_grad_(False)
    separate = [spec for spec in find_linears(model) if spec.kind.endswith("gate_up_proj")]
    # Raw sums: no expert is shrunk towards the others.
    found = {}
    for spec in separate:
        sums = InputAccumulator(spec.m, torch.device("cpu"))
        with spec.weight.on_output(model, partial(_add_gradient, sums)), torch.enable_grad():
            _loss(model, ids).backward()
        found[spec.name] = sums.gram.diagonal() / ids.numel()
    shared = separate_experts(tiny_model(family), shared=True).eval().requires_grad_(False)
    for spec in (spec for spec in find_linears(shared) if spec.experts > 1):
        sums = RowAccumulator(spec.m, torch.device("cpu"))
        with spec.weight.on_output(shared, partial(_add_gradient, sums)), torch.enable_grad():
            _loss(shared, ids).backward()
        expected = torch.cat([found[f"{spec.name}.{expert}"] for expert in range(5)])
        torch.testing.assert_close(sums.result().second_moment, expected, rtol=1e-4, atol=1e-8)
        assert gradient_bytes(spec) == 4 * spec.m


def _loss(model, ids):
    embedded = model.get_input_embeddings()(ids).requires_grad_(True)
    return token_losses(model(inputs_embeds=embedded, use_cache=False).logits, ids).sum()
