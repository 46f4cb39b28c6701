"""What all stages share: the run they are part of, and the way back to the model of a workspace."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ara.config import DecomposeConfig
from ara.environment import reset_peak_memory
from ara.errors import ModelError, UsageError
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.models.context import context_length
from ara.models.memory import available_bytes
from ara.models.placement import torch_dtype
from ara.models.weights import LinearSpec
from ara.names import check_name
from ara.progress import SILENT, Reporter
from ara.workspace.store import Workspace
from ara.workspace.view import StageView

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


def begin(*names: str | None) -> float:
    """Start a stage's clock and its memory's high-water mark; returns ``time.monotonic()``.

    Args:
        names: of results, as somebody gave them; refused here, before any work, when nothing can be called that.

    Raises:
        UsageError: such a name.
    """
    for name in names:
        if name is not None:
            check_name(name)
    reset_peak_memory()
    return time.monotonic()


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


def specs_of(decomposition: StageView, layout: LayoutName = DEFAULT_LAYOUT) -> list[LinearSpec]:
    """Return the factorised layers that the manifest of a decomposition lists, to be stored in ``layout``."""
    assert decomposition.manifest is not None
    bits = 8 * torch_dtype(decomposition.manifest.config["dtype"]).itemsize
    modules = decomposition.manifest.results["modules"]
    return [LinearSpec(**{**module, "layout": layout, "bits": bits}) for module in modules]


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


def label_of(truncated: StageView) -> str:
    """Return what a checkpoint is called in a table; never the name of another row."""
    return truncated.key if truncated.name in ("dense", "uniform") else truncated.name


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


def layer_file(layer: int) -> str:
    """Name of the file with the factors of one decoder block."""
    return f"layer-{layer:03d}.safetensors"


def factor_files(decomposition: StageView, specs: Sequence[LinearSpec]) -> dict[str, Path]:
    """Return module path → file with its factors."""
    return {spec.name: decomposition.path / layer_file(spec.layer) for spec in specs}


def already_done(view: StageView, run: Run) -> StageView:
    """Say that ``view`` is there already, and return it."""
    run.report.fact(f"{view.key} is there already, made from the same settings (again: --force)")
    return view
