"""Optimisers of mask families: the family's own step, or Adam."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from ara.masks.mask_family import Cut, MaskFamily
from ara.masks.model import MaskGradients
from ara.masks.state import TrainingSettings, TrainingState


def optimiser_for(family: MaskFamily, settings: TrainingSettings, state: TrainingState) -> OwnStep | Adam:
    """Return the optimiser of ``family``, resumed from ``state``."""
    return (OwnStep if family.own_step else Adam)(family, settings, state)


class OwnStep:
    """Calls :meth:`MaskFamily.update`."""

    def __init__(self, family: MaskFamily, settings: TrainingSettings, state: TrainingState) -> None:
        self.family = family
        for name, value in family.parameters.items():
            if state.tensors:
                value.copy_(state.tensors[name])

    def step(self, cut: Cut, gradients: MaskGradients, progress: float) -> None:
        """Take one step."""
        self.family.update(gradients, progress)

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context with the parameters to deploy: the current ones."""
        return nullcontext()

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of all tensors that the next step depends on."""
        return {name: value.clone() for name, value in self.family.parameters.items()}


class Adam:
    """Adam (arXiv 1412.6980) with a cosine schedule and a moving average of the parameters."""

    def __init__(self, family: MaskFamily, settings: TrainingSettings, state: TrainingState) -> None:
        self.family, self.parameters, self.settings = family, family.parameters, settings
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.99))
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        if state.tensors:
            self._restore(state)

    def step(self, cut: Cut, gradients: MaskGradients, progress: float) -> None:
        """Take one step along the gradient of the masks and of the family's penalty."""
        loss = torch.stack([(cut.masks[name] * gradient).sum() for name, gradient in gradients.masks.items()]).sum()
        penalty = self.family.penalty()
        if penalty is not None:
            loss = loss + penalty
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        for name, value in self.parameters.items():
            self.average[name].lerp_(value.detach(), 1 - self.settings.average)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the parameters have their averaged values."""
        current = {name: value.detach().clone() for name, value in self.parameters.items()}
        self._assign(self.average)
        try:
            yield
        finally:
            self._assign(current)

    @torch.no_grad()
    def _assign(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in self.parameters.items():
            value.copy_(values[name])

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of all tensors that the next step depends on."""
        tensors: dict[str, torch.Tensor] = {}
        for name, value in self.parameters.items():
            moments = self.optimiser.state[value]
            tensors[f"{name}.value"] = value.detach().clone()
            tensors[f"{name}.average"] = self.average[name].clone()
            tensors[f"{name}.exp_avg"] = moments["exp_avg"].clone()
            tensors[f"{name}.exp_avg_sq"] = moments["exp_avg_sq"].clone()
        return tensors

    def _restore(self, state: TrainingState) -> None:
        self._assign({name: state.tensors[f"{name}.value"] for name in self.parameters})
        for name, value in self.parameters.items():
            self.average[name] = state.tensors[f"{name}.average"].clone()
            self.optimiser.state[value] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": state.tensors[f"{name}.exp_avg"].clone(),
                "exp_avg_sq": state.tensors[f"{name}.exp_avg_sq"].clone(),
            }
