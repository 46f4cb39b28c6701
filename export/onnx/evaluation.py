"""Finds exported graphs in a workspace, for the commands that run them."""

from __future__ import annotations

from collections.abc import Callable
from shlex import quote

from ara.errors import WorkspaceError
from ara.stages.truncate import CHECKPOINT
from ara.workspace.store import Workspace
from ara.workspace.view import StageView, parent_of
from export.onnx.runner import OnnxDecoder, TorchLike


def find_export(
    workspace: Workspace, truncated: StageView, name: str | None = None
) -> tuple[StageView, Callable[[], TorchLike]]:
    """Return an export of a checkpoint, the latest by default, verified, and what loads it for evaluation.

    Raises:
        WorkspaceError: the checkpoint was not exported, or only with the logits of the last position.
    """
    view = latest_export(workspace, truncated, name)
    assert view.manifest is not None
    if view.manifest.results["last_logits"]:
        raise WorkspaceError(
            f"{view.key} gives the logits of the last position only", "export without --last-logits to evaluate"
        )

    def load() -> TorchLike:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(truncated.path / CHECKPOINT, trust_remote_code=False)
        return TorchLike(OnnxDecoder(view.path), config).eval()

    return view, load


def latest_export(workspace: Workspace, truncated: StageView, name: str | None = None) -> StageView:
    """Return the export called ``name``, or the latest finished one of a checkpoint, verified.

    Raises:
        WorkspaceError: there is none, it is one of another checkpoint, or one cannot be read.
    """
    if name is not None:
        view = workspace.require("export", name)
        if view.manifest is None or parent_of(truncated) not in view.manifest.parents:
            raise WorkspaceError(
                f"{view.key} is not an export of {truncated.key}", "name its checkpoint with --checkpoint"
            )
        return view
    views = workspace.views("export")
    for view in views:
        if view.state == "damaged":
            # It may be the latest one, nobody can tell: raises what is wrong with it.
            workspace.require("export", view.name)
    fitting = [
        view
        for view in views
        if view.state == "done" and view.manifest and parent_of(truncated) in view.manifest.parents
    ]
    if fitting:
        return workspace.require("export", fitting[-1].name)
    there = "; ".join(_about(view) for view in views)
    raise WorkspaceError(
        f"{truncated.key} has no export that can be run: {there}" if there else f"{truncated.key} was not exported",
        f"make one: ara export --onnx --checkpoint {quote(truncated.name)}",
    )


def _about(view: StageView) -> str:
    """Return what an export is that is not the one looked for."""
    if view.state == "done" and view.manifest is not None:
        parents = (parent.key for parent in view.manifest.parents if parent.key.startswith("truncate/"))
        return f"{view.key} is one of {next(parents, 'something else')}"
    return f"{view.key} is {view.state}{f' ({view.why})' if view.why else ''}"
