"""Shapes of models on the disk, as ``ara plan`` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ara.models.sources import resolve
from ara.planning.shape import ModelShape, read_shape

# Of the window.
TOKENS = 40


def shape_of(folder: Path, **settings: Any) -> ModelShape:
    """Return the shape of a model's folder in float32, with a window of :data:`TOKENS`."""
    return read_shape(resolve(str(folder), needs_weights=False), torch.float32, TOKENS, **settings)
