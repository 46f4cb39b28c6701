"""Who moves the parameters of a mask family: the family itself, or Adam."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch

from ara.masks.mask_family import Cut, MaskFamily
from ara.masks.model import MaskGradients
from ara.masks.state import TrainingSettings, TrainingState


def learner_of(family: MaskFamily, settings: TrainingSettings, state: TrainingState) -> OwnStep | Adam:
    """Return what moves the parameters of ``family``, going on from ``state``."""
    return (OwnStep if family.own_step else Adam)(family, settings, state)


class OwnStep:
    """Lets the family move its parameters, and remembers them."""

    def __init__(self, family: MaskFamily, settings: TrainingSettings, state: TrainingState) -> None:
        self.family = family
        for name, value in family.parameters.items():
            if state.tensors:
                value.copy_(state.tensors[name])

    def learn(self, cut: Cut, found: MaskGradients, progress: float) -> None:
        """Take one step."""
        self.family.update(found, progress)

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the parameters are those to deploy: as they are."""
        return nullcontext()

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of everything that the next step depends on."""
        return {name: value.clone() for name, value in self.family.parameters.items()}


class Adam:
    """Adam (arXiv 1412.6980) with a cosine schedule, and a moving average of the parameters."""

    def __init__(self, family: MaskFamily, settings: TrainingSettings, state: TrainingState) -> None:
        self.family, self.parameters, self.settings = family, family.parameters, settings
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.99))
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        if state.tensors:
            self._restore(state)

    def learn(self, cut: Cut, found: MaskGradients, progress: float) -> None:
        """Take one step along the gradient of the masks and of the family's penalty."""
        loss = torch.stack([(cut.masks[name] * gradient).sum() for name, gradient in found.masks.items()]).sum()
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

    def averaged(self) -> _Swapped:
        """Return a context in which the parameters hold their averages."""
        return _Swapped(self.parameters, self.average)

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of everything that the next step depends on."""
        tensors: dict[str, torch.Tensor] = {}
        for name, value in self.parameters.items():
            moments = self.optimiser.state[value]
            tensors[f"{name}.value"] = value.detach().clone()
            tensors[f"{name}.average"] = self.average[name].clone()
            tensors[f"{name}.exp_avg"] = moments["exp_avg"].clone()
            tensors[f"{name}.exp_avg_sq"] = moments["exp_avg_sq"].clone()
        return tensors

    def _restore(self, state: TrainingState) -> None:
        for name, value in self.parameters.items():
            with torch.no_grad():
                value.copy_(state.tensors[f"{name}.value"])
            self.average[name] = state.tensors[f"{name}.average"].clone()
            self.optimiser.state[value] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": state.tensors[f"{name}.exp_avg"].clone(),
                "exp_avg_sq": state.tensors[f"{name}.exp_avg_sq"].clone(),
            }


class _Swapped:
    """Puts other values into leaf tensors, and back."""

    def __init__(self, parameters: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
        self.parameters, self.values = parameters, values
        self.kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> None:
        for name, value in self.parameters.items():
            self.kept[name] = value.detach().clone()
            value.copy_(self.values[name])

    @torch.no_grad()
    def __exit__(self, *error: object) -> None:
        for name, value in self.parameters.items():
            value.copy_(self.kept[name])
