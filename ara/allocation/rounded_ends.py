"""The embedding and the head in few bits, while the loss of an allocation is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch

from ara.calibration.moments import InputAccumulator, averages
from ara.layouts.grid import Grid
from ara.masks.context import TuningContext
from ara.models.embeddings import Embeddings, find_embeddings
from ara.models.forwards import ending_before_head
from ara.models.weights import WeightRef
from ara.quantisation.embeddings import round_head
from ara.quantisation.nearest import round_to_nearest


class RoundedEnds:
    """Rounds the embedding and the head of a model as ``ara quantise`` does, on the inputs of the dense model."""

    def __init__(self, context: TuningContext, grid: Grid) -> None:
        """Find both matrices; nothing is rounded yet.

        Args:
            context: the model and its windows.
            grid: to round to.

        Raises:
            UnsupportedModelError: they cannot be rounded.
            UsageError: a block is longer than a row.
        """
        self._context, self._grid = context, grid
        self._found: Embeddings = find_embeddings(context.model.model)
        self._found.on(grid)
        self._rounded: dict[bool, dict[str, torch.Tensor]] = {}

    @contextmanager
    def in_place(self, nearest: bool) -> Iterator[None]:
        """Within this context the model computes with the rounded matrices.

        Args:
            nearest: round every number for itself.
        """
        model = self._context.model.model
        kept = {path: WeightRef(path).read(model).clone() for path in self._found.matrices}
        rounded = self._weights(nearest)
        try:
            for path, weight in rounded.items():
                WeightRef(path).replace(model, weight)
            yield
        finally:
            for path, weight in kept.items():
                WeightRef(path).replace(model, weight)

    def _weights(self, nearest: bool) -> dict[str, torch.Tensor]:
        """Return path → rounded matrix (m, n) in the model's dtype; made once from the exact ones."""
        if nearest not in self._rounded:
            model, found = self._context.model.model, self._found
            exact = {path: WeightRef(path).read(model) for path in found.matrices}
            *embedding, head = found.matrices
            rounded = {path: round_to_nearest(exact[path], self._grid) for path in embedding}
            rounded[head] = round_head(exact[head], found, self._grid, None if nearest else self._moment)
            self._rounded[nearest] = {path: one.weight().to(exact[path]) for path, one in rounded.items()}
        return self._rounded[nearest]

    @cached_property
    def _moment(self) -> torch.Tensor:
        """Second moment G (n, n) of the head's inputs in the dense model, on the windows to learn from."""
        context, head = self._context, self._found.head
        sums = InputAccumulator(self._found.n, context.model.device)
        context.model.use_dense()
        handle = WeightRef(head).on_input(context.model.model, sums.add)
        try:
            with context.report.bar("Reading the inputs of the head", len(context.train)) as bar:
                for batch in context.train.split(context.batch_size):
                    with ending_before_head(context.model.model), torch.no_grad():
                        context.model.model(input_ids=batch.to(context.model.device), use_cache=False)
                    bar.advance(len(batch))
        finally:
            handle.remove()
        return averages({head: sums}, "inputs of")[head].second_moment
