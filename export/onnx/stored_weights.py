"""Weights of a checkpoint, read tensor by tensor from its safetensors files; the model is never loaded as a whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open

from ara.errors import ModelError, UnsupportedModelError
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.layouts import layout_named
from ara.layouts.modeling_ara import NUMBERS, QUANT_METHOD, AraConfig, RoundedMatrix
from ara.models.checkpoint import quantization_of, read_config, stored_checkpoint
from ara.models.folder import INDEX, SINGLE, read_index, read_shapes
from ara.models.multimodal import is_multimodal
from ara.models.stored_model import StoredModel
from export.onnx.families import FAMILIES, Names

_AGAIN = "write the checkpoint again: ara truncate --force"


@dataclass(frozen=True)
class LinearLayer:
    """How a linear layer is stored.

    Attributes:
        path: of the module.
        m: out features.
        n: in features.
        rank: k; ``None`` for a dense layer.
        layout: of a low-rank layer; ``None`` for a dense one.
        bias: name of the bias (m), or ``None``.
        block: outputs that a pivoted layer's order permutes as one unit.
    """

    path: str
    m: int
    n: int
    rank: int | None
    layout: LayoutName | None
    bias: str | None
    block: int = 1


class Rounding(NamedTuple):
    """How a matrix of few bits is stored; see :class:`ara.layouts.modeling_ara.RoundedMatrix`."""

    bits: int
    block: int
    zero_points: bool


class Checkpoint:
    """A Hugging Face folder, compressed or dense.

    Args:
        folder: contains ``config.json`` and safetensors files.

    Attributes:
        modules: paths of its modules: those of its family, or Llama's if that is unknown.
        ranks: module path → rank of the low-rank layers.
        layout: of these layers.
        rounded: path of a matrix of few bits → how it is stored. Its name among the tensors is ``<path>.weight``, as if
            it were an ordinary one.

    Raises:
        UnsupportedModelError: a model that also reads pictures or sound, or whose experts share a factor.
        ModelError: the folder is no checkpoint, a shard is missing or damaged, or an ARA format that is too new.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        kind = str(self.config.get("model_type"))
        if is_multimodal(kind):
            raise UnsupportedModelError(
                f"a {kind} model reads more than text, and ARA's graphs read nothing else",
                "use transformers: ara.load and AutoProcessor",
            )
        family = FAMILIES.get(kind)
        self.modules = Names() if family is None else family.names
        quantization = quantization_of(folder, self.config)
        method = quantization.get("quant_method")
        if method not in (None, QUANT_METHOD):
            raise ModelError(
                f"{folder} is quantised by {method!r}; only dense and ARA checkpoints can be exported",
                "export the checkpoint of ara truncate",
            )
        self.ranks: dict[str, int] = {}
        self.layout = DEFAULT_LAYOUT
        self.rounded: dict[str, Rounding] = {}
        # Names of dense weights that the files have as (n, m).
        self._transposed: set[str] = set()
        # Shapes of matrices of few bits; the files show their inputs only up to whole blocks.
        self._matrices: dict[str, tuple[int, ...]] = {}
        if method == QUANT_METHOD:
            try:
                ara = AraConfig(**{key: value for key, value in quantization.items() if key != "quant_method"})
            except (ValueError, TypeError) as error:
                raise ModelError(f"{folder} cannot be read: {error}", _AGAIN) from None
            if ara.shared_experts:
                raise UnsupportedModelError(
                    f"the experts of {folder} share a factor (--share-experts), and ARA's graphs compute each expert "
                    "from matrices of its own",
                    "use transformers, decompose without --share-experts, or write a dense checkpoint: "
                    "ara truncate --densify",
                )
            self.ranks, self.layout = ara.ranks, cast(LayoutName, ara.layout)
            self.rounded = {path: Rounding(*entry) for path, entry in ara.rounded.items()}
        self._files = _files(folder)
        self._shapes = _shapes(self._files)
        # Files have dense experts in one of several forms, which the rules of transformers tell apart.
        self._mixture: StoredModel | None = None
        if family is not None and family.mixture is not None:
            self._mixture = stored_checkpoint(folder)
            self._shapes = self._mixture.shapes
        for path, (bits, block, _) in self.rounded.items():
            m, width = self._stored(f"{path}.steps")
            self._matrices[f"{path}.weight"] = m, width * 8 // bits // block * block
        unknown = [path for path in self.ranks if not self.has(f"{path}.A.weight")]
        if unknown:
            raise ModelError(
                f"{folder}/config.json gives {unknown[0]} a rank (quantization_config.ranks), and no "
                f"{unknown[0]}.A.weight is stored{f'; {len(unknown)} such layers in all' if len(unknown) > 1 else ''}",
                _AGAIN,
            )

    @property
    def compressed(self) -> bool:
        """Whether it has low-rank layers, or matrices of few bits."""
        return bool(self.ranks or self.rounded)

    def names(self) -> list[str]:
        """List the tensors, without the empty one that makes software without ARA support refuse the checkpoint."""
        parts = {f"{path}.{part}" for path in self.rounded for part in NUMBERS}
        plain = [name for name, shape in self._shapes.items() if shape != (0,) and name not in parts]
        return [*plain, *self._matrices]

    def has(self, name: str) -> bool:
        """Tell whether a tensor exists."""
        return name in self._matrices or name in self._shapes

    def owner(self, path: str) -> str:
        """Return the path whose matrix is multiplied at ``path``: a tied head has none of its own."""
        return self.modules.embedding if path == self.modules.head and not self.has(f"{path}.weight") else path

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises:
            ModelError: it does not exist.
        """
        found = self._matrices[name] if name in self._matrices else self._stored(name)
        return found[::-1] if name in self._transposed else found

    def _stored(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise ModelError(f"{self.folder} has no tensor {name}", _AGAIN)
        return self._shapes[name]

    def expect(self, name: str, *shape: int) -> str:
        """Return ``name`` if the tensor has this shape.

        Raises:
            ModelError: it has another one, or does not exist.
        """
        if name in self._matrices:
            self._expect_rounded(name.removesuffix(".weight"), *shape)
            self._matrices[name] = shape
        found = self.shape(name)
        if found != shape:
            raise ModelError(
                f"{name} in {self.folder} has shape {list(found)}, expected {list(shape)}",
                "the files do not belong together: write the checkpoint again: ara truncate --force",
            )
        return name

    def _expect_rounded(self, path: str, m: int, n: int) -> None:
        """Check the shapes of the numbers of an (m, n) matrix of few bits."""
        bits, block, zero_points = self.rounded[path]
        blocks = -(-n // block)
        self.expect(f"{path}.steps", m, blocks * block * bits // 8)
        self.expect(f"{path}.scales", m, blocks)
        if zero_points:
            self.expect(f"{path}.zeros", m, -(-blocks * bits // 8))

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, in the dtype of the file; a matrix of few bits as float32.

        Raises:
            ModelError: the file cannot be read.
        """
        if name in self._matrices:
            path = name.removesuffix(".weight")
            m, n = self._matrices[name]
            matrix = RoundedMatrix(m, n, *self.rounded[path])
            numbers = {part: self.tensor(f"{path}.{part}") for part in NUMBERS if self.has(f"{path}.{part}")}
            matrix.load_state_dict(numbers, assign=True)
            return matrix.weight
        if self._mixture is not None:
            return self._mixture.read(name)
        try:
            with safe_open(self._files[name], "pt") as file:
                tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{name} cannot be read from {self._files[name]} ({error})", _AGAIN) from None
        return tensor.T if name in self._transposed else tensor

    def linear(self, path: str, m: int, n: int, *, transposed: bool = False) -> LinearLayer:
        """Return how the linear layer at ``path`` is stored, after checking its shapes.

        Args:
            path: of the module.
            m: out features.
            n: in features.
            transposed: whether the file has a dense weight as (n, m), like those of a ``Conv1D``. From then on
                :meth:`shape` and :meth:`tensor` give it as (m, n).

        Raises:
            ModelError: a tensor is missing or has another shape.
        """
        rank = self.ranks.get(path)
        tensors: Mapping[str, tuple[int, ...]]
        if rank is None:
            tensors, bias = {"weight": (m, n)}, f"{path}.bias"
            if transposed and path not in self.rounded:
                self._transposed.add(f"{path}.weight")
        else:
            layout = layout_named(self.layout)
            tensors, bias = layout.store(m, n, rank), f"{path}.{layout.bias}"
        for name, shape in tensors.items():
            self.expect(f"{path}.{name}", *shape)
        stored = self.expect(bias, m) if self.has(bias) else None
        return LinearLayer(path, m, n, rank, None if rank is None else self.layout, stored)


def _files(folder: Path) -> Mapping[str, Path]:
    """Return tensor name → file.

    Raises:
        ModelError: a file is missing.
    """
    index = folder / INDEX
    if not os.path.lexists(index):
        single = folder / SINGLE
        if not single.is_file():
            raise ModelError(f"{folder} holds no {SINGLE}", _AGAIN)
        return _Everything(single)
    return read_index(index, _AGAIN)


class _Everything(dict[str, Path]):
    """Maps every tensor name to one file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __missing__(self, name: str) -> Path:
        return self.path


def _shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    paths = [files.path] if isinstance(files, _Everything) else sorted(set(files.values()))
    shapes = read_shapes(paths, _AGAIN)
    return {name: shape for name, shape in shapes.items() if name in files or isinstance(files, _Everything)}
