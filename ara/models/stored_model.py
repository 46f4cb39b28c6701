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
from ara.models.stored_names import Fused, fused_parameters, keeps_names, only_renames, sources_of

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
        model: its parameters have the dtype that they would have in memory; experts are separate layers.
        load: as given.
        fused: the parameters that the experts had, and that :meth:`read` returns as well.

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
        self.fused = fused_parameters(model)
        self._parts = [part for fused in self.fused.values() for part in fused.parts]
        self._sources = sources_of(model, self._files)

    def converted(self, separate: bool = False) -> str | None:
        """Return why tensors cannot be taken from the files, or ``None``: transformers computes some from others.

        Args:
            separate: whether experts are separate in what is written from them. transformers reads the names in it as
                they are, else by the rules of the family.
        """
        own = {key for key, _ in self.model.named_parameters()} | _persistent_buffers(self.model)
        missing = sorted(own - self._sources.keys())
        if getattr(self.model, "_weight_conversions", None):
            names = sorted({*own, *self.fused} - {*self._parts})
            known = separate or only_renames(self.model, names) or (bool(self.fused) and keeps_names(self.model, names))
            return None if known and not missing else "transformers converts weights of this family when it loads them"
        return f"the files lack {first_names(missing)}" if missing else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of the tensors that :meth:`read` returns, but for those of :attr:`fused`."""
        own = self.model.state_dict()
        return {name: tuple(own[name].shape) for name in self._sources if name in own}

    @property
    def merged(self) -> bool:
        """Whether transformers merges experts while it loads them, so that it cannot map their weights."""
        sources = [self._sources[part] for part in self._parts if part in self._sources]
        return any(source.expert is None and not source.stacked for source in sources)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, as ``from_pretrained`` would load it, or one of :attr:`fused`.

        Raises:
            ModelError: its file is damaged.
            NumericalError: it is beyond the range of float16.
        """
        if (fused := self.fused.get(name)) is not None:
            return join_experts(map(self.read, fused.parts), fused)
        source = self._sources[name]
        parts = []
        for key in source.keys:
            with self._open(self._files[key]) as file:
                part = file.get_tensor(key) if source.expert is None else file.get_slice(key)[source.expert]
            part = part.mT if source.transposed else part
            parts.append(part.flatten(0, 1) if source.stacked else part)
        stored = parts[0] if len(parts) == 1 else torch.cat(parts)
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


def join_experts(parts: Iterable[torch.Tensor], fused: Fused) -> torch.Tensor:
    """Return the parameter (E, …) of experts from their tensors."""
    stacked = torch.cat(list(parts)).unflatten(0, (fused.count, -1))
    return stacked.mT.contiguous() if fused.transposed else stacked


def _persistent_buffers(model: PreTrainedModel) -> set[str]:
    """Return the names of the buffers that a state holds."""
    return {key for key, _ in model.named_buffers()} & model.state_dict().keys()
