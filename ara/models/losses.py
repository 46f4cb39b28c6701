"""Losses over logits that compute the gradient with the loss, in chunks, so that no float32 copy of all logits exists.

    cross-entropy   L_t = −ln p_t(x_{t+1})                 ∂L_t/∂z_t = p_t − onehot(x_{t+1})
    KL to a teacher L_t = Σ_v q_t(v) (ln q_t(v) − ln p_t(v))   ∂L_t/∂z_t = p_t − q_t

with p the student's and q the teacher's distribution. Softmaxes are float32 for any dtype of the logits, and exact on
every processor (:mod:`ara.models.likelihood`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ara.models.likelihood import chunk_rows, divergence, softmax


def token_losses(logits: torch.Tensor, ids: torch.Tensor, teacher: torch.Tensor | None = None) -> torch.Tensor:
    """Return the loss of every predicted token; differentiable in ``logits``.

    Args:
        logits: (b, t, v) of the trained model; position i predicts token i + 1.
        ids: (b, t) int64, the targets of cross-entropy.
        teacher: (b, t, v) logits of the dense model: the loss is KL(teacher ‖ model) instead of cross-entropy.

    Returns:
        (b, t − 1) float32, nats.
    """
    return losses_at(logits, ids[:, 1:], None if teacher is None else teacher[:, :-1])


def losses_at(logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor | None = None) -> torch.Tensor:
    """Return the losses of some positions; differentiable in ``logits``.

    Args:
        logits: (b, n, v) of the trained model, n ≥ p; those after the first p have no part.
        targets: (b, p) int64, the next tokens.
        teacher: (b, p, v) logits of the dense model: the loss is KL(teacher ‖ model) instead of cross-entropy.

    Returns:
        (b, p) float32, nats.
    """
    result: torch.Tensor = _TokenLosses.apply(logits, targets, teacher)
    return result


def sampled_targets(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a next token for every position from the model's own distribution.

    With such targets the second moment of cross-entropy gradients is the Fisher information, which for a softmax is the
    Gauss-Newton matrix of the KL divergence (Martens, arXiv 1412.1193, section 9). With the tokens of the text it is
    the "empirical Fisher", which is neither.

    Args:
        logits: (b, t, v).
        generator: on the CPU.

    Returns:
        (b, t) int64 ids such that ``ids[:, i + 1]`` was drawn at position i; ``ids[:, 0]`` is 0 and never a target.
    """
    batch, length = logits.shape[:2]
    targets = torch.zeros(batch, length, dtype=torch.int64, device=logits.device)
    targets[:, 1:] = drawn_targets(logits, torch.rand(batch, length - 1, generator=generator))
    return targets


def drawn_targets(logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Draw a next token for some positions from the model's own distribution.

    Args:
        logits: (b, n, v), n ≥ p; those after the first p have no part.
        numbers: (b, p) float32, uniform in [0, 1).

    Returns:
        (b, p) int64.
    """
    rows, last = chunk_rows(logits), logits.shape[-1] - 1
    found = torch.empty(numbers.shape, dtype=torch.int64, device=logits.device)
    uniform = numbers.to(logits.device).unsqueeze(-1)
    for window in range(len(numbers)):
        for start in range(0, numbers.shape[1], rows):
            stop = min(start + rows, numbers.shape[1])
            cumulative = softmax(logits.detach()[window, start:stop])[0].cumsum(-1)
            picks = torch.searchsorted(cumulative, uniform[window, start:stop] * cumulative[:, -1:]).squeeze(1)
            found[window, start:stop] = picks.clamp_max(last)
    return found


class TargetSampler:
    """Random numbers to draw targets with, for one batch of windows after the other; see :func:`drawn_targets`.

    The random numbers of a window depend on its position among all windows, not on who reads the others. So processes
    that share windows draw the targets of one process.
    """

    def __init__(self, seed: int, rows: Sequence[int]) -> None:
        """Start before the first batch.

        Args:
            seed: of the random numbers.
            rows: positions of the windows to come among all windows, rising; those of one batch follow each other.
        """
        self._rows, self._generator = rows, torch.Generator().manual_seed(seed)
        # Windows that have got targets, and windows whose random numbers have been drawn.
        self._done = self._drawn = 0

    def numbers(self, count: int, length: int) -> torch.Tensor:
        """Return the random numbers of the next ``count`` windows of ``length`` tokens: (b, t − 1) float32."""
        skipped = self._rows[self._done] - self._drawn
        torch.rand(skipped * (length - 1), generator=self._generator)
        self._done += count
        self._drawn = self._rows[self._done - 1] + 1
        return torch.rand(count, length - 1, generator=self._generator)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor | None) -> torch.Tensor:
        """Return losses (b, p), and keep the gradient of the logits, which costs little extra."""
        batch, length = targets.shape
        rows, wanted = chunk_rows(logits), ctx.needs_input_grad[0]
        losses = torch.empty(batch, length, dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits) if wanted else None
        if gradient is not None:
            # The last position of a window predicts no token of it.
            gradient[:, length:] = 0
        for window in range(batch):
            for start in range(0, length, rows):
                stop = min(start + rows, length)
                scores = logits[window, start:stop]
                if teacher is None:
                    wanted_tokens = targets[window, start:stop, None]
                    p, log_normaliser = softmax(scores)
                    losses[window, start:stop] = log_normaliser - scores.gather(1, wanted_tokens).squeeze(1)
                    if gradient is not None:
                        p.scatter_add_(1, wanted_tokens, torch.full_like(wanted_tokens, -1, dtype=p.dtype))
                        gradient[window, start:stop] = p
                else:
                    kl, q, p = divergence(teacher[window, start:stop], scores)
                    losses[window, start:stop] = kl
                    if gradient is not None:
                        gradient[window, start:stop] = p.sub_(q)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place: the graph is used once.
        gradient[:, : grads[0].shape[1]] *= grads[0].unsqueeze(-1).to(gradient.dtype)
        return gradient, None, None
