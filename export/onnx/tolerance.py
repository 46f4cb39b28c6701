"""How much a graph differs from torch, and how much each precision may differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Standard errors by which a difference of likelihoods may exceed its tolerance.
_CERTAIN = 3


@dataclass(frozen=True)
class Tolerance:
    """Limits for one precision.

    Attributes:
        difference: largest difference of a logit, as a share of the largest logit (at least 1); ``None``: no limit.
        agreement: least share of positions with the same most likely token.
        kl: largest mean KL(torch ‖ ONNX), nats per token.
        nll: largest difference of the mean negative log-likelihood, nats per token; three standard errors are added.
    """

    difference: float | None
    agreement: float
    kl: float
    nll: float


# fp32 allows for rounding errors only. For fp16 and int8 see docs/measurements/speed.md.
TOLERANCES = {
    "fp32": Tolerance(2e-4, 0.999, 1e-5, 1e-4),
    "fp16": Tolerance(3e-2, 0.98, 1e-3, 5e-3),
    "int8": Tolerance(None, 0.9, 1e-2, 1e-2),
}


@dataclass(frozen=True)
class Parity:
    """How much the graph differs from torch in one case.

    Attributes:
        case: prefill, decode, chunks or padded.
        tokens: number of positions compared.
        difference: largest difference of a logit.
        scale: largest absolute logit in torch.
        agreement: share of positions with the same most likely token.
        kl: mean KL(torch ‖ ONNX), nats per token.
        nll_torch, nll_onnx: mean negative log-likelihood of the text, nats per token.
        nll_stderr: standard error of their difference over the positions.
    """

    case: str
    tokens: int
    difference: float
    scale: float
    agreement: float
    kl: float
    nll_torch: float
    nll_onnx: float
    nll_stderr: float

    def misses(self, tolerance: Tolerance) -> list[str]:
        """Return one line per exceeded limit."""
        nll = self.nll_onnx - self.nll_torch
        found = []
        if tolerance.difference is not None:
            allowed = tolerance.difference * max(1.0, self.scale)
            if not self.difference <= allowed:
                found.append(f"{self.case}: largest difference {self.difference:.2g}, allowed {allowed:.2g}")
        if not self.agreement >= tolerance.agreement:
            found.append(f"{self.case}: same token at {self.agreement:.2%}, at least {tolerance.agreement:.2%}")
        if not self.kl <= tolerance.kl:
            found.append(f"{self.case}: KL {self.kl:.2g} nats, allowed {tolerance.kl:g}")
        allowed = tolerance.nll + _CERTAIN * self.nll_stderr
        if not abs(nll) <= allowed:
            found.append(f"{self.case}: NLL off by {nll:+.2g} nats, allowed {allowed:.2g} on so few tokens")
        return found


def all_misses(cases: Sequence[Parity], tolerance: Tolerance) -> list[str]:
    """Return one line per limit that a case exceeds."""
    return [text for case in cases for text in case.misses(tolerance)]
