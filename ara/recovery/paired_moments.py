"""Second moments of the inputs of a layer in the dense model and in the compressed one, over the same tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ara.calibration.moments import add_gram, mirrored
from ara.distributed.group import Group
from ara.errors import NumericalError
from ara.models.weights import LinearSpec, bias_of

# Sums of products: of the vectors x (0), x' (1) and the drift e (2).
_PAIRS = {
    "cross": (0, 1),
    "compressed": (1, 1),
    "dense": (0, 0),
    "drift": (2, 1),
    "drift_dense": (2, 0),
    "drift_square": (2, 2),
}
# Products of a vector with itself: their sums are symmetric.
_SYMMETRIC = {name for name, (left, right) in _PAIRS.items() if left == right}


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


def has_bias(model: nn.Module, specs: Sequence[LinearSpec]) -> bool:
    """Tell whether a layer has a bias, so that the covariances of its inputs are needed."""
    return any(bias_of(spec.weight.owner(model)) is not None for spec in specs)


class PairedAccumulator:
    """Sums the moments of pairs of inputs over batches, in float32.

    Covariances are differences of moments. Where a channel's mean is many times its deviation, float32 sums of raw
    products no longer hold the difference. With ``centred`` the sums are of what remains after a fixed reference is
    subtracted: the mean of the first batch. The moments are restored from them in float64.
    """

    def __init__(
        self, width: int, device: torch.device, dense: bool, outputs: int | None = None, centred: bool = False
    ) -> None:
        """Prepare sums.

        Args:
            width: n of the inputs.
            device: of the inputs.
            dense: whether to sum products with x as well.
            outputs: m, if the drift is summed too.
            centred: whether covariances will be taken: the layer has a bias.
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
        self._centred = centred
        # What was subtracted from x, x' and e; none before the first batch, and after the moments are restored.
        self._references: list[torch.Tensor] = []

    @staticmethod
    def bytes_for(width: int, dense: bool) -> int:
        """Return the bytes that the sums take without drift; arguments as above."""
        return 4 * ((3 if dense else 2) * width * width + 2 * width)

    def add(self, x: torch.Tensor, other: torch.Tensor, drift: torch.Tensor | None = None) -> None:
        """Add the inputs ``x`` (..., n) of the dense layer, ``other`` (..., n) of the compressed one, and the drift."""
        given = (x, other) if drift is None else (x, other, drift)
        inputs = [one.reshape(-1, one.shape[-1]).float() for one in given]
        if not len(inputs[0]):
            return
        if self._centred:
            self._references = self._references or [one.mean(0) for one in inputs]
            inputs = [one - reference for one, reference in zip(inputs, self._references, strict=True)]
        for name, total in self._sums.items():
            left, right = (inputs[index] for index in _PAIRS[name])
            if name in _SYMMETRIC:
                add_gram(total, left)
            else:
                total.addmm_(left.T, right)
        for mean, one in zip(self._means, inputs, strict=True):
            mean += one.sum(0)
        self._tokens += len(inputs[0])

    def sum_over(self, group: Group, ranks: Collection[int]) -> None:
        """Add up the sums of all processes; only the processes ``ranks`` get them."""
        if self._centred and group.size > 1:
            # Every process has references of its own.
            self._restore()
        count = torch.tensor(self._tokens)
        for part in (*self._sums.values(), *self._means, count):
            group.sum(part, ranks)
        self._tokens = int(count)

    def _restore(self) -> None:
        """Turn the sums into float64 sums of raw products: Σ v wᵀ = Σ (v − r)(w − s)ᵀ + r Σwᵀ + Σv sᵀ − t r sᵀ."""
        self._sums = {name: one.double() for name, one in self._sums.items()}
        self._means = [one.double() for one in self._means]
        if not self._references:
            return
        references = [one.double() for one in self._references]
        for mean, reference in zip(self._means, references, strict=True):
            mean += self._tokens * reference
        for name, total in self._sums.items():
            (r, s), (left, right) = ([of[index] for index in _PAIRS[name]] for of in (references, self._means))
            total += torch.outer(r, right) + torch.outer(left, s) - self._tokens * torch.outer(r, s)
        self._references = []

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
        self._restore()
        count = max(self._tokens, 1)
        sums = {name: one.double() / count for name, one in self._sums.items()}
        for name in _SYMMETRIC & set(sums):
            mirrored(sums[name])
        dense, compressed, *rest = (mean.double() / count for mean in self._means)
        drift = Drift(sums["drift"], sums.get("drift_dense"), sums.get("drift_square"), rest[0]) if rest else None
        return PairedMoments(
            sums.get("dense"), sums["cross"], sums["compressed"], dense, compressed, self._tokens, drift
        )
