"""``ara export``: writes a checkpoint for another runtime; the result gets its name after the comparison with torch.

Nothing here depends on the runtime: :mod:`export.targets` lists them, :class:`export.base.Target` is their interface.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ara.artifacts.checkpoint import CHECKPOINT
from ara.artifacts.graph import write_report
from ara.errors import OutputError, disk_errors
from ara.files import remove
from ara.models.checkpoint import read_config
from ara.stages.common import Run, begin, open_task
from ara.workspace.locking import LOCK_FILE, OWNER_FILE, exclusive
from ara.workspace.manifest import file_sha256
from ara.workspace.view import StageView
from export.base import REPORT_FILE, TargetReport
from export.config import ExportConfig
from export.targets import load_target

# Folder beside the output NAME while it is written: .NAME.ara-export has the new folder and, at the end, the old one.
_WORK = ".ara-export"
_BEFORE = "before"


def export(config: ExportConfig, run: Run, *, checkpoint: str | None = None, name: str | None = None) -> StageView:
    """Write the chosen checkpoint of the workspace for another runtime.

    Args:
        config: target, precision, provider, form of the graph.
        run: workspace and reporter.
        checkpoint: which one, as NAME or STAGE/NAME; the latest by default.
        name: name of the result; checkpoint and precision by default.

    Raises:
        AraError: no checkpoint, a model or precision that the target cannot write, an export that differs from torch.
    """
    started = begin(name, checkpoint)
    target = load_target(config.target)
    target.inputs(target.resolve(config))  # wrong settings and missing files are errors before any work
    with open_task("export", run, started) as task:
        truncated = task.workspace.require("checkpoint", checkpoint)
        assert truncated.manifest is not None
        run.report.step(f"Exporting {truncated.key} to {target.title}")
        source = truncated.path / CHECKPOINT
        resolved = target.resolve(config, source)
        settings = target.recorded(resolved)
        task.describe(name or target.result_name(truncated.name, resolved), settings, (truncated,))
        if (done := task.done()) is not None:
            return done
        with task.writer() as stage:
            write_report(target.write(source, stage.folder, resolved, truncated.manifest.id, run.report), stage)
        return task.view()


def export_folder(
    config: ExportConfig, run: Run, source: Path, output: Path, *, overwrite: bool = False
) -> TargetReport:
    """Write the checkpoint in ``source`` to ``output``, without a workspace; returns ``ara_export.json``.

    Args:
        config: target, precision, provider, form of the graph.
        run: reporter.
        source: folder of a checkpoint, compressed or dense.
        output: folder to write. Its old content is kept until the new one is complete and compared.
        overwrite: replace an earlier export in ``output``.

    Raises:
        AraError: as :func:`export`; ``output`` is not empty.
    """
    target = load_target(config.target)
    others = target.inputs(target.resolve(config))
    if output.is_symlink():
        raise OutputError(
            f"--output {output} is a link, and ARA does not write through links", "name its folder itself"
        )
    source, output = source.resolve(), output.resolve()
    needed = [source, *others]
    _refuse_output(output, needed, overwrite)
    run.report.step(f"Exporting {source} to {target.title}")
    read_config(source)  # a folder that is no checkpoint is an error before anything is written
    resolved = target.resolve(config, source)
    with _work_folder(output, run.command) as work:
        # An earlier run, killed between its two renames, may have left the old folder here.
        _refuse_output(output, needed, overwrite)
        new, before = work / "new", work / _BEFORE
        with disk_errors(output):
            new.mkdir()
        about = target.write(source, new, resolved, source_hash(source), run.report)
        # Another program may have written to ``output`` in the meantime.
        _refuse_output(output, needed, overwrite)
        try:
            if output.exists():
                output.rename(before)
            new.rename(output)
        except BaseException:
            _put_back(before, output)
            raise
    return about


def source_hash(folder: Path) -> str:
    """Return the sha256 over names and contents of a checkpoint's config and weights."""
    sha = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        sha.update(f"{path.name} {file_sha256(path)}\n".encode())
    return sha.hexdigest()


@contextmanager
def _work_folder(output: Path, command: str) -> Iterator[Path]:
    """Yield an empty folder beside ``output``, locked against other exports to it; it is removed afterwards.

    Files that a killed run left there are put back or removed first. A second export is refused with ``LockedError``.
    """
    work = output.with_name(f".{output.name}{_WORK}")
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        if work.is_symlink():
            remove(work)
        with disk_errors(output):
            work.mkdir(parents=True, exist_ok=True)
        with exclusive(work, command):
            try:
                _put_back(work / _BEFORE, output)
                for left in work.iterdir():
                    if left.name not in (LOCK_FILE, OWNER_FILE):
                        remove(left)
                yield work
            finally:
                remove(work)
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def _put_back(before: Path, output: Path) -> None:
    if before.exists() and not output.exists():
        before.rename(output)


def _refuse_output(output: Path, needed: list[Path], overwrite: bool) -> None:
    """Refuse a folder that contains a needed one or is inside it, or that has other content than an earlier export."""
    for path in (*needed, Path.cwd()):
        if path.is_relative_to(output) or (path != Path.cwd() and output.is_relative_to(path)):
            raise OutputError(f"--output {output} and {path} contain one another", "choose another folder")
    if not output.exists():
        return
    if not output.is_dir() or any(output.iterdir()):
        if not overwrite:
            raise OutputError(f"{output} is not empty", "choose another folder, or replace an export with --overwrite")
        if not (output / REPORT_FILE).is_file():
            raise OutputError(
                f"{output} is not an export (no {REPORT_FILE}), so --overwrite does not touch it",
                "choose another folder",
            )
