"""Second moments that were kept in files, one matrix for all layers with the same input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from ara.calibration.moments import from_triangle


@dataclass(frozen=True)
class KeptMoment:
    """Where the second moment of a layer's inputs is.

    Attributes:
        path: safetensors file.
        tensor: name of the packed triangle in it, see :func:`ara.calibration.moments.packed_triangle`.
        n: width of the inputs.
    """

    path: Path
    tensor: str
    n: int


class KeptMoments(Mapping[str, torch.Tensor]):
    """Module path → G (n, n) float32 on the CPU, read when it is asked for; only the last one stays in memory."""

    def __init__(self, places: Mapping[str, KeptMoment]) -> None:
        self._places = dict(places)
        self._last: tuple[KeptMoment, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        place = self._places[name]
        if self._last is None or self._last[0] != place:
            with safe_open(place.path, "pt") as file:
                self._last = place, from_triangle(file.get_tensor(place.tensor), place.n)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
