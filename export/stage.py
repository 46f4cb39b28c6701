"""``ara export``: the chosen checkpoint, or any folder, as ONNX; written aside, proven, then put in place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ara.errors import OutputError, UsageError, disk_errors
from ara.files import remove
from ara.stages.common import Run, already_done, begin
from ara.stages.truncate import CHECKPOINT
from ara.workspace.locking import LOCK_FILE, OWNER_FILE, exclusive
from ara.workspace.manifest import file_sha256
from ara.workspace.view import StageView, parent_of
from export.config import ExportConfig
from export.onnx.report import REPORT_FILE, ExportReport
from export.onnx.weights import Checkpoint

# Ends of the names of what lies beside a folder while it is written, and of the old one inside.
_WORK = ".ara-export"
_BEFORE = "before"


def export(config: ExportConfig, run: Run, *, checkpoint: str | None = None, name: str | None = None) -> StageView:
    """Write the chosen checkpoint of the workspace for another runtime.

    Args:
        config: precision, provider, form of the graph.
        run: workspace and reporter.
        checkpoint: which result of ``ara truncate``; the latest by default.
        name: of the result; checkpoint and precision by default.

    Raises:
        AraError: no checkpoint, a family or precision that cannot be exported, a graph that is not the checkpoint.
    """
    from export.onnx.target import resolve, write_onnx

    started = begin(checkpoint, name)
    resolved, dense = resolve(config), _dense_graph(config)
    workspace = run.open()
    with workspace.lock(run.command):
        truncated = workspace.require("truncate", checkpoint)
        assert truncated.manifest is not None
        run.report.step(f"Exporting {truncated.key} to ONNX")
        facts = {
            # The graph's weights lie in another file, and are checked one by one.
            "config": {**resolved.model_dump(mode="json"), "rewrite_sha256": file_sha256(dense) if dense else None},
            "model": truncated.manifest.model,
            "parents": (parent_of(truncated),),
        }
        name = name or f"{truncated.name}-{'rewritten' if resolved.rewrite else resolved.precision}"
        done = workspace.finished("export", name, facts, run.report)
        if done is not None and not run.force:
            return already_done(done, run)
        with workspace.writer("export", name, facts, command=run.command, started=started) as stage:
            source = Checkpoint(truncated.path / CHECKPOINT)
            about = write_onnx(source, stage.folder, resolved, truncated.manifest.id, run.report)
            stage.results.update(about.model_dump(mode="json"))
        return workspace.view(f"export/{name}")


def _dense_graph(config: ExportConfig) -> Path | None:
    """Return the graph to be rewritten, if there is to be one."""
    if config.rewrite is None:
        return None
    # os.path says no to a link that leads back to itself, where Path raises.
    path = Path(os.path.realpath(config.rewrite))
    if not os.path.isfile(path):
        raise UsageError(f"there is no file {config.rewrite}", "--rewrite wants the .onnx file of a dense export")
    return path


def export_folder(
    config: ExportConfig, run: Run, source: Path, output: Path, *, overwrite: bool = False
) -> ExportReport:
    """Write the checkpoint in ``source`` to ``output``, without a workspace; returns ``ara_export.json``.

    Args:
        config: precision, provider, form of the graph.
        run: reporter.
        source: folder of a checkpoint, compressed or dense.
        output: folder to write; stays as it is until the new one is whole and proven.
        overwrite: replace what is in ``output``.

    Raises:
        AraError: as :func:`export`; ``output`` is not empty.
    """
    from export.onnx.target import resolve, source_hash, write_onnx

    resolved, dense = resolve(config), _dense_graph(config)
    if output.is_symlink():
        raise OutputError(
            f"--output {output} is a link, and ARA does not write through links", "name its folder itself"
        )
    source, output = source.resolve(), output.resolve()
    needed = [source, *([dense] if dense else [])]
    _refuse_output(output, needed, overwrite)
    run.report.step(f"Exporting {source} to ONNX")
    checkpoint = Checkpoint(source)
    with _work_folder(output, run.command) as work:
        # An earlier run, killed between its two renames, may have left the old folder here.
        _refuse_output(output, needed, overwrite)
        new, before = work / "new", work / _BEFORE
        with disk_errors(output):
            new.mkdir()
        about = write_onnx(checkpoint, new, resolved, source_hash(source), run.report)
        # Others may have put something there meanwhile.
        _refuse_output(output, needed, overwrite)
        try:
            if output.exists():
                output.rename(before)
            new.rename(output)
        except BaseException:
            _put_back(before, output)
            raise
    return about


@contextmanager
def _work_folder(output: Path, command: str) -> Iterator[Path]:
    """Yield an empty folder beside ``output`` that no other export to it uses, and that is removed afterwards.

    What a killed run has left there is put back or removed first.

    Raises:
        LockedError: another export to ``output`` is at work.
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
    """Refuse a folder that holds anything but an earlier export, or that something else lives in.

    Raises:
        OutputError: such a folder.
    """
    for path in (*needed, Path.cwd()):
        if path.is_relative_to(output) or (path != Path.cwd() and output.is_relative_to(path)):
            raise OutputError(f"--output {output} and {path} lie in one another", "choose another folder")
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
