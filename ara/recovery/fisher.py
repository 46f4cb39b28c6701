"""Fisher information of the residual stream: how much the dense model's predictions depend on a block's output.

With h (d) the output of a block for one token, and L the summed cross-entropy of a window against tokens drawn from the
model's own predictions,

    F = E[g gᵀ],  g = ∂L/∂h  (d)

is the Fisher information of the output. An error e (d) of the output costs about ½ eᵀ F e nats of KL divergence
(Martens, arXiv 1412.1193). The diagonal of F weighs each channel by itself.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ara.distributed.group import ALONE, Group
from ara.errors import NAN_HINT, NumericalError
from ara.models.blocks import BatchLoss, BlockRunner, hidden_states
from ara.models.losses import TargetSampler, drawn_targets, losses_at
from ara.models.scores import ChunkLoss, Place
from ara.models.weights import find_blocks
from ara.progress import SILENT, Reporter
from ara.recovery.base import RecoveryText


def block_fisher(
    model: nn.Module,
    text: RecoveryText,
    batch_size: int,
    *,
    full: bool,
    seed: int = 0,
    report: Reporter = SILENT,
    folder: Path | None = None,
    group: Group = ALONE,
) -> list[torch.Tensor]:
    """Return the Fisher information at the output of every block, by one forward and backward pass.

    Args:
        model: a causal language model in eval mode, whose parameters require no gradients.
        text: windows to read; predictions that are not counted have no part in L.
        batch_size: windows per pass.
        full: whether to return matrices instead of their diagonals.
        seed: of the drawn tokens.
        report: progress.
        folder: for inputs of blocks that do not fit into memory, see :class:`ara.models.blocks.BlockRunner`.
        group: processes that share the windows; all get the result.

    Returns:
        Per block (d, d) or (d) float32 on the CPU, (nats per window)² per token and squared unit of h.

    Raises:
        NumericalError: a gradient is NaN or infinite.
    """
    rows = group.share(len(text.ids), batch_size)
    own = text.rows(rows)
    runner = BlockRunner(model, own.ids, batch_size, report=report, folder=folder)
    blocks = list(find_blocks(model)[1])
    sums = [_Sum(full) for _ in blocks]
    with ExitStack() as hooks:
        for block, total in zip(blocks, sums, strict=True):
            hooks.enter_context(block.register_forward_hook(partial(_watch, total)))
        with report.bar(f"Reading gradients of {len(blocks)} blocks", runner.windows) as bar:
            if runner.windows:
                sampler = TargetSampler(seed, rows.tolist())
                runner.backward(0, len(blocks) - 1, _sampled_loss(own, sampler), bar.advance)
    # Process 0 always has a window.
    for total, width in zip(sums, group.broadcast([total.width for total in sums]), strict=True):
        total.sum_over(group, width, runner.device)
    found = [total.mean() for total in sums]
    for index, information in enumerate(found):
        if not information.isfinite().all():
            raise NumericalError(f"the gradients at block {index} hold NaN or infinity", NAN_HINT)
    return found


class _Sum:
    """Sums g gᵀ, or its diagonal, over tokens."""

    def __init__(self, full: bool) -> None:
        self._full = full
        self._total: torch.Tensor | None = None
        self._tokens = 0

    def add(self, gradient: torch.Tensor) -> None:
        """Add the gradients (..., d) at one batch of outputs."""
        g = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        part = g.T @ g if self._full else g.square().sum(0)
        self._total = part if self._total is None else self._total.add_(part)
        self._tokens += len(g)

    @property
    def width(self) -> int:
        """Number of channels d; 0 before the first gradient."""
        return 0 if self._total is None else self._total.shape[-1]

    def sum_over(self, group: Group, width: int, device: torch.device) -> None:
        """Add up the sums of all processes; those without a window have no sum and need its ``width``."""
        if self._total is None:
            self._total = torch.zeros((width, width) if self._full else (width,), device=device)
        tokens = torch.tensor(self._tokens)
        for part in (self._total, tokens):
            group.sum(part, range(group.size))
        self._tokens = int(tokens)

    def mean(self) -> torch.Tensor:
        """Return the mean over tokens, on the CPU."""
        assert self._total is not None
        return (self._total / self._tokens).cpu()


def _watch(total: _Sum, module: nn.Module, args: object, output: Any) -> None:
    """Add the gradient at the output of a block when the backward pass reaches it (a forward hook)."""
    hidden_states(output).register_hook(total.add)


def _sampled_loss(text: RecoveryText, sampler: TargetSampler) -> BatchLoss:
    """Return the loss of batches in the order of ``text``, in nats, as a function of their ids."""
    start = 0

    def of_batch(ids: torch.Tensor) -> ChunkLoss:
        nonlocal start
        numbers = sampler.numbers(*ids.shape)
        counted = text.weights(slice(start, start + len(ids)))
        start += len(ids)

        def loss(logits: torch.Tensor, place: Place) -> torch.Tensor:
            losses = losses_at(logits, drawn_targets(logits, place.of(numbers)))
            return losses if counted is None else losses * place.of(counted).to(losses)

        return loss

    return of_batch
