"""Exported graphs for ``ara bench``: the checkpoint's graph, and a dense one made with the same settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ara.evaluation.cost import Case, Cost, cost_of
from ara.evaluation.speed import Prepared
from ara.layouts import layout_named
from ara.stages.bench_models import BenchModel
from ara.stages.common import Run
from ara.workspace.view import StageView
from export.config import ExportConfig
from export.onnx.export_report import DATA_FILE, ExportReport, read_report
from export.onnx.families import FAMILIES
from export.onnx.few_bits import is_expanded
from export.onnx.quantize import BITS, BLOCK
from export.onnx.runner import OnnxDecoder
from export.onnx.stored_weights import Checkpoint
from export.onnx.writing import model_config
from export.stage import export_folder


class OnnxRunner:
    """An exported graph in ONNX Runtime.

    Args:
        folder: written by ``ara export``.
        parameters: number of parameters of its checkpoint.
        cost: what a pass computes and reads.
        threads: CPU threads; ONNX Runtime's choice by default.
    """

    def __init__(self, folder: Path, parameters: int, cost: Cost, threads: int | None = None) -> None:
        self._decoder = OnnxDecoder(folder, threads=threads)
        self.parameters, self.cost = parameters, cost
        self.weight_bytes = (folder / DATA_FILE).stat().st_size

    def prepare(self, case: Case) -> Prepared:
        """Bind caches for all positions, with a past of zeros; each pass overwrites the results of the previous one."""
        decoder = self._decoder
        ids = np.random.default_rng(0).integers(decoder.vocabulary, size=(case.batch, case.new))
        mask = np.ones((case.batch, case.past + case.new), np.int64)
        bound = decoder.bind(case.batch, mask.shape[1])
        return Prepared(lambda: decoder.step(bound, ids, mask))


@dataclass(frozen=True)
class OnnxExport:
    """An export of a checkpoint in the workspace; see :class:`ara.stages.bench_models.Exported`."""

    view: StageView

    @property
    def device(self) -> str:
        """Device on which it runs, as torch names it."""
        return self._about.execution_provider

    @property
    def precision(self) -> str:
        """Precision of its weights."""
        return self._about.precision

    def chosen(self, name: str, checkpoint: Path, threads: int) -> BenchModel:
        """Return this export as a model to measure; ``checkpoint`` is the folder that it was made from."""
        return _bench_model(name, self.view.path, self._about, checkpoint, threads)

    def dense(self, name: str, checkpoint: Path, output: Path, threads: int) -> BenchModel:
        """Export the dense folder ``checkpoint`` to ``output`` with the same settings."""
        about = self._about
        config = ExportConfig(
            precision=about.precision,
            execution_provider=about.execution_provider,
            merge_shared_inputs=about.merge_shared_inputs,
            last_logits=about.last_logits,
            parity=False,
        )
        # Without a reporter: the warning that the checkpoint is dense would be wrong here.
        export_folder(config, Run(output.parent), checkpoint, output)
        return _bench_model(name, output, read_report(output), checkpoint, threads)

    @property
    def _about(self) -> ExportReport:
        return read_report(self.view.path)


def count_checkpoint(checkpoint: Checkpoint, about: ExportReport) -> Cost:
    """Return the multiplications and bytes of a pass through a graph, from the shapes of the checkpoint's tensors.

    Args:
        checkpoint: compressed or dense.
        about: precision and form of the graph.
    """
    config = model_config(checkpoint.folder)
    number = 2 if about.execution_provider == "cuda" or about.precision == "fp16" else 4
    head = config.vocab_size * config.hidden_size
    matrices = {
        name.removesuffix(".weight"): math.prod(checkpoint.shape(name))
        for name in checkpoint.names()
        if name.startswith(f"{checkpoint.modules.blocks}.") and len(checkpoint.shape(name)) == 2
    }
    every = sum(matrices.values())
    mixture = FAMILIES[config.model_type].mixture if config.model_type in FAMILIES else None
    inside = None if mixture is None else f".{mixture.path}."
    experts = sum(count for path, count in matrices.items() if inside is not None and inside in path)
    matrices[checkpoint.modules.head] = head
    total = sum(count * _weight_bytes(checkpoint, about, path, number) for path, count in matrices.items())
    return cost_of(
        config,
        linear=every - experts,
        experts=experts,
        head=head,
        weight_bytes=total / (every + head),
        cache_bytes=number,
        last_logits=about.last_logits,
    )


def _weight_bytes(checkpoint: Checkpoint, about: ExportReport, path: str, number: int) -> float:
    """Return the bytes that a pass reads per weight of the matrix that is multiplied at ``path``.

    Args:
        checkpoint: that the graph was made from.
        about: precision and provider of the graph.
        path: of a linear layer, a part of one, or the head.
        number: bytes of an activation.
    """
    exact = about.precision != "int8" or (about.fallback is not None and path in about.fallback.matrices)
    rounding = checkpoint.rounded.get(checkpoint.owner(path))
    if rounding is None:
        # ONNX Runtime widens matrices in 16 bits to the type of the activations when it loads the graph.
        return number if exact else BITS / 8 + number / BLOCK
    if exact and is_expanded(rounding, about.execution_provider):
        return number
    bits, block, zero_points = rounding
    return bits / 8 + (number + zero_points * bits / 8) / block


def parameters_of(checkpoint: Checkpoint) -> int:
    """Return the number of parameters of a checkpoint; the indices of a layout do not count."""
    indices = tuple(f".{name}" for name in layout_named(checkpoint.layout).indices)
    return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names() if not name.endswith(indices))


def _bench_model(name: str, folder: Path, about: ExportReport, source: Path, threads: int) -> BenchModel:
    checkpoint = Checkpoint(source)
    return BenchModel(
        name,
        partial(OnnxRunner, folder, parameters_of(checkpoint), count_checkpoint(checkpoint, about), threads),
        sum(record.bytes for record in about.files.values()),
        # ONNX Runtime does not report its memory on a GPU.
        measurable=about.execution_provider == "cpu",
    )
