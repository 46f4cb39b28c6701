"""What all stages share: the run they are part of, and the way back to the model of a workspace."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ara.config import DecomposeConfig
from ara.environment import reset_peak_memory
from ara.errors import ModelError, UsageError
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.models.context import context_length
from ara.models.memory import available_bytes
from ara.names import check_name, check_which
from ara.progress import SILENT, Reporter
from ara.workspace.store import Workspace
from ara.workspace.view import StageView, parent_of
from ara.workspace.writer import StageWriter

if TYPE_CHECKING:
    from ara.models.sources import ModelSource


Item = TypeVar("Item")


@dataclass(frozen=True)
class Run:
    """The circumstances of a stage, apart from its config.

    Attributes:
        root: workspace folder.
        command: what the user typed; goes into the manifest.
        report: progress.
        force: do the work again even if the same result is there.
    """

    root: Path
    command: str = "ara (library call)"
    report: Reporter = SILENT
    force: bool = False

    def open(self, create: bool = False) -> Workspace:
        """Open the workspace; see :meth:`ara.workspace.store.Workspace.open`."""
        return Workspace.open(self.root, create)


def begin(name: str | None = None, *consumed: str | None) -> float:
    """Start a stage's clock and its memory's high-water mark; returns ``time.monotonic()``.

    Args:
        name: of the result that is to be made.
        consumed: results that it is made from, as NAME or STAGE/NAME. Like ``name`` they are checked here, before any
            work.

    Raises:
        UsageError: no result can be called that.
    """
    if name is not None:
        check_name(name)
    for which in consumed:
        if which is not None:
            check_which(which)
    reset_peak_memory()
    return time.monotonic()


class Task:
    """One stage at work in a locked workspace: finds what it consumes, and writes what it produces.

    Attributes:
        workspace: locked while the task is open.
        name: of the result; set by :meth:`describe`.
    """

    def __init__(self, stage: str, run: Run, workspace: Workspace, started: float) -> None:
        self.stage, self.run, self.workspace = stage, run, workspace
        self.name = ""
        self._started = started
        self._facts: dict[str, Any] = {}

    def describe(
        self, name: str, config: Any, parents: Sequence[StageView], model: Mapping[str, Any] | None = None
    ) -> None:
        """Say what is to be made.

        Args:
            name: of the result.
            config: resolved settings, as data or as a config.
            parents: the results that it is made from, the first of the same model.
            model: identity of the model, for a result without parents.
        """
        if model is None:
            assert parents[0].manifest is not None
            model = parents[0].manifest.model
        self.name = name
        self._facts = {"config": config, "model": model, "parents": tuple(parent_of(view) for view in parents)}

    def finished(self, report: Reporter | None = None) -> StageView | None:
        """Return the result if it is there, made from the same settings and parents."""
        report = self.run.report if report is None else report
        return self.workspace.finished(self.stage, self.name, self._facts, report)

    def done(self) -> StageView | None:
        """Return the result if it is there and need not be made again, and say so."""
        view = self.finished()
        return None if view is None or self.run.force else already_done(view, self.run)

    def unfinished(self) -> bool:
        """Tell whether a run of this very work has left something to go on from."""
        return self.workspace.unfinished(self.stage, self.name, self._facts)

    def writer(self, **options: Any) -> StageWriter:
        """Return the writer of the result; ``options`` as of :meth:`ara.workspace.store.Workspace.writer`."""
        return self.workspace.writer(
            self.stage, self.name, self._facts, command=self.run.command, started=self._started, **options
        )

    def view(self) -> StageView:
        """Return the state of the result."""
        return self.workspace.view(f"{self.stage}/{self.name}")


@contextmanager
def open_task(stage: str, run: Run, started: float, create: bool = False) -> Iterator[Task]:
    """Open and lock the workspace for one stage.

    Args:
        stage: name of the stage.
        run: workspace and reporter.
        started: what :func:`begin` has returned.
        create: whether a workspace that is not there is created.
    """
    workspace = run.open(create)
    with workspace.lock(run.command):
        yield Task(stage, run, workspace, started)


def model_of(view: StageView, run: Run) -> ModelSource:
    """Find the model again that the stage result ``view`` was made from.

    Raises:
        ModelError: it is gone or has changed since.
    """
    from ara.models.identity import ModelIdentity
    from ara.models.sources import resolve

    assert view.manifest is not None
    identity = ModelIdentity.from_dict(view.manifest.model)
    local = identity.kind in ("folder", "gguf")
    source = resolve(
        identity.location if local else identity.requested,
        revision=identity.revision if identity.kind == "hub" else None,
        report=run.report,
    )
    if source.identity.fingerprint != identity.fingerprint:
        raise ModelError(
            f"{identity.requested} has changed since {view.key} was made "
            f"(fingerprint {source.identity.fingerprint[:12]}, expected {identity.fingerprint[:12]})",
            "run ara decompose --force, or bring the original files back",
        )
    return source


def check_window(seq_len: int, model_config: Any, flag: str = "--seq-len") -> int | None:
    """Return how many positions the model has, or ``None`` if it does not say.

    Args:
        seq_len: tokens per window that somebody asked for.
        model_config: of transformers.
        flag: the option by which they did.

    Raises:
        UsageError: ``seq_len`` is more than the model can read.
    """
    limit = context_length(model_config)
    if limit is not None and seq_len > limit:
        raise UsageError(f"{flag} {seq_len} is more than the {limit} positions of the model", f"use at most {limit}")
    return limit


def groups_in_memory(
    models: Sequence[Item], each_bytes: int, device: str, report: Reporter, lost: str = ""
) -> list[list[Item]]:
    """Return the models to run in turn: all together when they fit into memory, else one by one, which is warned of.

    Args:
        models: whatever stands for them.
        each_bytes: weights of the largest.
        device: where they run.
        report: told when they do not.
        lost: what else cannot be measured then, as the end of a sentence.
    """
    free = available_bytes(device)
    # A quarter on top for activations and logits.
    if 1.25 * each_bytes * len(models) < free:
        return [list(models)]
    report.warn(
        f"{len(models)} models do not fit into {free / 2**30:.1f} GiB at once: they are run one after the other, "
        f"so a change of the machine's speed in between shows in their tokens/s{lost}"
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


def already_done(view: StageView, run: Run) -> StageView:
    """Say that ``view`` is there already, and return it."""
    run.report.fact(f"{view.key} is there already, made from the same settings (again: --force)")
    return view
