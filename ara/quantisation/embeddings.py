"""Rounds the embedding and the head of a model, the two matrices outside of the decoder blocks.

- **Embedding.** It has no inputs to calibrate with: a token selects one row. So each weight is rounded to nearest, with
  the scales of the least squared error. It is rounded first, and all other matrices are fitted to what it then gives.
- **Head.** It is a linear layer and rounded like one (:mod:`ara.quantisation.calibrated`), last of all, on the second
  moment G of its inputs with everything before it rounded.
- **Head tied to the embedding.** Embedding and head share one matrix W. After rounding it to Q, the squared error of
  the logits is tr((W − Q) G (W − Q)ᵀ), and that of the embedding is ‖W − Q‖². GPTQ minimises the sum if the identity is
  added to G, which is what damping does. With :data:`TIED_DAMPING` as the share, both count alike: an error in a
  direction in which the inputs have their mean energy weighs as much in the logits as in the rows. The matrix is
  rounded last, as the head.
"""

from __future__ import annotations

import torch

from ara.layouts.grid import Grid
from ara.models.embeddings import Embeddings
from ara.quantisation.calibrated import DAMPING, round_calibrated
from ara.quantisation.nearest import Rounded, round_to_nearest

# Damping of a matrix that is embedding and head, as a share of the mean of G's diagonal.
TIED_DAMPING = 1.0


def round_head(weight: torch.Tensor, embeddings: Embeddings, grid: Grid, moment: torch.Tensor | None) -> Rounded:
    """Round the head, which is the embedding as well if it is tied to it.

    Args:
        weight: W, (m, n).
        embeddings: which of the two it is.
        grid: to round to.
        moment: G (n, n) of the head's inputs; ``None`` rounds to nearest.
    """
    if moment is None:
        return round_to_nearest(weight, grid)
    return round_calibrated(weight, moment, grid, TIED_DAMPING if embeddings.tied else DAMPING)
