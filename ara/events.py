"""TensorBoard events of a training; the package tensorboard is optional."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ara.errors import UnavailableError


def event_writer_class() -> Any:
    """Return ``SummaryWriter`` of torch.

    Raises:
        UnavailableError: the package tensorboard is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UnavailableError(
            f"--tensorboard needs the package tensorboard ({error})",
            "pip install tensorboard, or omit the option: log.csv has the same numbers",
        ) from None
    return SummaryWriter


def write_events(folder: Path, rows: Iterable[tuple[int, Mapping[str, float | None]]]) -> list[Path]:
    """Replace the TensorBoard run in ``folder`` and return its files.

    Args:
        folder: of this run alone.
        rows: step and name → value; values that are ``None`` or NaN are left out.

    Raises:
        UnavailableError: the package tensorboard is missing.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with event_writer_class()(folder) as events:
        for step, values in rows:
            for name, value in values.items():
                if value is not None and not math.isnan(value):
                    events.add_scalar(name, value, step)
    return list(folder.iterdir())
