"""The dense and the compressed model side by side on one text, block by block.

Both follow their own stream: a block of the compressed model reads what its own earlier blocks give, and its target is
what the dense block gives on the dense stream. So it learns to correct the errors of the blocks before it as well.

Several processes share the windows of every batch, so that each step sees the windows that it sees in one process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ara.distributed.group import ALONE, Group
from ara.models.blocks import hidden_states
from ara.recovery.base import Passes, RecoveryText
from ara.recovery.metric import Metric


@dataclass(frozen=True)
class Errors:
    """Mean errors over all counted tokens of a text.

    Attributes:
        forms: at the output of the block, and with look-ahead at that of the next dense block.
        outputs: of the block for the windows of this process, for :meth:`SideBySide.advance`.
    """

    forms: tuple[float, ...]
    outputs: list[Any]

    @property
    def finite(self) -> bool:
        """Whether no error is NaN or infinite."""
        return all(map(math.isfinite, self.forms))

    def relative_to(self, start: Errors) -> float:
        """Return the mean ratio of the errors to those at the start, which are not 0."""
        return sum(form / first for form, first in zip(self.forms, start.forms, strict=True)) / len(self.forms)


class SideBySide:
    """Streams of both models over one text.

    Attributes:
        counts: number of counted tokens per batch in all processes, at least 1.
    """

    def __init__(
        self,
        dense: nn.Module,
        model: nn.Module,
        text: RecoveryText,
        batch_size: int,
        passes: Passes,
        ahead: bool,
        group: Group = ALONE,
    ) -> None:
        """Start both streams at the embeddings; nothing runs yet.

        Args:
            dense: the dense model.
            model: the compressed model; passes read its present weights.
            text: windows, and which predictions count.
            batch_size: windows per pass.
            passes: how the models are read block by block.
            ahead: whether errors at the output of the next dense block are wanted, unless there is no such block.
            group: processes that share the windows; there are at least as many windows.
        """
        batches = torch.arange(len(text.ids)).split(batch_size)
        self.counts = [_counted_tokens(text, rows) for rows in batches]
        # Windows go to the processes in turn.
        own = {index: rows[rows % group.size == group.rank] for index, rows in enumerate(batches)}
        own = {index: rows for index, rows in own.items() if len(rows)}
        # Batch → its place among those of which this process has windows.
        self._places = {index: place for place, index in enumerate(own)}
        self._counted = [text.weights(rows) for rows in own.values()]
        ids, sizes = text.ids[torch.cat(list(own.values()))], [len(rows) for rows in own.values()]
        self._dense, self._model = (passes.stream(one, ids, sizes) for one in (dense, model))
        self._group = group
        self._ahead = ahead
        self._targets: list[Any] | None = None
        self._next_targets: list[Any] | None = None

    def aim(self) -> None:
        """Compute the targets of the present block, and those of the next one for look-ahead."""
        if self._targets is None:
            self._targets = self._dense.outputs()
        # From here on the dense stream is one block ahead of the compressed one.
        self._dense.advance(self._targets)
        if self._ahead and self._dense.at < len(self._dense.blocks):
            self._next_targets = self._dense.outputs()

    def outputs(self) -> list[Any]:
        """Return the outputs of the present compressed block for the windows of this process, on the CPU."""
        return self._model.outputs()

    def advance(self, outputs: list[Any]) -> None:
        """Go to the next block, which starts from these outputs of the compressed one."""
        self._model.advance(outputs)
        self._targets, self._next_targets = self._next_targets, None

    def reads(self, index: int) -> bool:
        """Tell whether this process has windows of batch ``index``."""
        return index in self._places

    def run(self, index: int) -> Any:
        """Run the present compressed block on the own windows of batch ``index`` and return its output.

        Gradients flow if they are enabled.
        """
        return self._model.run(self._places[index])

    def forms(self, index: int, metrics: Sequence[Metric], output: Any) -> list[torch.Tensor]:
        """Return the errors of the own windows of batch ``index``, summed over counted tokens, as scalars.

        Args:
            index: of the batch.
            metrics: of this block and of the next one.
            output: of the present compressed block; gradients flow back into it.

        Returns:
            The error of ``output``, and with look-ahead that of the next dense block's output.
        """
        assert self._targets is not None
        place = self._places[index]
        made, targets = [output], [self._targets[place]]
        if self._next_targets is not None:
            made.append(self._dense.run_on(place, output))
            targets.append(self._next_targets[place])
        found = []
        for metric, one, target in zip(metrics, made, targets, strict=False):
            state = hidden_states(one)
            error = state.float() - hidden_states(target).to(state.device).float()
            found.append(_sum(metric(error), self._counted[place]))
        return found

    @torch.no_grad()
    def measure(self, metrics: Sequence[Metric]) -> Errors:
        """Run the present compressed block on all batches and return its mean errors over all processes."""
        outputs, sums = [], []
        for index in self._places:
            output = self.run(index)
            sums.append(torch.stack(self.forms(index, metrics, output)).cpu())
            outputs.append(self._model.kept(output))
        # Float64: a sum over many batches.
        own = torch.stack(sums).double()
        forms = own.new_zeros(len(self.counts), own.shape[1])
        forms[list(self._places)] = own
        self._group.total([forms])
        means = forms.sum(0) / sum(self.counts)
        return Errors(tuple(means.tolist()), outputs)

    def scale(self, metric: Metric) -> float:
        """Return the mean form of the targets themselves over all processes, in the unit of the errors."""
        assert self._targets is not None
        sums = [
            _sum(metric(hidden_states(target).to(metric.device)), counted)
            for target, counted in zip(self._targets, self._counted, strict=True)
        ]
        total = torch.tensor(sum(map(float, sums)), dtype=torch.float64)
        self._group.total([total])
        return float(total) / sum(self.counts)


def _counted_tokens(text: RecoveryText, rows: torch.Tensor) -> int:
    counted = text.weights(rows)
    return len(rows) * text.ids.shape[1] if counted is None else max(1, int(counted.sum()))


def _sum(values: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of ``values`` (..., b, t) over the positions whose prediction counts."""
    return values.sum() if counted is None else (values[..., :-1] * counted.to(values)).sum()
