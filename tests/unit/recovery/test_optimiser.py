"""AdamW and Muon with master copies: against torch's own, resumed, and in half precision."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ara.errors import NumericalError
from ara.recovery.muon import Float32Muon
from ara.recovery.optimiser import CLIP, MasterOptimiser, Method, Stored, rate_at, trained

STEPS = 20


def gradients(step: int, shape: tuple[int, ...] = (3, 5)) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step)) * (0.01 + step)


def parameter(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(3, 5, generator=torch.Generator().manual_seed(99)).to(dtype))


def step(adam: MasterOptimiser, of: nn.Parameter, number: int) -> float:
    of.grad = gradients(number).to(of.dtype)
    return adam.step()


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [rate_at(step, STEPS, 1.0) for step in range(STEPS)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert all(later <= earlier for earlier, later in pairwise(rates[1:]))
    assert 0.1 < rates[-1] < 0.12
    assert rate_at(0, 1, 1.0) == 1.0


def test_steps_are_those_of_torch_with_clipped_gradients() -> None:
    ours, theirs = parameter(), parameter()
    adam = MasterOptimiser({"w": ours}, STEPS, 0.01)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for number in range(5):
        norm = step(adam, ours, number)
        theirs.grad = gradients(number)
        assert norm == pytest.approx(float(theirs.grad.norm()), rel=1e-5)
        torch.nn.utils.clip_grad_norm_([theirs], CLIP)
        reference.param_groups[0]["lr"] = rate_at(number, STEPS, 0.01)
        reference.step()
        torch.testing.assert_close(ours, theirs)
    assert ours.grad is None


def test_matrices_move_along_all_directions_at_the_rate() -> None:
    """Muon's step is near U Vᵀ, scaled to the root mean square that the rate gives; vectors and scales have AdamW."""
    ours, vector, scales = parameter(), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3, 5))
    stored = {"s": Stored(torch.float32, linear=False)}
    muon = MasterOptimiser({"w": ours, "v": vector, "s": scales}, 1, 0.01, stored, "muon")
    before, gradient = ours.detach().clone(), gradients(0)
    ours.grad, vector.grad, scales.grad = gradient, torch.ones(5), gradient.clone()
    muon.step()
    change = (before - ours.detach()) / 0.01
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    singular = torch.linalg.svdvals(change)
    assert float(change.square().mean().sqrt()) == pytest.approx(1.0, abs=0.3)
    assert float(singular.min()) > 0.5 * float(singular.max())
    assert float((change * (u @ vt)).sum() / (change.norm() * (u @ vt).norm())) > 0.95
    torch.testing.assert_close(vector.detach(), torch.full((5,), -0.01))
    torch.testing.assert_close(scales.detach(), -0.01 * gradient.sign())


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_muon_in_float32_steps_as_torchs_does_in_bfloat16(shape: tuple[int, int]) -> None:
    """They differ by the roundings of the iteration alone, and hold the same state."""
    settings: dict[str, Any] = {"lr": 0.01, "momentum": 0.95, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one, other = Float32Muon([ours], **settings), torch.optim.Muon([theirs], **settings)
    for number in range(4):
        ours.grad = torch.randn(shape, generator=torch.Generator().manual_seed(number + 2))
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
    change, expected = ours.detach() - start, theirs.detach() - start
    assert float((change - expected).norm() / expected.norm()) < 0.03
    assert torch.equal(one.state[ours]["momentum_buffer"], other.state[theirs]["momentum_buffer"])


def test_float32_runs_have_no_bfloat16_in_their_steps() -> None:
    seen: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            seen.extend(one.dtype for one in (found,) if isinstance(one, torch.Tensor))
            return found

    ours = parameter()
    muon = MasterOptimiser({"w": ours}, STEPS, 0.01, method="muon")
    ours.grad = gradients(0)
    with Watch():
        muon.step()
    assert torch.bfloat16 not in seen and torch.float32 in seen


@pytest.mark.parametrize("method", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimiser_continues_with_the_same_bits(dtype: torch.dtype, method: Method) -> None:
    whole = parameter(dtype)
    adam = MasterOptimiser({"w": whole}, STEPS, 0.01, method=method)
    for number in range(4):
        step(adam, whole, number)
    stored = {name: tensor.clone() for name, tensor in adam.state().items()}
    for number in range(4, 8):
        step(adam, whole, number)
    resumed = parameter(dtype)
    again = MasterOptimiser({"w": resumed}, STEPS, 0.01, method=method)
    again.restore(stored, 4)
    for number in range(4, 8):
        step(again, resumed, number)
    assert torch.equal(whole, resumed)
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in adam.state().items())


def test_masters_collect_steps_that_bfloat16_would_lose() -> None:
    low = nn.Parameter(torch.ones(3, 5, dtype=torch.bfloat16))
    adam = MasterOptimiser({"w": low}, 1000, 1e-4)
    for _ in range(200):
        low.grad = torch.ones_like(low)
        adam.step()
    assert float(adam.state()["weight:w"].mean()) == pytest.approx(float(low.detach().float().mean()), abs=4e-3)
    assert float(low.detach().float().mean()) < 0.99


def test_accumulated_gradients_are_scaled() -> None:
    one, other = parameter(), parameter()
    adams = [MasterOptimiser({"w": each}, STEPS, 0.01) for each in (one, other)]
    one.grad, other.grad = gradients(0), 4 * gradients(0)
    assert adams[0].step() == pytest.approx(adams[1].step(0.25))
    torch.testing.assert_close(one, other)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    weight = parameter()
    adam = MasterOptimiser({"w": weight}, STEPS, 0.01)
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, torch.nan)
    with pytest.raises(NumericalError, match="norm nan") as caught:
        adam.step()
    assert "--rate" in str(caught.value.hint) and torch.equal(weight, before) and weight.grad is None


def test_a_state_of_another_shape_is_refused() -> None:
    adam = MasterOptimiser({"w": parameter()}, STEPS, 0.01)
    with pytest.raises(ValueError, match="no weight of w"):
        adam.restore({"weight:w": torch.zeros(2)}, 0)


def test_only_floating_point_parameters_are_trained() -> None:
    module = nn.Linear(3, 2).requires_grad_(False)
    module.register_parameter("steps", nn.Parameter(torch.zeros(2, dtype=torch.int32), requires_grad=False))
    assert sorted(trained(module.named_parameters())) == ["bias", "weight"]
    assert module.weight.requires_grad


def test_gradients_of_passes_add_up_in_float32() -> None:
    """In bfloat16, 1 + 2⁻¹⁰ is 1."""
    low = nn.Parameter(torch.ones(3, 5, dtype=torch.bfloat16))
    adam = MasterOptimiser({"w": low}, STEPS, 0.01)
    for value in (1.0, *[2.0**-10] * 512):
        low.grad = torch.full_like(low, value)
        adam.collect()
        assert low.grad is None
    assert adam.step() == pytest.approx(1.5 * 15**0.5)
