"""A cache of sensitivity tables: budgets, layouts and trainings of the same factors share one table."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ara.errors import DiskFullError
from ara.files import is_plain_file
from ara.progress import SILENT, Reporter
from ara.workspace.tensors import save_tensors, tensor_digests, written_aside

# Increase it when the computation or the file format of tables changes.
TABLE_FORMAT = 2


@dataclass(frozen=True, eq=False)
class SensitivityTable:
    """The loss of every rank of every layer.

    Attributes:
        losses: module path → (r + 1) float64, nats per token; entry k is that of keeping k components, entry r is 0.
        seconds: time of its computation.
    """

    losses: dict[str, torch.Tensor]
    seconds: float


@dataclass(frozen=True)
class TableCache:
    """A folder of tables.

    Attributes:
        folder: created if missing.
        factors: content hash of the decomposition.
        report: hears of tables read and tables discarded.
    """

    folder: Path
    factors: str
    report: Reporter = SILENT

    def get(
        self,
        windows: torch.Tensor,
        settings: dict[str, str | int],
        sizes: Mapping[str, int],
        make: Callable[[], SensitivityTable],
    ) -> SensitivityTable:
        """Return the table of the same factors, ``windows`` and ``settings`` from a file, or make and store it.

        A damaged file is reported and replaced. A table without ``sizes`` losses per layer, by module path, counts as
        damaged. A table that cannot be stored is returned with a warning.
        """
        text = hashlib.sha256(windows.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
        key = json.dumps(
            [TABLE_FORMAT, torch.__version__, self.factors, list(windows.shape), text, settings], sort_keys=True
        )
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        if os.path.lexists(path):
            try:
                found = _read(path, sizes)
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                self.report.warn(f"discarding the damaged sensitivity table {path} ({error})")
            else:
                self.report.fact(f"sensitivity table read from {path}")
                return found
        found = make()
        try:
            _write(path, found)
        except (DiskFullError, OSError) as error:
            self.report.warn(f"the sensitivity table could not be stored for later use ({error})")
        return found


def timed(make: Callable[[], dict[str, torch.Tensor]]) -> SensitivityTable:
    """Make a table and measure the time."""
    begun = time.monotonic()
    losses = make()
    return SensitivityTable(losses, time.monotonic() - begun)


def _read(path: Path, sizes: Mapping[str, int]) -> SensitivityTable:
    if not is_plain_file(path):
        raise ValueError("not a regular file")
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        losses = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    table = SensitivityTable(losses, float(about["seconds"]))
    if about["digest"] != _digest(table):
        raise ValueError("wrong checksum")
    shapes = {name: (tuple(one.shape), one.dtype) for name, one in losses.items()}
    if not math.isfinite(table.seconds) or shapes != {name: ((size,), torch.float64) for name, size in sizes.items()}:
        raise ValueError("its layers or sizes differ from those of the factors")
    return table


def _write(path: Path, table: SensitivityTable) -> None:
    about = {"digest": _digest(table), "seconds": repr(table.seconds)}
    with written_aside(path) as aside:
        save_tensors(aside, table.losses, about)


def _digest(table: SensitivityTable) -> str:
    parts = [tensor_digests(table.losses), table.seconds]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
