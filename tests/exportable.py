"""Exports of small checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ara.progress import SILENT
from export.config import ExportConfig
from export.onnx.settings import resolve
from export.onnx.stored_weights import Checkpoint
from export.onnx.writing import write_onnx


def exported(source: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    """Export a checkpoint folder for a processor, and return what the manifest would say about it."""
    folder.mkdir(exist_ok=True)
    config = resolve(ExportConfig(**{"execution_provider": "cpu", **settings}))
    return write_onnx(Checkpoint(source), folder, config, "0" * 64, SILENT).model_dump(mode="json")
