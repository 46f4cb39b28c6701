"""AdamW and Muon with float32 master copies, a cosine schedule, and a state that is stored as tensors.

Muon (Liu et al., arXiv 2502.16982) changes a matrix along U Vᵀ instead of its momentum U Σ Vᵀ, so that all directions
move equally far. Vectors, and scales of rounded matrices, always have AdamW. The rate is the root mean square change of
a number per step: that of Muon's steps exactly, the size of AdamW's about.

Half-precision weights lose small updates: a step of 1e-4 of a weight is below the resolution of bfloat16. So the
optimiser steps on float32 copies, and each step rounds them into the model. Float32 weights need no copy, unless the
model is to compute with what a checkpoint of less precision will hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn

from ara.distributed.group import ALONE, Group
from ara.errors import NumericalError
from ara.recovery.muon import Float32Muon

# As in the recipes of AA-SVD and others: short warm-up, cosine to a tenth, gradients clipped, no weight decay.
WARM_UP = 0.1
_FLOOR = 0.1
CLIP = 1.0
_BETAS = (0.9, 0.95)
_MOMENTUM = 0.95
# With match_rms_adamw, torch's Muon makes steps with this root mean square times its rate.
_MUON_RMS = 0.2
Method = Literal["adamw", "muon"]
# Names of the moments in the state of torch's optimisers.
_MOMENTS: dict[Method, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}


def rate_at(step: int, steps: int, rate: float) -> float:
    """Return the learning rate of a step: linear warm-up over :data:`WARM_UP` of the steps, then a cosine to a tenth.

    Args:
        step: from 0.
        steps: in all.
        rate: the highest one.
    """
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return rate * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return rate * (_FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Stored:
    """How a trained parameter will be stored.

    Attributes:
        dtype: each step rounds the parameter to it, so that the model computes with what will be stored.
        pace: factor on its learning rate.
        linear: whether a parameter of two dimensions is a linear map; otherwise it has AdamW.
    """

    dtype: torch.dtype
    pace: float = 1.0
    linear: bool = True


class MasterOptimiser:
    """AdamW, or Muon for the matrices, over named parameters of a model.

    Attributes:
        parameters: name → parameter of the model; gradients are read from its ``grad``.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        steps: int,
        rate: float,
        stored: Mapping[str, Stored] = MappingProxyType({}),
        method: Method = "adamw",
        group: Group = ALONE,
    ) -> None:
        """Prepare the first step.

        Args:
            parameters: name → parameter of the model.
            steps: in all.
            rate: the highest learning rate.
            stored: how parameters will be stored, by name; the others have the precision of the model.
            method: of matrices.
            group: processes with the same parameters, whose gradients are added up before each step.
        """
        self._group = group
        self.parameters = dict(parameters)
        self.steps, self.rate, self.done = steps, rate, 0
        self._stored = {name: stored.get(name, Stored(value.dtype)) for name, value in self.parameters.items()}
        self._masters = {
            name: parameter if self._is_exact(name) else nn.Parameter(parameter.detach().to(torch.float32, copy=True))
            for name, parameter in self.parameters.items()
        }
        self._fused = all(parameter.device.type in ("cpu", "cuda", "mps") for parameter in self._masters.values())
        self._methods: dict[str, Method] = {
            name: method if self._stored[name].linear and value.ndim == 2 else "adamw"
            for name, value in self.parameters.items()
        }
        self._optimisers = {kind: self._optimiser(kind) for kind in dict.fromkeys(self._methods.values())}

    def _optimiser(self, method: Method) -> torch.optim.Optimizer:
        """Return torch's optimiser of the parameters with a method; ``pace`` of a group is a factor on its rate."""
        paces: dict[float, list[nn.Parameter]] = {}
        for name, master in self._masters.items():
            if self._methods[name] == method:
                paces.setdefault(self._stored[name].pace, []).append(master)
        unit = _MUON_RMS if method == "muon" else 1.0
        groups = [{"params": masters, "pace": pace / unit} for pace, masters in paces.items()]
        if method == "muon":
            # A run in float32 often has no other arithmetic, and torch's iteration in bfloat16 would take all the time.
            half = any(value.dtype != torch.float32 for value in self.parameters.values())
            return (torch.optim.Muon if half else Float32Muon)(
                groups, lr=self.rate, momentum=_MOMENTUM, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            )
        return torch.optim.AdamW(groups, lr=self.rate, betas=_BETAS, weight_decay=0.0, fused=self._fused)

    def _is_exact(self, name: str) -> bool:
        """Tell whether the model and the checkpoint hold a parameter in float32, so that it needs no copy."""
        return self.parameters[name].dtype == self._stored[name].dtype == torch.float32

    def collect(self) -> None:
        """Add the gradients of parameters with copies to float32 sums, and clear them.

        Called after each backward pass of a step, so that sums over passes are not rounded to half precision.
        """
        for name, parameter in self.parameters.items():
            master, gradient = self._masters[name], parameter.grad
            if master is parameter or gradient is None:
                continue
            master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    def step(self, scale: float = 1.0) -> float:
        """Clip the gradients of all processes, take a step, round the masters into the model, and clear the gradients.

        Args:
            scale: factor on the gradients, such as 1 / number of accumulated tokens.

        Returns:
            Norm of all gradients before clipping, with ``scale``.

        Raises:
            NumericalError: a gradient is NaN or infinite; nothing has changed.
        """
        self.collect()
        for master in self._masters.values():
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad.mul_(scale)
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        self._group.total(gradients)
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.clear()
            raise NumericalError(
                f"the gradient of a training step has the norm {norm}",
                "lower the learning rate (--block-rate, --rate), or try --dtype float32",
            )
        torch.nn.utils.clip_grads_with_norm_(self._masters.values(), CLIP, torch.tensor(norm))
        for optimiser in self._optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = rate_at(self.done, self.steps, self.rate) * group["pace"]
            optimiser.step()
        self.clear()
        self.done += 1
        self._round()
        return norm

    def clear(self) -> None:
        """Remove all gradients."""
        for parameter in (*self.parameters.values(), *self._masters.values()):
            parameter.grad = None

    @torch.no_grad()
    def _round(self) -> None:
        for name, parameter in self.parameters.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name].to(self._stored[name].dtype))

    def state(self) -> dict[str, torch.Tensor]:
        """Return float32 weights and moments by name, for a later :meth:`restore`; not copied."""
        found: dict[str, torch.Tensor] = {}
        for name, master in self._masters.items():
            found[f"weight:{name}"] = master.detach()
            moments = self._optimisers[self._methods[name]].state[master] if self.done else {}
            found |= {f"{key}:{name}": moments[key] for key in _MOMENTS[self._methods[name]] if moments}
        return found

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, torch.Tensor], done: int) -> None:
        """Continue after ``done`` steps from the tensors of :meth:`state`, bit for bit.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        for name, master in self._masters.items():
            method = self._methods[name]
            keys = _MOMENTS[method] if done else ()
            for key in ("weight", *keys):
                stored = tensors.get(f"{key}:{name}")
                if stored is None or stored.shape != master.shape:
                    raise ValueError(f"no {key} of {name} with the shape {tuple(master.shape)}")
            master.copy_(tensors[f"weight:{name}"])
            if not done:
                continue
            state = {key: tensors[f"{key}:{name}"].clone().to(master) for key in keys}
            if method == "adamw":
                # Fused steps want the counter on the device, as AdamW itself creates it.
                state["step"] = torch.tensor(float(done), device=master.device if self._fused else "cpu")
            self._optimisers[method].state[master] = state
        self.done = done
        self._round()


def trained(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Let floating-point parameters require gradients, and return them by name."""
    found = {name: parameter for name, parameter in parameters if parameter.is_floating_point()}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found
