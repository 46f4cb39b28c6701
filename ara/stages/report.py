"""``ara report``: everything that a workspace knows of one checkpoint, on one page, as data, and as its model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from ara.artifacts.base import manifest_of
from ara.artifacts.checkpoint import CARD
from ara.artifacts.factors import layer_file, specs_of
from ara.artifacts.ranks import layout_of, read_allocation
from ara.artifacts.ranks_file import RANKS_FILE
from ara.artifacts.report import HTML_FILE, JSON_FILE, MissingPart, ReportResults
from ara.errors import CorruptedError, OutputError, disk_errors, first_line
from ara.files import is_plain_file, open_regular, read_text, write_text
from ara.jsonfile import read
from ara.models.identity import ModelIdentity
from ara.models.weights import LinearSpec
from ara.progress import SILENT
from ara.reporting.document import REPORT_FORMAT, Report
from ara.reporting.gather import Made, Sources, gather
from ara.reporting.html import MARK, page
from ara.reporting.model_card import card
from ara.solver.problem import Module
from ara.stages.common import Run, already_done, begin, open_task
from ara.version import __version__
from ara.workspace.manifest import remake, verify_files
from ara.workspace.store import DEFAULT_ROOT, Workspace
from ara.workspace.tensors import tensor_digests, written_aside
from ara.workspace.view import StageView, ancestor_key, parent_of

# Bytes at the front of a page in which its mark stands.
_FRONT = 2000
# What a report lists beside the results that it stands on.
_MEASURED = ("evaluation", "benchmark", "comparison", "graph")


def report(
    run: Run,
    *,
    checkpoint: str | None = None,
    name: str | None = None,
    output: Path | None = None,
    model_card: Path | None = None,
) -> StageView:
    """Write page, ``report.json`` and model card of a checkpoint; stale and unfinished results are left out.

    Args:
        run: workspace and reporter; ``force`` also replaces what is in ``output`` and ``model_card``.
        checkpoint: which one, as NAME or STAGE/NAME; the latest by default.
        name: of the result; the checkpoint's name by default.
        output: also put the page here; an earlier report is replaced.
        model_card: also write the full model card here.

    Raises:
        AraError: no checkpoint, a result that it is made from is damaged, a file that must not be replaced.
    """
    started = begin(name, checkpoint)
    workspace = run.open()
    _refuse(output, "--output", workspace, run.force, replaces_reports=True)
    _refuse(model_card, "--model-card", workspace, run.force)
    with open_task("report", run, started) as task:
        truncated = task.workspace.require("checkpoint", checkpoint, verify=False)
        run.report.step(f"Reporting on {truncated.key}")
        sources, parents = _sources(task.workspace, truncated)
        # The same parents may be told otherwise by another version.
        settings = {
            "report_format": REPORT_FORMAT,
            "ara": __version__,
            **({"damaged": list(sources.damaged)} if sources.damaged else {}),
        }
        task.describe(name or truncated.name, settings, parents)
        # Nothing is made from a report: that it is replaced is no news.
        done = task.finished(SILENT)
        if done is not None and not run.force:
            view = already_done(done, run)
            verify_files(view.path, manifest_of(view))
        else:
            document = gather(sources)
            # Before there is a folder to be left half-written: drawing wants files of its own.
            drawn = page(document)
            with task.writer() as stage:
                write_text(stage.folder / JSON_FILE, document.model_dump_json(indent=1) + "\n")
                write_text(stage.folder / HTML_FILE, drawn)
                missing = tuple(MissingPart(item.what, item.command) for item in document.missing)
                ReportResults(document.title, document.verdict, truncated.name, missing).write(stage)
            view = task.view()
        _put_card(truncated, _card(view), run)
        if output is not None:
            _put(output, read_text(view.path / HTML_FILE), run)
        if model_card is not None:
            _put(model_card, _card(view), run)
        return view


def _card(view: StageView) -> str:
    """Return the model card of a report.

    Raises:
        CorruptedError: its document is not one that this version writes.
    """
    path = view.path / JSON_FILE
    try:
        document = Report.model_validate(read(path))
    except (OSError, ValueError) as error:
        raise CorruptedError(
            f"{path} cannot be read ({first_line(error)})", remake(manifest_of(view), force=True)
        ) from None
    return card(document)


def _put_card(truncated: StageView, text: str, run: Run) -> None:
    """Write the card into the checkpoint, unless that was written by a version which took a checksum of it."""
    if CARD in manifest_of(truncated).files:
        run.report.fact(
            f"{truncated.key}/{CARD} stays as it is: an earlier version has put it under the checkpoint's checksums "
            "(--model-card FILE writes the card elsewhere)"
        )
        return
    path = truncated.path / CARD
    if path.parent.is_symlink():
        raise CorruptedError(f"{path.parent} is a link, expected a folder", remake(manifest_of(truncated), force=True))
    # A link in its place is replaced: what it points to is somebody else's.
    written = text.encode()
    if not is_plain_file(path) or path.stat().st_size != len(written) or path.read_bytes() != written:
        if path.is_dir() and not path.is_symlink():
            raise OutputError(f"{path} is a folder, expected the model card", "move it away")
        _put(path, text, run)
        run.report.fact(f"the model card is in {path}")


def _sources(workspace: Workspace, truncated: StageView) -> tuple[Sources, list[StageView]]:
    """Return what the report is made from, and the results that this was read from."""
    everything = workspace.views()
    # Unfinished work may lie beside a result of the same key.
    whole = {view.key: view for view in everything if view.manifest is not None}

    def above(child: StageView, kind: str) -> StageView:
        return whole[ancestor_key(child, kind, workspace.view)]

    def measured(kind: str, of: StageView) -> list[StageView]:
        """Return the finished results of a kind that were made from ``of``, oldest first."""
        return [view for view in everything if view.kind == kind and view.state == "done" and _is_made_from(view, of)]

    chosen, decomposition = above(truncated, "ranks"), above(truncated, "factors")
    ModelIdentity.from_dict(manifest_of(decomposition).model)  # raises what does not fit
    parents_of_ranks = [parent.key for parent in manifest_of(chosen).parents]
    trained = [whole[key] for key in parents_of_ranks if key in whole and whole[key].kind == "training"]
    layout = layout_of(chosen)
    specs = specs_of(decomposition, layout)
    verify_files(chosen.path, manifest_of(chosen), [RANKS_FILE])
    evaluations, benches = measured("evaluation", truncated), measured("benchmark", truncated)
    comparisons, exports = measured("comparison", decomposition), measured("graph", truncated)
    parents = [truncated, chosen, decomposition, *trained, *evaluations, *benches, *comparisons, *exports]
    others = []
    for other in everything:
        if other.kind != "checkpoint" or other.state != "done" or other.key == truncated.key:
            continue
        if above(other, "factors").key == decomposition.key:
            found = measured("evaluation", other), measured("benchmark", other)
            others.append(_made(other, above(other, "ranks"), *found))
            parents += [other, above(other, "ranks"), *found[0], *found[1]]
    stale = [view for view in everything if view.state == "stale" and _names(view, truncated)]
    # Nobody can tell what these were made from.
    damaged = [view for view in everything if view.state == "damaged" and view.kind in _MEASURED]
    place = () if workspace.root == Path(DEFAULT_ROOT) else ("-w", str(workspace.root))
    sources = Sources(
        decomposition=manifest_of(decomposition),
        current=_made(truncated, chosen, evaluations, benches),
        others=tuple(others),
        modules=_modules(decomposition, specs),
        ranks=read_allocation(chosen, specs),
        training=manifest_of(trained[0]) if trained else None,
        comparisons=tuple(map(manifest_of, comparisons)),
        exports=tuple(map(manifest_of, exports)),
        stale=tuple(manifest_of(view) for view in stale if view.kind != "report"),
        damaged=tuple(view.key for view in damaged),
        place=place,
    )
    return sources, list({view.key: view for view in parents}.values())


def _made(
    truncated: StageView, chosen: StageView, evaluations: Sequence[StageView], benches: Sequence[StageView]
) -> Made:
    return Made(
        manifest_of(truncated),
        manifest_of(chosen),
        tuple(map(manifest_of, evaluations)),
        tuple(map(manifest_of, benches)),
    )


def _is_made_from(view: StageView, parent: StageView) -> bool:
    return parent_of(parent) in manifest_of(view).parents


def _names(view: StageView, parent: StageView) -> bool:
    """Tell whether ``view`` was made from a result of this key, as it was then."""
    return any(found.key == parent.key for found in manifest_of(view).parents)


def _modules(decomposition: StageView, specs: Sequence[LinearSpec]) -> list[Module]:
    """Read the spectra alone, each held to its checksum.

    Raises:
        CorruptedError: a spectrum is not what the manifest says.
    """
    made, modules = manifest_of(decomposition), []
    for layer in dict.fromkeys(spec.layer for spec in specs):
        path = decomposition.path / layer_file(layer)
        names = {f"{spec.name}.spectrum": spec for spec in specs if spec.layer == layer}
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in names}
        except Exception as error:  # missing, cut, or without such a tensor: safetensors has its own classes
            raise CorruptedError(f"{path} cannot be read ({error})", remake(made, True)) from None
        for name, sha256 in tensor_digests(tensors).items():
            if made.tensors[name].sha256 != sha256:
                raise CorruptedError(f"{path}: {name} does not match its checksum", remake(made, True))
            modules.append(Module(names[name], tensors[name]))
    return modules


def _refuse(path: Path | None, flag: str, workspace: Workspace, force: bool, *, replaces_reports: bool = False) -> None:
    """Refuse a file that must not be written, before any work.

    Raises:
        OutputError: it is a folder or lies in none, it lies in the workspace, or it is something else's.
    """
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
        raise OutputError(f"{flag} {path} {what}", "name a file in a folder that is there")
    if path.resolve().is_relative_to(workspace.root.resolve()):
        raise OutputError(
            f"{flag} {path} lies in the workspace {workspace.root}, whose files are held to their checksums",
            "choose a file outside",
        )
    if not path.exists() or force:
        return
    if not replaces_reports:
        raise OutputError(f"{flag} {path} is there already", "replace it with --force, or choose another file")
    if not path.is_file() or MARK.encode() not in _front(path):
        raise OutputError(
            f"{flag} {path} is there already and is no report of ara", "replace it with --force, or choose another file"
        )


def _front(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(_FRONT)


def _put(path: Path, text: str, run: Run) -> None:
    """Write a file aside and put it in its place, also in that of a link."""
    with disk_errors(path), written_aside(path, run.root) as aside:
        write_text(aside, text)
