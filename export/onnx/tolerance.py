"""How far a graph is from torch, and how far each precision may be."""

from __future__ import annotations

from dataclasses import dataclass

# Standard errors that a difference of likelihoods is allowed beyond its tolerance.
_CERTAIN = 3


@dataclass(frozen=True)
class Tolerance:
    """What a precision is held to.

    Attributes:
        difference: largest difference of a logit, as a share of the largest logit (at least 1); ``None``: not looked
            at.
        agreement: least share of positions with the same most likely token.
        kl: largest mean KL(torch ‖ ONNX), nats per token.
        nll: largest difference of the mean negative log-likelihood, nats per token, beyond what so few tokens leave to
            chance (three standard errors).
    """

    difference: float | None
    agreement: float
    kl: float
    nll: float


# fp32: rounding alone. fp16 and int8: what these cost, see docs/export.md.
TOLERANCES = {
    "fp32": Tolerance(2e-4, 0.999, 1e-5, 1e-4),
    "fp16": Tolerance(3e-2, 0.98, 1e-3, 5e-3),
    "int8": Tolerance(None, 0.9, 2e-2, 2e-2),
}


@dataclass(frozen=True)
class Parity:
    """How far the graph is from torch in one way of running it.

    Attributes:
        case: prefill, decode, chunks or padded.
        tokens: positions compared.
        difference: largest difference of a logit.
        scale: largest logit in torch, without its sign.
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
        """Return in words what is beyond the tolerance."""
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
