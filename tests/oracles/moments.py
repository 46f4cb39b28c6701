"""Second moments in plain float64 numpy, one token at a time; written without looking at ara.calibration."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def moments(inputs: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (1/t) Σ x xᵀ, (n, n), and (1/t) Σ |x|, (n), of inputs (t, n)."""
    gram = np.zeros((inputs.shape[1], inputs.shape[1]))
    absolute = np.zeros(inputs.shape[1])
    for x in inputs:
        gram += np.outer(x, x)
        absolute += np.abs(x)
    return gram / len(inputs), absolute / len(inputs)
