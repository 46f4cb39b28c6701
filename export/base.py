"""The interface of an export target: writing checkpoints for a runtime, and running its exports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ara.layout_names import LayoutName
from ara.progress import Reporter
from ara.workspace.manifest import FileRecord
from ara.workspace.view import StageView
from export.config import ExportConfig

if TYPE_CHECKING:
    import numpy as np

    from ara.evaluation.layer_times import LayerRunner
    from ara.evaluation.sampling import Sampler
    from ara.stages.bench_models import Exported

# Every export has a file of this name; a folder without it is not an export.
REPORT_FILE = "ara_export.json"


class TargetReport(Protocol):
    """The contents of ``ara_export.json``: a pydantic model of the target with at least these fields.

    Attributes:
        precision: of the weights, as the command line names it.
        layout: how the checkpoint stores its low-rank layers.
        ranks: module path → rank of every low-rank layer; empty for a dense checkpoint.
        files: name → size and checksum of the files that the runtime reads.
        last_logits: whether the export gives the logits of the last position only.
        parity: the comparison with torch; ``None`` if there was none.
    """

    @property
    def precision(self) -> str: ...  # noqa: D102 – described above

    @property
    def layout(self) -> LayoutName: ...  # noqa: D102

    @property
    def ranks(self) -> Mapping[str, int]: ...  # noqa: D102

    @property
    def files(self) -> Mapping[str, FileRecord]: ...  # noqa: D102

    @property
    def last_logits(self) -> bool: ...  # noqa: D102

    @property
    def parity(self) -> Any: ...  # noqa: D102

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Return the report as plain data; with ``mode="json"`` only types that JSON has."""


class TextDecoder(Protocol):
    """A loaded model that continues token ids: an export, or a checkpoint in torch."""

    @property
    def context(self) -> int | None:
        """Most positions of prompt and answer together; ``None``: no limit is known."""

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids that the model knows; ``None``: it does not say."""

    def generate(self, ids: np.ndarray, max_new_tokens: int, *, sampler: Sampler | None = None) -> Iterator[int]:
        """Yield the next tokens of a prompt (s) int64, one by one, until the model ends the text.

        ``sampler`` draws them; without it each is the most likely one.
        """


class Target(ABC):
    """A runtime that checkpoints are exported for; its class is named in :mod:`export.targets`.

    Attributes:
        name: value of ``--target`` and ``--backend``.
        title: name of the exported form in messages.
        command: the command that makes such an export.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    command: ClassVar[str]

    # -- writing ------------------------------------------------------------------------------------------------

    @abstractmethod
    def resolve(self, config: ExportConfig, source: Path | None = None) -> ExportConfig:
        """Return the config with every automatic choice made, such as provider and precision.

        Args:
            config: as the user gave it.
            source: folder of the checkpoint, on which some choices depend; ``None`` to check the settings alone.

        Raises:
            UsageError: this target cannot write such a combination of settings.
            UnavailableError: this machine lacks something.
        """

    def inputs(self, config: ExportConfig) -> list[Path]:
        """Return the files that are read besides the checkpoint.

        Raises:
            UsageError: one of them does not exist.
        """
        return []

    def recorded(self, config: ExportConfig) -> dict[str, Any]:
        """Return the resolved config as the manifest holds it, with the checksums of :meth:`inputs`."""
        return config.model_dump(mode="json")

    @abstractmethod
    def result_name(self, checkpoint: str, config: ExportConfig) -> str:
        """Return the default name of the result.

        Args:
            checkpoint: name of the checkpoint.
            config: resolved.
        """

    @abstractmethod
    def write(self, source: Path, folder: Path, config: ExportConfig, origin: str, report: Reporter) -> TargetReport:
        """Write a checkpoint to a folder, compare the result with torch, and return its report.

        Args:
            source: folder of the checkpoint, compressed or dense.
            folder: an empty folder. After a failure the caller removes it.
            config: resolved.
            origin: hash that names the checkpoint.
            report: progress.

        Raises:
            ModelError: the checkpoint is damaged, or this target does not support the model.
            NumericalError: the results of the export differ from those of the checkpoint.
            DiskFullError: the disk is full.
        """

    # -- reading ------------------------------------------------------------------------------------------------

    @abstractmethod
    def read_report(self, folder: Path) -> TargetReport:
        """Return the report of an exported folder; the files that it names exist and have the recorded size.

        Raises:
            ModelError: the folder is not an export for this target, or a file is missing or cut short.
        """

    @abstractmethod
    def weight_files(self, folder: Path) -> list[Path]:
        """Return the files of an export that hold the weights."""

    @abstractmethod
    def for_eval(self, view: StageView, checkpoint: Path) -> Callable[[], Any]:
        """Return a function that loads an export; the result gives all logits and is called like a transformers model.

        Args:
            view: the export.
            checkpoint: folder of the checkpoint that it was made from.
        """

    @abstractmethod
    def for_bench(self, view: StageView) -> Exported:
        """Return the export for ``ara bench``; it can also make its dense counterpart.

        Raises:
            WorkspaceError: this export has no dense counterpart.
        """

    @abstractmethod
    def for_generate(self, folder: Path) -> TextDecoder:
        """Load an export to generate text.

        Raises:
            ModelError: the folder is not an export for this target, or the runtime cannot load it.
            UnavailableError: the runtime lacks the execution provider of the export.
        """

    @abstractmethod
    def for_latency(self, precision: str | None, threads: int) -> LayerRunner:
        """Return what runs single layers as exports of this target do, for ``ara allocate --objective latency``.

        Args:
            precision: of the weights; the target's choice by default.
            threads: CPU threads.

        Raises:
            UsageError: the target has no such precision.
        """
