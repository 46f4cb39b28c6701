"""A cache of tables, such as the sensitivity table: budgets and trainings of the same factors share one."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ara.distributed.group import ALONE, Group
from ara.errors import DiskFullError
from ara.files import is_plain_file
from ara.progress import SILENT, Reporter
from ara.workspace.tensors import save_tensors, tensor_digests, written_aside

# Increase it when the computation or the file format of tables changes.
TABLE_FORMAT = 2


@dataclass(frozen=True, eq=False)
class LayerTable:
    """A vector for every layer, or shape of layers; who makes the table says what the entries are.

    Attributes:
        values: module path, or shape → float64.
        seconds: time of its computation.
    """

    values: dict[str, torch.Tensor]
    seconds: float


@dataclass(frozen=True)
class TableCache:
    """A folder of tables.

    Attributes:
        folder: created if missing.
        factors: content hash of the decomposition.
        report: hears of tables read and tables discarded.
        group: the processes that make tables together; process 0 alone reads and writes files.
    """

    folder: Path
    factors: str
    report: Reporter = SILENT
    group: Group = ALONE

    def get(
        self,
        windows: torch.Tensor,
        settings: dict[str, str | int],
        sizes: Mapping[str, int],
        make: Callable[[], LayerTable],
        what: str = "sensitivity table",
    ) -> LayerTable:
        """Return the table of the same factors, ``windows`` and ``settings``; see :func:`stored_table`."""
        text = hashlib.sha256(windows.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
        key = [torch.__version__, self.factors, list(windows.shape), text, settings]
        return stored_table(self.folder, key, sizes, make, what, self.report, group=self.group)


def stored_table(
    folder: Path,
    key: Sequence[Any],
    sizes: Mapping[str, int],
    make: Callable[[], LayerTable],
    what: str,
    report: Reporter,
    again: bool = False,
    group: Group = ALONE,
) -> LayerTable:
    """Return the table of a key from a file, or make and store it.

    A damaged file is reported and replaced. A table without ``sizes`` entries per name counts as damaged. A table that
    cannot be stored is returned with a warning.

    Args:
        folder: created if missing.
        key: JSON data; what determines the table.
        sizes: name → number of entries.
        make: computes the table.
        what: reports call the table so.
        report: hears of tables read and tables discarded.
        again: make the table even if there is a file, which is replaced.
        group: the processes that make the table together; process 0 alone reads and writes the file.
    """
    text = json.dumps([TABLE_FORMAT, *key], sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
    kept = _stored(path, sizes, what, report) if group.writes and not again else None
    if (kept := group.broadcast(kept)) is not None:
        return kept
    found = make()
    if group.writes:
        try:
            _write(path, found)
        except (DiskFullError, OSError) as error:
            report.warn(f"the {what} could not be stored for later use ({error})")
    return found


def _stored(path: Path, sizes: Mapping[str, int], what: str, report: Reporter) -> LayerTable | None:
    """Return the table in a file; ``None`` if there is no such file, or a damaged one."""
    if not os.path.lexists(path):
        return None
    try:
        found = _read(path, sizes)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        report.warn(f"discarding the damaged {what} {path} ({error})")
        return None
    report.fact(f"{what} read from {path}")
    return found


def _read(path: Path, sizes: Mapping[str, int]) -> LayerTable:
    if not is_plain_file(path):
        raise ValueError("not a regular file")
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    table = LayerTable(values, float(about["seconds"]))
    if about["digest"] != _digest(table):
        raise ValueError("wrong checksum")
    shapes = {name: (tuple(one.shape), one.dtype) for name, one in values.items()}
    if not math.isfinite(table.seconds) or shapes != {name: ((size,), torch.float64) for name, size in sizes.items()}:
        raise ValueError("its layers or sizes differ from those of the factors")
    return table


def _write(path: Path, table: LayerTable) -> None:
    about = {"digest": _digest(table), "seconds": repr(table.seconds)}
    with written_aside(path) as aside:
        save_tensors(aside, table.values, about)


def _digest(table: LayerTable) -> str:
    parts = [tensor_digests(table.values), table.seconds]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
