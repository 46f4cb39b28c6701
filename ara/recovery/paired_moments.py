"""Second moments of the inputs of a layer in the dense model and in the compressed one, over the same tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from ara.calibration.moments import add_gram, mirrored
from ara.distributed.group import Group
from ara.errors import NumericalError

# Products of a vector with itself: their sums are symmetric.
_SYMMETRIC = ("compressed", "dense", "drift_square")


@dataclass(frozen=True)
class Drift:
    """Moments of the drift e of the residual stream beside a layer, over the same tokens; all float64.

    Attributes:
        compressed: E[e x'ᵀ] (m, n).
        dense: E[e xᵀ] (m, n); ``None`` if it was not collected, like ``square``.
        square: E[e eᵀ] (m, m).
        mean: E[e] (m).
    """

    compressed: torch.Tensor
    dense: torch.Tensor | None
    square: torch.Tensor | None
    mean: torch.Tensor


@dataclass(frozen=True)
class PairedMoments:
    """Moments of a layer's inputs x in the dense model and x' in the compressed one, over the same tokens.

    Attributes:
        dense: G = E[x xᵀ] (n, n); ``None`` if it was not collected.
        cross: C = E[x x'ᵀ] (n, n).
        compressed: S = E[x' x'ᵀ] (n, n).
        dense_mean, compressed_mean: E[x] and E[x'] (n).
        tokens: their number.
        drift: of the residual stream beside the layer; ``None`` if the layer does not write to it.

    All are float64.
    """

    dense: torch.Tensor | None
    cross: torch.Tensor
    compressed: torch.Tensor
    dense_mean: torch.Tensor
    compressed_mean: torch.Tensor
    tokens: int
    drift: Drift | None = None


class PairedAccumulator:
    """Sums the moments of pairs of inputs over batches, in float32."""

    def __init__(self, width: int, device: torch.device, dense: bool, outputs: int | None = None) -> None:
        """Prepare sums.

        Args:
            width: n of the inputs.
            device: of the inputs.
            dense: whether to sum products with x as well.
            outputs: m, if the drift is summed too.
        """
        pairs = ["cross", "compressed", *(["dense"] if dense else [])]
        sizes = {name: (width, width) for name in pairs}
        if outputs is not None:
            sizes["drift"] = (outputs, width)
            sizes |= {"drift_dense": (outputs, width), "drift_square": (outputs, outputs)} if dense else {}
        self._sums = {name: torch.zeros(size, device=device) for name, size in sizes.items()}
        widths = [width, width, *([outputs] if outputs else [])]
        self._means = [torch.zeros(one, device=device) for one in widths]
        self._tokens = 0

    @staticmethod
    def bytes_for(width: int, dense: bool) -> int:
        """Return the bytes that the sums take without drift; arguments as above."""
        return 4 * ((3 if dense else 2) * width * width + 2 * width)

    def add(self, x: torch.Tensor, other: torch.Tensor, drift: torch.Tensor | None = None) -> None:
        """Add the inputs ``x`` (..., n) of the dense layer, ``other`` (..., n) of the compressed one, and the drift."""
        x, other = (one.reshape(-1, one.shape[-1]).float() for one in (x, other))
        pairs = {"cross": (x, other), "compressed": (other, other), "dense": (x, x)}
        inputs = [x, other]
        if drift is not None:
            e = drift.reshape(-1, drift.shape[-1]).float()
            pairs |= {"drift": (e, other), "drift_dense": (e, x), "drift_square": (e, e)}
            inputs.append(e)
        for name, total in self._sums.items():
            left, right = pairs[name]
            if name in _SYMMETRIC:
                add_gram(total, left)
            else:
                total.addmm_(left.T, right)
        for mean, one in zip(self._means, inputs, strict=True):
            mean += one.sum(0)
        self._tokens += len(x)

    def sum_over(self, group: Group, ranks: Collection[int]) -> None:
        """Add up the sums of all processes; only the processes ``ranks`` get them."""
        count = torch.tensor(self._tokens)
        for part in (*self._sums.values(), *self._means, count):
            group.sum(part, ranks)
        self._tokens = int(count)

    @property
    def tokens(self) -> int:
        """Number of pairs."""
        return self._tokens

    @property
    def is_finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return all(bool(one.isfinite().all()) for one in (*self._means, *self._sums.values()))

    def checked(self, name: str) -> PairedMoments:
        """Return the averages for the layer ``name``.

        Raises:
            NumericalError: a sum is NaN or infinite.
        """
        if not self.is_finite:
            raise NumericalError(
                f"the inputs of {name} hold NaN or infinity",
                "try --dtype float32; if that fails too, the model is broken",
            )
        return self.result()

    def result(self) -> PairedMoments:
        """Return the averages."""
        count = max(self._tokens, 1)
        sums = {name: one.double() / count for name, one in self._sums.items()}
        for name in set(_SYMMETRIC) & set(sums):
            mirrored(sums[name])
        dense, compressed, *rest = (mean.double() / count for mean in self._means)
        drift = Drift(sums["drift"], sums.get("drift_dense"), sums.get("drift_square"), rest[0]) if rest else None
        return PairedMoments(
            sums.get("dense"), sums["cross"], sums["compressed"], dense, compressed, self._tokens, drift
        )
