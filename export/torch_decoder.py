"""A checkpoint in torch as a :class:`export.base.TextDecoder`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from ara.evaluation.generation import next_tokens, stop_tokens
from ara.evaluation.sampling import Sampler
from ara.models.checkpoint import load
from ara.models.context import context_length
from ara.models.vocabulary import token_rows


class TorchDecoder:
    """A loaded checkpoint; see :class:`export.base.TextDecoder` for every member.

    Args:
        folder: of the checkpoint.
        device: where it runs.
        dtype: precision.

    Raises:
        ModelError: the checkpoint cannot be loaded, or names invalid end tokens.
    """

    def __init__(self, folder: Path, device: str, dtype: str) -> None:
        self._model = load(folder, device, dtype)
        self._stop = stop_tokens(self._model)

    @property
    def context(self) -> int | None:
        """Number of positions of the model."""
        return context_length(self._model.config)

    @property
    def vocabulary(self) -> int | None:
        """Rows of the embedding."""
        return token_rows(self._model.config)

    def generate(self, ids: np.ndarray, max_new_tokens: int, *, sampler: Sampler | None = None) -> Iterator[int]:
        """Yield the next tokens."""
        return next_tokens(self._model, torch.from_numpy(ids), max_new_tokens, self._stop, sampler)
