"""The ONNX target: writes checkpoints as ONNX graphs, and runs them in ONNX Runtime.

This module imports neither torch nor ONNX Runtime; its methods do, when they are called.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ara.errors import UsageError, WorkspaceError
from ara.progress import Reporter
from ara.workspace.manifest import file_sha256
from ara.workspace.view import StageView
from export.base import Target
from export.config import ExportConfig
from export.onnx.export_report import DATA_FILE, ExportReport, Precision, read_report

if TYPE_CHECKING:
    from export.onnx.bench_runner import OnnxExport
    from export.onnx.layer_runner import OnnxLayers
    from export.onnx.runner import OnnxDecoder
    from export.onnx.torch_like import TorchLike


class OnnxTarget(Target):
    """Decoder graphs for ONNX Runtime; see :class:`export.base.Target` for every method."""

    name: ClassVar[str] = "onnx"
    title: ClassVar[str] = "ONNX"
    command: ClassVar[str] = "ara export --onnx"

    def resolve(self, config: ExportConfig, source: Path | None = None) -> ExportConfig:
        """Decide provider and precision."""
        from ara.models.checkpoint import is_rounded
        from export.onnx.settings import resolve

        return resolve(config, rounded=source is not None and is_rounded(source))

    def inputs(self, config: ExportConfig) -> list[Path]:
        """Return the dense graph of ``--rewrite``, if there is one."""
        dense = _dense_graph(config)
        return [dense] if dense else []

    def recorded(self, config: ExportConfig) -> dict[str, Any]:
        """Return the config with the checksum of the dense graph; its weights are compared with the factors instead."""
        dense = _dense_graph(config)
        return {**config.model_dump(mode="json"), "rewrite_sha256": file_sha256(dense) if dense else None}

    def result_name(self, checkpoint: str, config: ExportConfig) -> str:
        """Return the checkpoint's name with the precision, or with ``rewritten``."""
        return f"{checkpoint}-{'rewritten' if config.rewrite else config.precision}"

    def write(self, source: Path, folder: Path, config: ExportConfig, origin: str, report: Reporter) -> ExportReport:
        """Write the graph and compare it with torch."""
        from export.onnx.stored_weights import Checkpoint
        from export.onnx.writing import write_onnx

        return write_onnx(Checkpoint(source), folder, config, origin, report)

    def read_report(self, folder: Path) -> ExportReport:
        """Return ``ara_export.json``, checked."""
        return read_report(folder)

    def weight_files(self, folder: Path) -> list[Path]:
        """Return the external data file of the graph."""
        return [path for path in [folder / DATA_FILE] if path.is_file()]

    def for_eval(self, view: StageView, checkpoint: Path) -> Callable[[], TorchLike]:
        """Return a function that loads the graph."""

        def load() -> TorchLike:
            from transformers import AutoConfig

            from export.onnx.runner import OnnxDecoder
            from export.onnx.torch_like import TorchLike

            config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
            return TorchLike(OnnxDecoder(view.path), config).eval()

        return load

    def for_bench(self, view: StageView) -> OnnxExport:
        """Return the graph to be measured; one of another exporter is refused."""
        from export.onnx.bench_runner import OnnxExport

        about = read_report(view.path)
        if about.traced:
            raise WorkspaceError(
                f"{view.key} was written by transformers' own exporter: ara cannot count its multiplications",
                "name another export with --export",
            )
        if about.rewritten:
            raise WorkspaceError(
                f"{view.key} was made with --rewrite from another exporter's graph: ara has no matching dense one",
                "export without --rewrite to measure, or name another export with --export",
            )
        return OnnxExport(view)

    def for_generate(self, folder: Path) -> OnnxDecoder:
        """Load the graph into ONNX Runtime."""
        from export.onnx.runner import OnnxDecoder

        return OnnxDecoder(folder)

    def for_latency(self, precision: str | None, threads: int) -> OnnxLayers:
        """Return layers in ONNX Runtime on the CPU, in fp32 by default."""
        from export.onnx.layer_runner import OnnxLayers

        known: tuple[Precision, ...] = ("fp32", "int8")
        chosen = next((one for one in known if one == (precision or "fp32")), None)
        if chosen is None:
            raise UsageError(
                f"layers cannot be timed in {precision} in ONNX Runtime on the CPU", f"use {' or '.join(known)}"
            )
        return OnnxLayers(chosen, threads)


def _dense_graph(config: ExportConfig) -> Path | None:
    """Return the graph of ``--rewrite``, if the option is given; a missing file is a ``UsageError``."""
    if config.rewrite is None:
        return None
    # os.path refuses a link that leads back to itself, where Path raises.
    path = Path(os.path.realpath(config.rewrite))
    if not os.path.isfile(path):
        raise UsageError(f"there is no file {config.rewrite}", "--rewrite wants the .onnx file of a dense export")
    return path
