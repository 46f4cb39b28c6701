"""Muon in full precision: torch's iterates in bfloat16, which is slow where the processor has no such arithmetic."""

from __future__ import annotations

from typing import Any

import torch


class Float32Muon(torch.optim.Muon):
    """torch's Muon whose Newton–Schulz iteration runs in the precision of the parameters, with the same state.

    On two cores with AVX2 alone, one step of the matrices of SmolLM2-135M takes about a twentieth of the time.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step: momentum of Nesterov, orthogonalised, as long as ``match_rms_adamw`` makes it.

        Raises:
            ValueError: a closure is given, or another adjustment of the rate.
        """
        if closure is not None:
            raise ValueError("a closure is not supported")
        for group in self.param_groups:
            if group["adjust_lr_fn"] != "match_rms_adamw" or not group["nesterov"]:
                raise ValueError("only Nesterov momentum with match_rms_adamw is supported")
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])
                update = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                # Liu et al., arXiv 2502.16982, equation 4: the root mean square of a step of AdamW.
                rate = group["lr"] * 0.2 * max(parameter.shape) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def orthogonal(matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """Return roughly U Vᵀ of a matrix U Σ Vᵀ, by a quintic Newton–Schulz iteration in its own precision.

    Args:
        matrix: (m × n); unchanged.
        coefficients: a, b, c of X ← a X + (b X Xᵀ + c (X Xᵀ)²) X.
        steps: of the iteration.
        eps: the least norm that is divided by.

    Returns:
        (m × n), with singular values between about 0.7 and 1.2 where those of the matrix were not very small.
    """
    a, b, c = coefficients
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if matrix.shape[0] > matrix.shape[1] else wide
