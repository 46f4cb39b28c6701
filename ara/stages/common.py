"""What all stages share: run, task, the model of a result, memory, and names of results."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ara.artifacts.factors import TextPart
from ara.config import DecomposeConfig, PlacementConfig
from ara.config.sizes import EmbeddingBits
from ara.distributed.group import ALONE, Group
from ara.environment import release_memory, reset_peak_memory
from ara.errors import ModelError, UsageError
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.models.memory import available_bytes
from ara.models.offload import Offload
from ara.models.placement import Placement, choose_placement
from ara.names import check_name, check_which
from ara.progress import SILENT, Reporter
from ara.workspace.store import Workspace
from ara.workspace.view import StageView, parent_of
from ara.workspace.writer import StageWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ara.data.mixtures import CalibrationText
    from ara.data.tokens import TokenWindows
    from ara.data.windows import WindowReader
    from ara.evaluation.runtime import Runtime
    from ara.models.sources import ModelSource

Item = TypeVar("Item")
# Characters that are replaced in names of folders and files.
NOT_PLAIN = re.compile(r"[^\w.-]")


@dataclass(frozen=True)
class Run:
    """Where and how a stage runs, apart from its config.

    Attributes:
        root: workspace folder.
        command: command line, for the manifest.
        report: receives progress.
        force: do the work again even if the same result exists.
        offload: whether weights stay in their files on a CPU.
        group: the processes that share the work. Process 0 alone writes into the workspace.
    """

    root: Path
    command: str = "ara (library call)"
    report: Reporter = SILENT
    force: bool = False
    offload: Offload = "auto"
    group: Group = ALONE

    def open(self, create: bool = False) -> Workspace:
        """Open the workspace; see :meth:`ara.workspace.store.Workspace.open`."""
        return Workspace.open(self.root, create)

    def check_offload(self, device: str) -> None:
        """Check that weights can stay in their files on the device of the stage.

        Raises:
            UsageError: they are to, and it is not the CPU.
        """
        if self.offload == "disk" and device != "cpu":
            raise UsageError(
                f"--offload disk is given, and the model runs on {device}: only a CPU reads weights from their files",
                "use --device cpu, or omit --offload: the whole model must fit into the memory of the device",
            )


def begin(name: str | None = None, *consumed: str | None) -> float:
    """Check names, give back the memory of earlier stages, and return the start time, ``time.monotonic()``.

    The peak memory is counted from here, so it is that of the stage itself.

    Args:
        name: of the result to make.
        consumed: results that it is made from, as NAME or STAGE/NAME.

    Raises:
        UsageError: a name is not valid.
    """
    if name is not None:
        check_name(name)
    for which in consumed:
        if which is not None:
            check_which(which)
    release_memory()
    reset_peak_memory()
    return time.monotonic()


class Task:
    """One run of a stage in a locked workspace.

    Of several processes, process 0 answers all questions about the result, for all of them.

    Attributes:
        workspace: locked while the task is open; in other processes than the first, only to be read.
        name: of the result; set by :meth:`describe`.
    """

    def __init__(self, stage: str, run: Run, workspace: Workspace, started: float) -> None:
        self.stage, self.run, self.workspace = stage, run, workspace
        self.name = ""
        self._started = started
        self._facts: dict[str, Any] = {}
        self._unfinished: bool | None = None

    def describe(
        self, name: str, config: Any, parents: Sequence[StageView], model: Mapping[str, Any] | None = None
    ) -> None:
        """Set the facts about the result that go into its manifest.

        Args:
            name: of the result.
            config: resolved settings, as data or as a config.
            parents: the results that it is made from; the first one gives the model.
            model: identity of the model, for a result without parents.
        """
        if model is None:
            assert parents[0].manifest is not None
            model = parents[0].manifest.model
        self.name = name
        self._facts = {"config": config, "model": model, "parents": tuple(parent_of(view) for view in parents)}

    def finished(self, report: Reporter | None = None) -> StageView | None:
        """Return the result if it exists, made from the same settings and parents."""
        report = report or self.run.report
        view, self._unfinished = self._asked(
            lambda: (
                self.workspace.finished(self.stage, self.name, self._facts, report),
                self.workspace.unfinished(self.stage, self.name, self._facts),
            )
        )
        return view

    def done(self) -> StageView | None:
        """Return the result, and report it, if it exists and need not be made again."""
        view = self.finished()
        return None if view is None or self.run.force else already_done(view, self.run)

    def unfinished(self) -> bool:
        """Tell whether an interrupted run with the same facts can be resumed; known after :meth:`finished`."""
        assert self._unfinished is not None
        return self._unfinished

    def writer(self, **options: Any) -> StageWriter:
        """Return the writer of the result; ``options`` as of :meth:`ara.workspace.store.Workspace.writer`."""
        return self.workspace.writer(
            self.stage, self.name, self._facts, command=self.run.command, started=self._started, **options
        )

    def view(self) -> StageView:
        """Return the state of the result."""
        return self._asked(lambda: self.workspace.view(f"{self.stage}/{self.name}"))

    def _asked(self, answer: Callable[[], Item]) -> Item:
        found: Item = self.run.group.broadcast(answer() if self.run.group.writes else None)
        return found


@contextmanager
def open_task(stage: str, run: Run, started: float, create: bool = False) -> Iterator[Task]:
    """Open and lock the workspace for one stage.

    Args:
        stage: name of the stage.
        run: workspace and reporter.
        started: result of :func:`begin`.
        create: create the workspace if it does not exist.
    """
    if not run.group.writes:
        run.group.broadcast()
        yield Task(stage, run, Workspace(run.root), started)
        return
    workspace = run.open(create)
    with workspace.lock(run.command):
        # The other processes may read now: the workspace is in order.
        run.group.broadcast()
        yield Task(stage, run, workspace, started)


def model_of(decomposition: StageView, run: Run) -> ModelSource:
    """Return the model that a decomposition was made from, with its experts as they are there.

    Raises:
        ModelError: it cannot be found or has changed since.
    """
    from ara.artifacts.factors import FactorsResults
    from ara.models.identity import ModelIdentity
    from ara.models.sources import resolve

    assert decomposition.manifest is not None
    identity = ModelIdentity.from_dict(decomposition.manifest.model)
    local = identity.kind in ("folder", "gguf")
    source = resolve(
        identity.location if local else identity.requested,
        revision=identity.revision if identity.kind == "hub" else None,
        report=run.report,
        offload=run.offload,
    )
    if source.identity.fingerprint != identity.fingerprint:
        raise ModelError(
            f"{identity.requested} has changed since {decomposition.key} was made "
            f"(fingerprint {source.identity.fingerprint[:12]}, expected {identity.fingerprint[:12]})",
            "run ara decompose --force, or restore the original files",
        )
    return source.with_experts(any(layer.experts for layer in FactorsResults.read(decomposition).modules))


def placement_in(runtime: Runtime, config: PlacementConfig, run: Run) -> Placement:
    """Return where and in which dtype a runtime runs models.

    Args:
        runtime: has its own device.
        config: as the user gave it.
        run: says where weights are to be.

    Raises:
        UnavailableError: the runtime is not installed.
        UsageError: another device is given, or weights are to stay in their files.
    """
    if run.offload == "disk":
        raise UsageError(f"--offload disk is given, and {runtime.title} loads the whole model itself", "omit --offload")
    device = runtime.device()
    if config.device not in ("auto", device):
        raise UsageError(
            f"--device {config.device} is given, and {runtime.title} runs on {device}",
            "omit --device; CUDA_VISIBLE_DEVICES chooses among GPUs",
        )
    return choose_placement(device, config.dtype)


def check_threads(threads: int | None, flag: str = "--threads") -> None:
    """Check a number of CPU threads.

    Args:
        threads: as asked for; ``None``: nothing was.
        flag: the option, for the error.

    Raises:
        UsageError: it is more than this machine has processors.
    """
    processors = os.cpu_count() or 1
    if threads is not None and threads > processors:
        raise UsageError(
            f"{flag} {threads} is more than the {processors} processors of this machine", f"use at most {processors}"
        )


def warn_without_chat(spec: str, tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
    """Warn if a model with a chat template is to read no conversation.

    Args:
        spec: of the text, with all shares.
        tokenizer: of the model.
        run: reporter.
    """
    from ara.data.mixtures import lacks_chat

    if lacks_chat(spec, tokenizer):
        run.report.warn(
            "the model has a chat template and the calibration text no conversation: the compressed model may give "
            "empty answers (add a share of chat: --text c4:0.8,chat:0.2)"
        )


def window_reader(
    spec: str, source: ModelSource, seq_len: int, seed: int, workspace: Workspace, run: Run
) -> WindowReader:
    """Return a reader of the windows of a calibration text; its tokens are cached in the workspace.

    Args:
        spec: of the text, with all shares.
        source: the model.
        seq_len: tokens per window.
        seed: of the order of documents.
        workspace: holds the cache.
        run: reporter.

    Raises:
        DataError: the text cannot be read.
    """
    from ara.data.mixtures import load_calibration_text
    from ara.data.windows import WindowReader
    from ara.models.vocabulary import token_rows

    text = load_calibration_text(spec, run.report)
    rows = token_rows(source.config)
    return WindowReader(workspace.cache / "tokens", source.load_tokenizer(), text, seq_len, seed, rows, run.report)


def outputs_folder(workspace: Workspace) -> Path:
    """Return the folder for outputs and inputs of blocks that do not fit into memory; its files have no names."""
    return workspace.cache / "outputs"


def text_parts(text: CalibrationText, windows: TokenWindows) -> tuple[TextPart, ...]:
    """Return the texts of a mixture, with the tokens that each has given."""
    return tuple(
        TextPart(part.text.name, part.share, part.text.origin, tokens)
        for part, tokens in zip(text.parts, windows.tokens_of.values(), strict=True)
    )


def groups_in_memory(
    models: Sequence[Item], each_bytes: int, device: str, report: Reporter, lost: str = ""
) -> list[list[Item]]:
    """Return groups of models to load together: one group if all fit into memory, else one group per model.

    Args:
        models: the models, not loaded.
        each_bytes: weight bytes of the largest one.
        device: where they run.
        report: receives a warning if they do not fit.
        lost: end of the warning: what cannot be measured then.
    """
    free = available_bytes(device)
    # A quarter on top for activations and logits.
    if 1.25 * each_bytes * len(models) < free:
        return [list(models)]
    report.warn(
        f"{len(models)} models do not fit into {free / 2**30:.1f} GiB together, so they run one after the other: "
        f"a change of the machine's speed affects the comparison of tokens/s{lost}"
    )
    return [[model] for model in models]


def default_name(
    factors: str, *parts: str, keep: float | Sequence[float] | None = None, layout: LayoutName = DEFAULT_LAYOUT
) -> str:
    """Return a result's name: decomposition (unless the default), parts, keeps as 0.80, layout (unless the default)."""
    words = [] if factors == DecomposeConfig.model_fields["method"].default else [factors]
    words += parts
    for one in [] if keep is None else keep if isinstance(keep, Sequence) else [keep]:
        short = f"{one:g}"
        words.append(short if len(short) > 4 else f"{one:.2f}")
    return "-".join(words if layout == DEFAULT_LAYOUT else [*words, layout])


def embedding_words(bits: EmbeddingBits | None) -> list[str]:
    """Return the part of a result's name for the bits of embedding and head; none if they were not given."""
    return [] if bits is None else [f"embedding{bits}"]


def already_done(view: StageView, run: Run) -> StageView:
    """Report that ``view`` is there already, and return it."""
    run.report.fact(f"{view.key} is there already, made with the same settings (--force makes it again)")
    return view
