"""The predictions of the dense model, which the compressed model is trained to give.

The dense model never changes. So the output of its last block is kept for every window that is read again, and only the
final norm and the head run each time. That is exact, and a token takes d numbers, where its logits are as many as the
vocabulary has tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ara.models.blocks import ending_after, output_bytes, output_on, starting_at
from ara.models.memory import available_bytes
from ara.models.weights import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# 1 / share of the free memory that kept outputs may take.
_SHARE = 4


class Teacher:
    """The dense model on a fixed set of windows.

    It reads every window alone. So the logits depend neither on what is kept nor on the batch of a window: a resumed
    training gets the same bits.
    """

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, keep: bool) -> None:
        """Prepare; nothing runs yet.

        Args:
            model: the dense model, in evaluation mode.
            windows: (w, t) int64.
            keep: whether to keep outputs, as many as a quarter of the free memory holds.
        """
        self.model, self.windows = model, windows
        self._blocks = list(find_blocks(model)[1])
        self._room = available_bytes("cpu") // _SHARE if keep else 0
        self._outputs: dict[int, Any] = {}
        self._separable: bool | None = None

    @torch.no_grad()
    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits (b, t, v) of the windows ``rows`` (b) int64, in the model's dtype."""
        first = self._window(int(rows[0]))
        if len(rows) == 1:
            return first
        found = first.new_empty(len(rows), *first.shape[1:])
        found[0] = first[0]
        for place, row in enumerate(rows[1:].tolist(), 1):
            found[place] = self._window(row)[0]
        return found

    def _window(self, row: int) -> torch.Tensor:
        """Return the logits (1, t, v) of one window."""
        ids = self.windows[row : row + 1].to(self.model.device)
        if self._separable is None:
            self._separable = torch.equal(self._forward(ids), self._finish(ids, self._run(ids)))
        if not self._separable:
            # The model reads more than the output of its last block.
            return self._forward(ids)
        return self._finish(ids, self._output(row, ids))

    def _output(self, row: int, ids: torch.Tensor) -> Any:
        """Return the output of the last block for one window."""
        if row in self._outputs:
            return output_on(self._outputs[row], self.model.device)
        output = self._run(ids)
        size = output_bytes(output)
        if size <= self._room:
            self._room -= size
            self._outputs[row] = output_on(output, "cpu")
        return output

    def _run(self, ids: torch.Tensor) -> Any:
        with ending_after(self._blocks[-1]) as outputs:
            self._forward(ids)
        return outputs[0]

    def _finish(self, ids: torch.Tensor, output: Any) -> torch.Tensor:
        with starting_at(self._blocks, len(self._blocks), output):
            return self._forward(ids)

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits
