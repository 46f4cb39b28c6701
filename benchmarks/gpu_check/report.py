"""The document with all results, and the tables at the end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ara.environment import machine, now, versions
from ara.evaluation.cost import Case
from ara.evaluation.timing import Spread
from ara.jsonfile import dump
from ara_cli.console import Column, Console
from ara_cli.formatting import seconds_text
from benchmarks.gpu_check.outcome import Outcome
from benchmarks.gpu_check.running import CheckEntry
from benchmarks.gpu_check.setting import Setting
from benchmarks.inference import Row, show
from benchmarks.row_file import commit

_NVIDIA_SMI = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm")


def document(setting: Setting, budget: float) -> dict[str, Any]:
    """Return the document without checks: what machine, code and settings they run on."""
    return {
        "format": 1,
        "started": now(),
        "commit": commit(),
        "rehearsal": setting.device == "cpu",
        "setting": setting.model_dump(mode="json", exclude={"workspace"}),
        "budget_seconds": budget,
        "machine": machine(),
        "gpu": gpu(),
        "versions": versions(),
        "seconds": 0.0,
        "checks": {},
    }


def gpu() -> dict[str, Any] | None:
    """Return driver and libraries of the GPU, ``None`` without one; what nvidia-smi does not say is left out."""
    if not torch.cuda.is_available():
        return None
    found: dict[str, Any] = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    command = ["nvidia-smi", f"--query-gpu={','.join(_NVIDIA_SMI)}", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        found["nvidia_smi"] = [dict(zip(_NVIDIA_SMI, line.split(", "), strict=False)) for line in lines]
    return found


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Write the document; the file is replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(dump(results, path.name, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


def summarise(console: Console, outcomes: Sequence[tuple[CheckEntry, Outcome]]) -> None:
    """Print the measured speeds, and the checks in one table."""
    for _, outcome in outcomes:
        cases: dict[Case, list[Row]] = {}
        for values in outcome.numbers.get("rows", ()):
            row = Row(**{**values, "case": Case(**values["case"]), "ratio": Spread(**values["ratio"])})
            cases.setdefault(row.case, []).append(row)
        for rows in cases.values():
            show(console, rows)
    table = [(check.name, found.status, seconds_text(found.seconds), found.detail) for check, found in outcomes]
    columns = [Column("check", "left"), Column("result", "left"), Column("time"), Column("found", "left")]
    counts = [sum(found.status == status for _, found in outcomes) for status in ("passed", "failed", "not run")]
    console.table("GPU check: {} passed, {} failed, {} not run".format(*counts), columns, table)
