"""The predictions of the dense model, which the compressed model is trained to give.

The dense model never changes. So the output of its last block is kept for every window that is read again, and only the
final norm and the head run each time. That is exact, and a token takes d numbers, where its logits are as many as the
vocabulary has tokens. Large logits are made in chunks (:mod:`ara.models.scores`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ara.models.blocks import output_bytes, output_on, starting_at
from ara.models.forwards import ending_after
from ara.models.losses import losses_at
from ara.models.memory import available_bytes
from ara.models.scores import ChunkLoss, Head, Place, Scores
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
        self._blocks, self._head = list(find_blocks(model)[1]), Head(model)
        self._room = available_bytes("cpu") // _SHARE if keep else 0
        self._outputs: dict[int, Any] = {}
        self._separable: bool | None = None

    @torch.no_grad()
    def scores(self, rows: torch.Tensor) -> list[Scores]:
        """Return the scores of each of the windows ``rows`` (b) int64."""
        return [self._window(row) for row in rows.tolist()]

    def _window(self, row: int) -> Scores:
        """Return the scores of one window."""
        ids = self.windows[row : row + 1].to(self.model.device)
        if self._separable is None:
            self._separable = self._equal(ids)
        if not self._separable:
            # The model reads more than the output of its last block.
            return self._head.scores(ids)
        return self._finish(ids, self._output(row, ids))

    def _equal(self, ids: torch.Tensor) -> bool:
        """Tell whether the output of the last block gives the scores of the model."""
        whole, finished = self._head.scores(ids), self._finish(ids, self._run(ids))
        return all(torch.equal(logits, finished.at(place)) for logits, place in whole.chunks())

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
            self.model(input_ids=ids, use_cache=False)
        return outputs[0]

    def _finish(self, ids: torch.Tensor, output: Any) -> Scores:
        with starting_at(self._blocks, len(self._blocks), output):
            return self._head.scores(ids)


def divergence_from(teacher: Sequence[Scores], ids: torch.Tensor) -> ChunkLoss:
    """Return the loss KL(dense ‖ model) of a batch.

    Args:
        teacher: the dense model's scores of every window.
        ids: (b, t) int64.
    """

    def loss(logits: torch.Tensor, place: Place) -> torch.Tensor:
        alone = Place(slice(0, 1), place.positions)
        expected = [one.at(alone) for one in teacher[place.windows]]
        return losses_at(logits, place.of(ids[:, 1:]), expected[0] if len(expected) == 1 else torch.cat(expected))

    return loss
