"""Finds the folder of the model that a command runs: a checkpoint or an export, of the workspace or a given one."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from ara.artifacts.checkpoint import CHECKPOINT
from ara.errors import ModelError
from ara.files import expand_user
from ara.models.checkpoint import read_config
from ara.names import check_which
from ara.stages.common import Run
from export.base import REPORT_FILE, Target
from export.find import latest_export
from export.targets import TARGETS


def model_folder(
    target: Target | None,
    run: Run,
    *,
    checkpoint: str | None = None,
    export: str | None = None,
    source: Path | None = None,
) -> Path:
    """Return the folder to run: of a checkpoint, or of its export for a target.

    Args:
        target: whose export to run; ``None``: the checkpoint itself.
        run: its workspace is searched.
        checkpoint: which one, as NAME or STAGE/NAME; the latest by default.
        export: which export of the checkpoint; the latest by default.
        source: a checkpoint folder or an exported folder to run instead of a result of the workspace.

    Raises:
        UsageError: a name or path is not valid.
        WorkspaceError: there is no such result.
        ModelError: ``source`` is none that the target can run.
    """
    if source is not None:
        return _given(source, target)
    for which in (checkpoint, export):
        if which is not None:
            check_which(which)
    workspace = run.open()
    view = workspace.require("checkpoint", checkpoint)
    if target is None:
        return view.path / CHECKPOINT
    return latest_export(target, workspace, view, export).path


def _given(source: Path, target: Target | None) -> Path:
    """Return the folder that ``--source`` names, after a look at its files."""
    names = " or ".join(f"--backend {name}" for name in TARGETS.names())
    folder = expand_user(source, "--source")
    if not folder.is_dir():
        raise ModelError(
            f"{folder} {'is no folder' if folder.exists() else 'does not exist'}",
            f"--source wants a checkpoint folder, or with {names} an exported one",
        )
    checkpoint, exported = ((folder / name).is_file() for name in ("config.json", REPORT_FILE))
    if target is None:
        if exported and not checkpoint:
            raise ModelError(f"{folder} is an export, --backend torch runs checkpoints", f"add {names}")
        read_config(folder)
    else:
        if checkpoint and not exported:
            raise ModelError(
                f"{folder} is a checkpoint, --backend {target.name} runs exports",
                f"export it: {target.command} --source {quote(str(folder))} --output FOLDER",
            )
        target.read_report(folder)
    return folder
