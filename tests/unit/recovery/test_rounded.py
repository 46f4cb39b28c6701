"""Trainable scales: against the stored layer, against plain autograd, and what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ara.layout_names import LayoutName
from ara.layouts import modeling_ara
from ara.layouts.grid import Bits, Grid
from ara.layouts.modeling_ara import LowRankLinear, RoundedLinear, RoundedMatrix, unpacked
from ara.models.weights import WeightRef
from ara.quantisation.nearest import round_to_nearest
from ara.quantisation.sequential import matrices_of
from ara.quantisation.storing import numbers_of, put_in
from ara.recovery import rounded as module
from ara.recovery.base import Recovery
from ara.recovery.optimiser import MasterOptimiser, Stored, rate_at
from ara.recovery.rounded import ScaledLinear, from_scaled, stored_parameters, to_scaled
from ara.recovery.trainable import from_trainable
from tests.recovery import tiny_recovery

CASES = [(bits, zero_points) for bits in (4, 8) for zero_points in (True, False)]
M, N, BLOCK = 7, 41, 16


def layer_of(bits: Bits, zero_points: bool, seed: int = 0) -> RoundedLinear:
    """Return a rounded layer whose rows do not fill their blocks, with a bias."""
    generator = torch.Generator().manual_seed(seed)
    layer = RoundedLinear(N, M, bits, BLOCK, zero_points, bias=True)
    found = numbers_of(round_to_nearest(torch.randn(M, N, generator=generator), Grid(bits, BLOCK, zero_points)))
    assert not layer.load_state_dict(found, strict=False, assign=True).unexpected_keys
    layer.bias = nn.Parameter(torch.randn(M, generator=generator))
    return layer


def offsets_of(layer: RoundedLinear) -> torch.Tensor:
    """Return q − z (m, blocks, block) of all weights, the padding included."""
    q = unpacked(layer.steps, layer.bits).unflatten(-1, (-1, BLOCK)).float()
    if layer.zeros is None:
        return q - 2 ** (layer.bits - 1)
    return q - unpacked(layer.zeros, layer.bits)[:, : layer.scales.shape[1], None]


@pytest.mark.parametrize(("bits", "zero_points"), CASES)
def test_it_computes_what_the_stored_layer_does(bits: Bits, zero_points: bool) -> None:
    layer = layer_of(bits, zero_points)
    scaled, x = ScaledLinear(layer), torch.randn(3, 5, N)
    assert torch.equal(scaled(x), layer(x))
    again = scaled.stored()
    assert again.steps is layer.steps and again.zeros is layer.zeros and torch.equal(again.scales, layer.scales)
    assert again.scales.dtype == torch.float16 and not isinstance(again, ScaledLinear)


@pytest.mark.parametrize(("bits", "zero_points"), CASES)
@pytest.mark.parametrize("rows", [4096, 3])
def test_gradients_are_those_of_the_formula(
    bits: Bits, zero_points: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROWS", rows)
    monkeypatch.setattr(modeling_ara, "_ROWS", rows)
    layer = layer_of(bits, zero_points)
    scaled = ScaledLinear(layer).requires_grad_(True)
    x, scales = torch.randn(3, 5, N, requires_grad=True), layer.scales.float().requires_grad_(True)
    goal = torch.randn(3, 5, M)
    (scaled(x) * goal).sum().backward()
    assert scaled.bias is not None and scaled.scales.grad is not None and x.grad is not None
    given, x.grad = x.grad, None
    weight = (offsets_of(layer) * scales[..., None]).flatten(1)[:, :N]
    bias = scaled.bias.detach().clone().requires_grad_(True)
    (nn.functional.linear(x, weight, bias) * goal).sum().backward()
    torch.testing.assert_close(given, x.grad)
    torch.testing.assert_close(scaled.scales.grad, scales.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scaled.bias.grad, bias.grad)


def test_only_packed_numbers_and_the_weight_are_kept_for_the_backward_pass() -> None:
    scaled, x = ScaledLinear(layer_of(4, True)).requires_grad_(True), torch.randn(5, N)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        scaled(x)
    shapes = {tuple(one.shape) for one in kept}
    assert shapes <= {(5, N), (M, N), (N, M)} and len(kept) <= 2


def test_a_step_of_the_rate_moves_weights_by_the_rate() -> None:
    for bits in (4, 8):
        scaled = ScaledLinear(layer_of(bits, True))
        before, rate, stored = scaled.dense(torch.float32), 1e-3, Stored(torch.float32, scaled.pace())
        adam = MasterOptimiser({"scales": scaled.scales}, 1, rate, {"scales": stored})
        scaled.scales.grad = torch.randn(scaled.scales.shape)
        adam.step()
        moved = (scaled.dense(torch.float32) - before).square().mean().sqrt()
        assert float(moved) == pytest.approx(rate_at(0, 1, rate), rel=1e-3)


def test_the_pace_of_a_zero_matrix_is_one() -> None:
    layer = RoundedLinear(N, M, 4, BLOCK, False, bias=False)
    layer.steps.fill_(0x88)
    assert ScaledLinear(layer).pace() == 1.0


def test_parameters_always_hold_what_will_be_stored_and_small_steps_add_up() -> None:
    scales = nn.Parameter(torch.full((3, 5), 0.0123).half().float())
    start = scales.detach().clone()
    adam = MasterOptimiser({"s": scales}, 200, 1e-6, {"s": Stored(torch.float16)})
    for _ in range(60):
        scales.grad = torch.ones_like(scales)
        adam.step()
        assert scales.dtype == torch.float32 and torch.equal(scales, scales.half().float())
    # One step is a sixth of what float16 resolves there.
    assert bool((scales < start).all())
    state = {name: tensor.clone() for name, tensor in adam.state().items()}
    resumed = nn.Parameter(start.clone())
    again = MasterOptimiser({"s": resumed}, 200, 1e-6, {"s": Stored(torch.float16)})
    again.restore(state, 60)
    assert torch.equal(resumed, scales)
    for optimiser, one in ((adam, scales), (again, resumed)):
        one.grad = torch.ones_like(one)
        optimiser.step()
    assert torch.equal(resumed, scales) and torch.equal(again.state()["weight:s"], adam.state()["weight:s"])


def rounded_model(folder: Path, layout: LayoutName) -> tuple[Recovery, dict[str, RoundedMatrix]]:
    """Return a tiny llama with low-rank layers; all matrices but those of the last block are rounded."""
    recovery = tiny_recovery(folder)
    model = recovery.model
    from_trainable(model, layout, torch.float32)
    grid, found = Grid(4, 16, True), dict[str, RoundedMatrix]()
    for spec in recovery.specs:
        for path in matrices_of(model, spec) if spec.layer < 2 else []:
            weight = WeightRef(path).read(model)
            found |= put_in(model, path, numbers_of(round_to_nearest(weight, grid)), grid)
    return recovery, found


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_a_model_goes_there_and_back(layout: LayoutName, tmp_path: Path) -> None:
    recovery, rounded = rounded_model(tmp_path, layout)
    model, specs = recovery.model, recovery.specs
    for layer in (spec.weight.owner(model) for spec in specs if spec.layer == 2 and layout == "factors"):
        if isinstance(layer, LowRankLinear):
            layer.A.weight.mul_(3)
            layer.B.weight.div_(3)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        to_scaled(model, rounded, layout)
        after = model(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    names = {name for name, one in model.named_modules() if isinstance(one, ScaledLinear)}
    assert names == set(rounded)
    parameters = dict(model.named_parameters())
    assert all(f"{name}.scales" in parameters and f"{name}.weight" not in parameters for name in names)
    for spec in specs:
        layer = spec.weight.owner(model)
        if isinstance(layer, LowRankLinear) and spec.layer == 2:
            # Not rounded, so the two factors are balanced.
            torch.testing.assert_close(layer.A.weight @ layer.A.weight.T, layer.B.weight.T @ layer.B.weight)
    stored = stored_parameters(model, torch.bfloat16, rounded)
    assert set(stored) == set(parameters)
    for name, value in parameters.items():
        kind = torch.float16 if name.endswith(".scales") else torch.bfloat16
        assert stored[name].dtype == kind and torch.equal(value, value.to(kind).to(value.dtype)), name
    numbers = from_scaled(model, rounded)
    assert list(numbers) == list(rounded) and not any(isinstance(one, ScaledLinear) for one in model.modules())
    for name, one in numbers.items():
        assert type(one) is RoundedLinear and model.get_submodule(name) is one
        for key in ("steps", "zeros", "scales"):
            assert torch.equal(getattr(one, key), getattr(rounded[name], key))
