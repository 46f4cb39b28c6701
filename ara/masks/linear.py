"""A linear layer that can be dense or of any rank, with the gradient of the loss for each of its components.

The factors give the weight as a sum of components, W = Σ_j b_j a_jᵀ. With a mask p the layer computes
y = Σ_j p_j b_j (a_jᵀ x), and

    ∂L/∂p_j = Σ_t h_tj q_tj        h = A x        q = Bᵀ g, g = ∂L/∂y

so the gradient of every component, kept or not, costs two thin products and no product with the weight. The forward
pass uses the hard mask 1[j ≤ k]: it computes only the k kept components, or W x if the layer is dense. The backward
pass is straight-through to p (ARA, arXiv 2510.19389; Bengio et al., arXiv 1308.3432).

If only the first s of the r components are stored, the effect of all others together is still known:

    Σ_{j > s} h_tj q_tj = gᵀ W x − Σ_{j ≤ s} h_tj q_tj

It counts as that of the last component, and those in between have none. So sums over all components from s on are
right, and a rank between s and r has the loss of rank s.

In a layer of all experts (:class:`ara.layouts.modeling_ara.SharedLinear`) a token has an output of each of its experts.
Its q is the sum over them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ara.layouts.modeling_ara import Sent, sent_product
from ara.models.weights import bias_of

# Called in the backward pass with h ⊙ q, (tokens, r): the first-order effect of each component at each token. The last
# one has the effect of all components that are not stored.
Observer = Callable[[torch.Tensor], None]


class MaskedLinear(nn.Module):
    """Replaces a linear module; holds its weight and the stored factors.

    Attributes:
        weight: W (m, n), the original's, not copied.
        a: (s, n), may be a view of a memory-mapped file.
        b: (m, s), likewise.
        rank: components that the forward pass computes, from the front; ``None`` for the dense weight.
        mask: p (r) float32. Its values are used if :attr:`soft`; otherwise it only receives the gradient.
        soft: multiply the components by ``mask`` instead of cutting at ``rank``; only if all components are stored.
        observer: see :data:`Observer`.
    """

    def __init__(self, original: nn.Module, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.original = original
        self.weight, self.bias = weight, bias_of(original)
        self.a, self.b = a, b
        self.rank: int | None = None
        self.mask: torch.Tensor | None = None
        self.soft = False
        self.observer: Observer | None = None

    @property
    def full_rank(self) -> int:
        """r = min(m, n)."""
        return min(self.weight.shape)

    def forward(self, x: torch.Tensor, sent: Sent | None = None) -> torch.Tensor:
        """Map x (..., n) to (..., m); ``sent`` as in :class:`ara.layouts.modeling_ara.SharedLinear`."""
        if torch.is_grad_enabled() and self.mask is not None and (self.mask.requires_grad or x.requires_grad):
            result: torch.Tensor = _StraightThrough.apply(x, self.mask, self, sent)
            return result
        return self.compute(x, sent)[0]

    def compute(self, x: torch.Tensor, sent: Sent | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output (..., m) and h (..., k); h is ``None`` when dense."""
        if self.soft:
            assert self.mask is not None
            h = x @ self.a.T
            return _product(h * self.mask.detach().to(h.dtype), self.b, self.bias, sent), h
        if self.rank is None:
            return _product(x, self.weight, self.bias, sent), None
        h = x @ self.a[: self.rank].T
        return _product(h, self.b[:, : self.rank], self.bias, sent), h


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sent: Sent | None) -> torch.Tensor:
    """Return x Wᵀ + bias; see :meth:`MaskedLinear.forward`."""
    return functional.linear(x, weight, bias) if sent is None else sent_product(x, weight, bias, sent)


def _back(g: torch.Tensor, weight: torch.Tensor, sent: Sent | None, tokens: int) -> torch.Tensor:
    """Return g W (t, k) for gradients at the outputs of :func:`_product` and a weight (m, k)."""
    if sent is None:
        return g @ weight
    parts = [own @ rows for own, rows in zip(g.split(sent.counts), weight.chunk(len(sent.counts)), strict=True)]
    return g.new_zeros(tokens, weight.shape[1]).index_add_(0, sent.tokens, torch.cat(parts))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor, layer: MaskedLinear, sent: Sent | None) -> torch.Tensor:
        y, h = layer.compute(x, sent)
        ctx.layer, ctx.rank, ctx.soft, ctx.sent = layer, layer.rank, layer.soft, sent
        ctx.save_for_backward(x, h, mask)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        """Return the gradient of the input through the kept components, and that of the mask of all components."""
        layer: MaskedLinear = ctx.layer
        x, h, mask = ctx.saved_tensors
        flat = x.reshape(-1, x.shape[-1])
        g = grads[0].reshape(-1, grads[0].shape[-1]).to(x.dtype)
        q = _back(g, layer.b, ctx.sent, len(flat))
        grad_x = through = None
        if ctx.needs_input_grad[0]:
            if ctx.soft:
                grad_x = (q * mask.to(q.dtype)) @ layer.a
            elif ctx.rank is None:
                grad_x = through = _back(g, layer.weight, ctx.sent, len(flat))
            else:
                grad_x = q[:, : ctx.rank] @ layer.a[: ctx.rank]
            grad_x = grad_x.view_as(x)
        grad_mask = None
        if ctx.needs_input_grad[1]:
            if h is None:
                h = flat @ layer.a.T
            else:
                h = h.reshape(-1, h.shape[-1])
                if h.shape[1] < q.shape[1]:
                    h = torch.cat([h, flat @ layer.a[h.shape[1] :].T], 1)
            effect = h * q
            if effect.shape[1] < layer.full_rank:
                through = _back(g, layer.weight, ctx.sent, len(flat)) if through is None else through
                effect = _with_rest(effect, flat, through, layer.full_rank)
            if layer.observer is not None:
                layer.observer(effect)
            grad_mask = effect.sum(0, dtype=torch.float32)
        return grad_x, grad_mask, None, None


def _with_rest(effect: torch.Tensor, x: torch.Tensor, through: torch.Tensor, full: int) -> torch.Tensor:
    """Return the effects (t, r) of all components, of which only the first s are stored.

    Args:
        effect: (t, s), of the stored ones.
        x: inputs (t, n).
        through: gᵀ W (t, n).
        full: r.
    """
    # At least float32: the rest is a small difference.
    wide = torch.promote_types(effect.dtype, torch.float32)
    rest = (x.to(wide) * through.to(wide)).sum(1) - effect.sum(1, dtype=wide)
    return torch.cat([effect, effect.new_zeros(len(effect), full - effect.shape[1] - 1), rest[:, None].to(effect)], 1)
