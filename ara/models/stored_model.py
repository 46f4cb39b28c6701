"""A model whose weights stay in its files: its modules without numbers, and its tensors one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from ara.errors import ModelError, first_line
from ara.models.completeness import check_range
from ara.models.shown import first_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StoredModel:
    """A model of transformers on the meta device, and where its tensors are.

    Args:
        model: result of ``from_pretrained`` on the meta device.
        paths: its safetensors files.
        name: of the model, for errors.
        load: loads the whole model into memory.

    Attributes:
        model: its parameters have the dtype that they would have in memory.
        load: as given.

    Raises:
        ModelError: a file is damaged.
    """

    def __init__(
        self, model: PreTrainedModel, paths: Iterable[Path], name: str, load: Callable[[], PreTrainedModel]
    ) -> None:
        self.model, self.load, self._name = model, load, name
        self._files: dict[str, Path] = {}
        self._dtypes = {key: tensor.dtype for key, tensor in model.state_dict().items()}
        for path in paths:
            with self._open(path) as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def converted(self) -> str | None:
        """Return why tensors cannot be taken from the files as they are, or ``None``: transformers converts some."""
        if getattr(self.model, "_weight_conversions", None):
            return "transformers converts weights of this family when it loads them"
        own = {key for key, _ in self.model.named_parameters()}
        renamed = sorted((own | _persistent_buffers(self.model)) - self._files.keys())
        return f"tensors have other names in the files: {first_names(renamed)}" if renamed else None

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, as ``from_pretrained`` would load it.

        Raises:
            ModelError: its file is damaged.
            NumericalError: it is beyond the range of float16.
        """
        with self._open(self._files[name]) as file:
            stored = file.get_tensor(name)
        dtype = self._dtypes[name]
        tensor = stored.to(dtype) if stored.is_floating_point() else stored
        if tensor.dtype == torch.float16 and stored.dtype != torch.float16:
            check_range([(name, tensor)], self._name)
        return tensor

    def _open(self, path: Path) -> safe_open:
        try:
            return safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is damaged ({first_line(error)})", "download the model again") from None


def _persistent_buffers(model: PreTrainedModel) -> set[str]:
    """Return the names of the buffers that a state holds."""
    return {key for key, _ in model.named_buffers()} & model.state_dict().keys()
