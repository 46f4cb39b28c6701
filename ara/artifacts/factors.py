"""The kind ``factors``: factors of every factorised layer, of all or of the lower ranks, one file per decoder block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, Strict

from ara.artifacts.base import LEFT_OUT, Count, Least1, Part, Results, Settings, Share, StoredDtype
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.workspace.manifest import Manifest
from ara.workspace.view import StageView

if TYPE_CHECKING:
    from ara.models.weights import LinearSpec


@dataclass(frozen=True)
class FactorsSettings(Settings):
    """The settings that later stages read; see :class:`ara.config.DecomposeConfig`.

    Attributes:
        text: the calibration text with all shares, see :mod:`ara.data.mixtures`; ``None`` if the method needs none and
            none was given.
        dtype: in which the model ran.
        max_keep: ranks above this share of a layer's parameters were not stored; ``None`` if all were.
        factors_dtype: of the stored factors, if it is another one than ``dtype``.
    """

    method: str
    text: str | None
    samples: Least1
    seq_len: Annotated[int, Strict(), Field(ge=2, lt=2**63)]
    seed: Count
    dtype: StoredDtype
    max_keep: Share | None = None
    factors_dtype: StoredDtype | None = None

    @property
    def stored_dtype(self) -> StoredDtype:
        """The dtype of the stored factors, and of checkpoints unless another one is asked for."""
        return self.factors_dtype or self.dtype


@dataclass(frozen=True)
class LayerShape(Part):
    """Name, place and widths of a linear layer; see :class:`ara.models.weights.LinearSpec`."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    name: str
    layer: Count
    kind: str
    m: Least1
    n: Least1


@dataclass(frozen=True)
class FactorisedLayer(LayerShape):
    """One factorised layer.

    Attributes:
        stored: largest rank whose factors are stored; ``None`` for all ranks.
        experts: see :class:`ara.models.weights.LinearSpec`; left out if it is ``None``, which means 1.
    """

    stored: Least1 | None = field(default=None, metadata=LEFT_OUT)
    experts: Annotated[int, Strict(), Field(ge=2, lt=2**63)] | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class TextPart(Part):
    """One text of the calibration text.

    Attributes:
        name: as options name it.
        share: of the windows that it was to give, in (0, 1].
        origin: where it came from, in words.
        tokens: in the windows that it gave.
    """

    name: str
    share: Annotated[float, Field(gt=0, le=1)]
    origin: str
    tokens: Count


@dataclass(frozen=True)
class FactorsResults(Results):
    """Results of ``ara decompose``.

    Attributes:
        modules: the factorised layers, in the order of the model.
        model_parameters: of the whole dense model.
        linear_parameters: of the factorised layers before the factorisation.
        text: source of the calibration text, with the shares of a mixture; ``None`` for a method without calibration.
        parts: of the calibration text; empty in older results and for a method without calibration.
        windows: (count, tokens) of the calibration windows.
        windows_sha256: checksum of their tokens.
        moments: module path → the layer in the same block whose name the second moment of its inputs has, in
            :func:`moments_file`; ``None`` if no moments were kept.
    """

    Settings = FactorsSettings
    modules: tuple[FactorisedLayer, ...]
    model_parameters: Count
    linear_parameters: Count
    text: str | None = None
    parts: tuple[TextPart, ...] = ()
    windows: tuple[Count, ...] | None = None
    windows_sha256: str | None = None
    moments: Mapping[str, str] | None = field(default=None, metadata=LEFT_OUT)

    @classmethod
    def problem(cls, manifest: Manifest) -> str | None:
        """Return what is wrong with settings, results or the table of tensors, or ``None``."""
        if (found := super().problem(manifest)) is not None:
            return found
        results = cls.parse(manifest.results)
        return _layers_problem(manifest, results) or _moments_problem(manifest, results)


def specs_of(decomposition: StageView, layout: LayoutName = DEFAULT_LAYOUT) -> list[LinearSpec]:
    """Return the factorised layers of a decomposition, stored in ``layout`` and in the precision of the factors."""
    from ara.models.placement import torch_dtype
    from ara.models.weights import LinearSpec

    bits = 8 * torch_dtype(FactorsSettings.read(decomposition).stored_dtype).itemsize
    layers = FactorsResults.read(decomposition).modules
    return [
        LinearSpec(**asdict(replace(layer, experts=layer.experts or 1)), layout=layout, bits=bits) for layer in layers
    ]


def layer_file(layer: int) -> str:
    """Name of the file with the factors of one decoder block."""
    return f"layer-{layer:03d}.safetensors"


def moments_file(layer: int) -> str:
    """Name of the file with the second moments of the inputs of one decoder block, if they are kept."""
    return f"moments-{layer:03d}.safetensors"


def moment_name(layer: str) -> str:
    """Name of the tensor with the second moment G (n, n) of a layer's inputs: its upper triangle, row after row."""
    return f"{layer}.moment"


def factor_files(decomposition: StageView, specs: Sequence[LinearSpec]) -> dict[str, Path]:
    """Return module path → file with its factors."""
    return {spec.name: decomposition.path / layer_file(spec.layer) for spec in specs}


def _layers_problem(manifest: Manifest, results: FactorsResults) -> str | None:
    """Check that every layer has tensors A (k, n), B (m, k) and spectrum (r) in its block's file; k: stored rank."""
    seen: set[str] = set()
    for layer in results.modules:
        if layer.name in seen:
            return f"results: layer {layer.name!r} is listed twice"
        seen.add(layer.name)
        r = min(layer.m, layer.n)
        k = r if layer.stored is None else layer.stored
        if layer.m % (layer.experts or 1):
            return f"results: layer {layer.name!r} has {layer.m} outputs, which {layer.experts} experts cannot share"
        if k > r:
            return f"results: layer {layer.name!r} stores ranks up to {k}, more than its full rank {r}"
        shapes: dict[str, tuple[int, ...]] = {"A": (k, layer.n), "B": (layer.m, k), "spectrum": (r,)}
        for part, shape in shapes.items():
            record: Any = manifest.tensors.get(f"{layer.name}.{part}")
            if record is None or record.shape != shape or record.file != layer_file(layer.layer):
                found = "there is none" if record is None else f"it has {list(record.shape)} in {record.file}"
                return f"results: layer {layer.name!r} needs a tensor {part} of shape {list(shape)}, {found}"
    return None


def _moments_problem(manifest: Manifest, results: FactorsResults) -> str | None:
    """Check that every layer has a second moment of its width in the file of its block, if moments were kept."""
    if results.moments is None:
        return None
    layers = {layer.name: layer for layer in results.modules}
    if results.moments.keys() != layers.keys():
        return "results: the kept moments are not those of the layers"
    for name, leader in results.moments.items():
        layer, other = layers[name], layers.get(leader)
        if other is None or (other.layer, other.n) != (layer.layer, layer.n):
            return f"results: layer {name!r} cannot have the moment of {leader!r}"
        shape = (layer.n * (layer.n + 1) // 2,)
        record: Any = manifest.tensors.get(moment_name(leader))
        if record is None or record.shape != shape or record.file != moments_file(layer.layer):
            found = "there is none" if record is None else f"it has {list(record.shape)} in {record.file}"
            return f"results: layer {name!r} needs a moment of shape {list(shape)}, {found}"
    return None
