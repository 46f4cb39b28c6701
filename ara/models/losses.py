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
    result: torch.Tensor = _TokenLosses.apply(logits, ids, teacher)
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
    batch, length, vocabulary = logits.shape
    targets = torch.zeros(batch, length, dtype=torch.int64, device=logits.device)
    flat, rows = logits.detach()[:, :-1].reshape(-1, vocabulary), chunk_rows(logits)
    drawn = []
    for chunk in flat.split(rows):
        uniform = torch.rand(len(chunk), 1, generator=generator).to(logits.device)
        cumulative = softmax(chunk)[0].cumsum(-1)
        picks = torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).squeeze(1)
        drawn.append(picks.clamp_max(vocabulary - 1))
    targets[:, 1:] = torch.cat(drawn).view(batch, length - 1)
    return targets


class TargetSampler:
    """Draws targets for one batch of windows after the other, see :func:`sampled_targets`.

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

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Return targets (b, t) of the next batch from its logits (b, t, v)."""
        count, length, _ = logits.shape
        skipped = self._rows[self._done] - self._drawn
        torch.rand(skipped * (length - 1), generator=self._generator)
        self._done += count
        self._drawn = self._rows[self._done - 1] + 1
        return sampled_targets(logits, self._generator)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor, teacher: torch.Tensor | None) -> torch.Tensor:
        """Return losses (batch, length − 1), and keep the gradient of the logits, which costs little extra."""
        batch, length, _ = logits.shape
        rows, wanted = chunk_rows(logits), ctx.needs_input_grad[0]
        losses = torch.empty(batch, length - 1, dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits) if wanted else None
        if gradient is not None:
            # The last position predicts no token of the window.
            gradient[:, -1] = 0
        for window in range(batch):
            for start in range(0, length - 1, rows):
                stop = min(start + rows, length - 1)
                scores = logits[window, start:stop]
                if teacher is None:
                    targets = ids[window, start + 1 : stop + 1, None]
                    p, log_normaliser = softmax(scores)
                    losses[window, start:stop] = log_normaliser - scores.gather(1, targets).squeeze(1)
                    if gradient is not None:
                        p.scatter_add_(1, targets, torch.full_like(targets, -1, dtype=p.dtype))
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
        gradient[:, :-1] *= grads[0].unsqueeze(-1).to(gradient.dtype)
        return gradient, None, None
