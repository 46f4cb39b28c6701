"""The straight-through linear layer and the losses against autograd on the formulas that they stand for."""

import pytest
import torch
from torch import nn

from ara.layouts.modeling_ara import Sent
from ara.masks.linear import MaskedLinear
from ara.models.losses import sampled_targets, token_losses


@pytest.fixture
def layer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        linear = nn.Linear(7, 9).double().requires_grad_(False)
        u, s, v = torch.linalg.svd(linear.weight, full_matrices=False)
        return MaskedLinear(linear, linear.weight, s[:, None] * v, u)


def _inputs():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(2, 5, 9, generator=generator, dtype=torch.float64)


def _by_formula(layer, x, mask):
    """y = Σ_j p_j b_j (a_jᵀ x), as autograd differentiates it."""
    return ((x @ layer.a.T) * mask) @ layer.b.T + layer.bias


@pytest.mark.parametrize("rank", [1, 3, 7, None])
def test_hard_forward_and_the_gradient_of_every_component(layer, rank):
    x, g = _inputs()
    layer.rank, layer.mask = rank, torch.ones(7, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    (y * g).sum().backward()
    hard = (torch.arange(7) < (7 if rank is None else rank)).double().requires_grad_()
    again = x.detach().clone().requires_grad_()
    expected = _by_formula(layer, again, hard)
    (expected * g).sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, again.grad)
    # Straight through: the gradient of the components that were not computed as well.
    torch.testing.assert_close(layer.mask.grad.double(), hard.grad, rtol=1e-5, atol=1e-6)


def test_soft_forward_has_the_exact_gradient(layer):
    x, g = _inputs()
    mask = torch.linspace(1, 0.1, 7, dtype=torch.float64)
    layer.soft, layer.mask = True, mask.clone().requires_grad_()
    y = layer(x)
    (y * g).sum().backward()
    free, again = mask.clone().requires_grad_(), x.detach().clone().requires_grad_()
    expected = _by_formula(layer, again, free)
    (expected * g).sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, again.grad)
    torch.testing.assert_close(layer.mask.grad.double(), free.grad, rtol=1e-5, atol=1e-6)


def test_only_the_kept_components_are_computed(layer):
    layer.a[3:] = float("nan")
    layer.b[:, 3:] = float("nan")
    layer.rank = 3
    with torch.no_grad():
        assert torch.isfinite(layer(_inputs()[0])).all()


def test_the_observer_hears_the_effect_of_every_component_at_every_token(layer):
    x, g = _inputs()
    heard = []
    layer.rank, layer.mask, layer.observer = 2, torch.ones(7).requires_grad_(), heard.append
    (layer(x) * g).sum().backward()
    (effect,) = heard
    expected = ((x @ layer.a.T) * (g @ layer.b)).reshape(-1, 7)
    torch.testing.assert_close(effect, expected.detach())
    torch.testing.assert_close(layer.mask.grad, effect.sum(0).float())


def test_cross_entropy_and_its_gradient_are_those_of_torch():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 6, 11, generator=generator, requires_grad=True)
    ids = torch.randint(11, (2, 6), generator=generator)
    weights = torch.rand(2, 5, generator=generator)
    losses = token_losses(logits, ids)
    (losses * weights).sum().backward()
    again = logits.detach().clone().requires_grad_()
    expected = nn.functional.cross_entropy(again[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    (expected * weights).sum().backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(logits.grad, again.grad)


def test_divergence_and_its_gradient_are_those_of_torch():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 6, 11, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 6, 11, generator=generator)
    ids = torch.zeros(2, 6, dtype=torch.int64)
    losses = token_losses(logits, ids, teacher)
    losses.sum().backward()
    again = logits.detach().clone().requires_grad_()
    p, q = again[:, :-1].log_softmax(-1), teacher[:, :-1].log_softmax(-1)
    expected = nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    expected.sum().backward()
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(logits.grad, again.grad)
    assert float(token_losses(teacher, ids, teacher).abs().max()) < 1e-6


def test_drawn_targets_follow_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2, 0.0])).expand(40, 101, 4)
    targets = sampled_targets(logits, torch.Generator().manual_seed(0))
    assert targets.shape == (40, 101)
    shares = torch.bincount(targets[:, 1:].flatten(), minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2, 0.0]), rtol=0, atol=0.03)
    assert shares[3] == 0


@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("stored", [7, 4])
def test_one_layer_of_several_experts(layer, rank, stored):
    """A token has an output of each of its experts; three experts of three outputs."""
    sent = Sent(torch.tensor([0, 3, 1, 2, 3]), [2, 0, 3])
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    full_a, full_b = layer.a, layer.b
    layer.a, layer.b, heard = full_a[:stored], full_b[:, :stored], []
    layer.rank, layer.mask, layer.observer = rank, torch.ones(7).requires_grad_(), heard.append
    y = layer(x, sent)
    (y * g).sum().backward()
    hard = (torch.arange(7) < (7 if rank is None else rank)).double().requires_grad_()
    again = x.detach().clone().requires_grad_()
    experts = torch.tensor([0, 0, 2, 2, 2])
    every = (((again @ full_a.T) * hard) @ full_b.T + layer.bias).view(4, 3, 3)
    expected = every[sent.tokens, experts]
    (expected * g).sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, again.grad)
    # Those that are not stored count as the last one.
    effect = hard.grad if stored == 7 else torch.cat([hard.grad[:4], torch.zeros(2), hard.grad[4:].sum()[None]])
    torch.testing.assert_close(layer.mask.grad.double(), effect, rtol=1e-5, atol=1e-6)
    assert heard[0].shape == (4, 7)
