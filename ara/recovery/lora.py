"""LoRA adapters on the factorised layers, by PEFT (Hu et al., arXiv 2106.09685).

An adapter adds s D U to a weight, with D (out, r) and U (r, in). The two parts of a low-rank layer are ordinary linear
layers, and each gets its own adapter. A merged adapter changes the numbers in A (k, n) and B (m, k), so the rank of the
layer stays k.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ara.errors import UnavailableError
from ara.layout_names import LayoutName
from ara.layouts.modeling_ara import CompressedLinear, replace_linear
from ara.models.weights import LinearSpec
from ara.recovery.trainable import from_trainable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# s = alpha / r. With a fixed alpha, PEFT's default, s would fall with the rank.
_SCALE = 2


def peft() -> Any:
    """Return the package peft.

    Raises:
        UnavailableError: it is missing.
    """
    try:
        import peft as package
    except ImportError as error:
        raise UnavailableError(
            f"--train lora needs the package peft ({error})", "pip install peft, or use --train factors or --train all"
        ) from None
    return package


class Adapters:
    """Adapters on all factorised layers of a model.

    Attributes:
        model: the model; its layers hold the adapters until :meth:`merge` or :meth:`remove`.
    """

    def __init__(self, model: PreTrainedModel, specs: Sequence[LinearSpec], rank: int, seed: int) -> None:
        """Put adapters into the layers, in place; the model computes the same as before.

        Args:
            model: a compressed model.
            specs: its factorised layers.
            rank: r of every adapter.
            seed: of their random start.
        """
        self.model = model
        config = peft().LoraConfig(
            r=rank, lora_alpha=_SCALE * rank, target_modules=_parts(model, specs), task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(devices=[]), _quiet(), _unnamed(model):
            torch.manual_seed(seed)
            self._wrapped: Any = peft().get_peft_model(model, config)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return {name: value for name, value in self._wrapped.named_parameters() if value.requires_grad}

    def merge(self) -> None:
        """Add the adapters to the weights, and remove them."""
        self._wrapped.merge_and_unload()

    def save(self, folder: Path) -> None:
        """Write the adapters in PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors``."""
        with _quiet(), _unnamed(self.model):
            self._wrapped.save_pretrained(folder)

    def remove(self) -> None:
        """Remove the adapters; the weights are those of before."""
        self._wrapped.unload()


@contextmanager
def in_stored_layout(model: PreTrainedModel, layout: LayoutName) -> Iterator[None]:
    """Within this context the low-rank layers of ``model`` have the parts of ``layout``, with which they are stored.

    A separate adapter belongs to these parts. Afterwards the model has its former layers again.
    """
    former = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    try:
        from_trainable(model, layout, model.dtype)
        yield
    finally:
        for name, module in former.items():
            replace_linear(model, name, module)


def _parts(model: nn.Module, specs: Sequence[LinearSpec]) -> list[str]:
    """Return the paths of the linear modules that make up the factorised layers."""
    found = []
    for spec in specs:
        owner = spec.weight.owner(model)
        parts = [name for name, part in owner.named_modules() if isinstance(part, (nn.Linear, Conv1D))]
        found += [f"{spec.weight.name}.{name}" if name else spec.weight.name for name in parts]
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what PEFT says about GPT-2's transposed layers, which it handles, and about its own calls."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@contextmanager
def _unnamed(model: PreTrainedModel) -> Iterator[None]:
    """Hide the folder that ``model`` was loaded from, which PEFT writes into its config as the adapter's base model."""
    name = model.name_or_path
    model.name_or_path = ""
    try:
        yield
    finally:
        model.name_or_path = name
