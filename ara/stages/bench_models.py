"""The models that ``ara bench`` measures: dense and chosen, in torch or in the runtime of an export."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from ara.artifacts.checkpoint import CHECKPOINT, CheckpointResults, CheckpointSettings, label_of
from ara.artifacts.evaluation import DENSE
from ara.artifacts.factors import FactorsResults
from ara.config import BenchConfig
from ara.evaluation.speed import Runner, TorchRunner
from ara.models.checkpoint import load
from ara.models.placement import torch_dtype
from ara.models.sources import ModelSource
from ara.stages.common import Run
from ara.stages.model_folders import written
from ara.workspace.store import Workspace
from ara.workspace.view import StageView


@dataclass(frozen=True)
class BenchModel:
    """One model to measure.

    Attributes:
        name: dense, or the name of the checkpoint.
        load: loads the model; can be pickled, for a separate process.
        disk_bytes: size of its weights on disk.
        measurable: whether its peak memory can be measured.
    """

    name: str
    load: Callable[[], Runner]
    disk_bytes: int
    measurable: bool = True


@dataclass(frozen=True)
class BenchModels:
    """Dense and chosen, in one runtime.

    Attributes:
        models: dense first.
        device: where they run.
        precision: of their weights.
        each_bytes: upper bound of the memory of one model.
    """

    models: list[BenchModel]
    device: str
    precision: str
    each_bytes: int


class Exported(Protocol):
    """An export of the checkpoint, which can export the dense model in the same way; implemented outside of ``ara``."""

    @property
    def view(self) -> StageView:
        """The export in the workspace."""

    @property
    def device(self) -> str:
        """Where it runs, as a torch device name."""

    @property
    def precision(self) -> str:
        """Precision of its weights."""

    def chosen(self, name: str, checkpoint: Path, threads: int) -> BenchModel:
        """Return the existing export of the folder ``checkpoint``."""

    def dense(self, name: str, checkpoint: Path, output: Path, threads: int) -> BenchModel:
        """Export the dense folder ``checkpoint`` to ``output`` with the same settings."""


FindExport = Callable[[Workspace, StageView], Exported]


def in_torch(truncated: StageView, decomposition: StageView, source: ModelSource, config: BenchConfig) -> BenchModels:
    """Return dense model and checkpoint in torch; the dense model's size on disk is in the checkpoint's dtype."""
    results, dtype = CheckpointResults.read(truncated), torch_dtype(config.dtype)
    dense = partial(_load_dense, source.for_another_process(dtype), config.device, config.dtype)
    chosen = partial(_load_chosen, truncated.path / CHECKPOINT, config.device, config.dtype)
    models = [
        BenchModel(DENSE, dense, results.dense_weight_bytes),
        BenchModel(label_of(truncated), chosen, results.disk_bytes),
    ]
    parameters = FactorsResults.read(decomposition).model_parameters
    return BenchModels(models, config.device, config.dtype, parameters * dtype.itemsize)


def _load_dense(source: ModelSource, device: str, dtype: str) -> Runner:
    return TorchRunner(source.load_model(torch_dtype(dtype), device))


def _load_chosen(folder: Path, device: str, dtype: str) -> Runner:
    return TorchRunner(load(folder, device, dtype))


def in_other(
    truncated: StageView, source: ModelSource, exported: Exported, aside: Path, threads: int, run: Run
) -> BenchModels:
    """Return dense model and checkpoint in another runtime, the dense one exported into ``aside``."""
    run.report.fact(f"exporting the dense model temporarily, with the settings of {exported.view.key}")
    folder = aside / CHECKPOINT
    # In the checkpoint's dtype, so that the weights of both graphs are rounded alike.
    written(source, torch_dtype(CheckpointSettings.read(truncated).dtype), folder)
    dense = exported.dense(DENSE, folder, aside / "export", threads)
    shutil.rmtree(folder)
    chosen = exported.chosen(label_of(truncated), truncated.path / CHECKPOINT, threads)
    # Runtimes may keep a second copy of the weights, packed for their kernels.
    return BenchModels([dense, chosen], exported.device, exported.precision, 2 * dense.disk_bytes)
