"""``ara report``: all results about one checkpoint, as a page, as JSON data and as a model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from ara.artifacts.base import manifest_of
from ara.artifacts.checkpoint import CARD
from ara.artifacts.factors import layer_file, specs_of
from ara.artifacts.ranks import layout_of, read_allocation
from ara.artifacts.ranks_file import RANKS_FILE
from ara.artifacts.report import HTML_FILE, JSON_FILE, ReportResults
from ara.errors import CorruptedError, OutputError, disk_errors, first_line
from ara.files import is_plain_file, open_regular, read_text, write_text
from ara.jsonfile import read
from ara.models.identity import ModelIdentity
from ara.models.weights import LinearSpec, by_block
from ara.pipeline import producers
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
from ara.workspace.view import StageView, ancestor_key, ancestors, parent_of

# The mark of a page is within this many bytes from its start.
_FRONT = 2000
# Kinds of measurements that a report lists.
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
        run: workspace and reporter; ``force`` also replaces the files ``output`` and ``model_card``.
        checkpoint: NAME or STAGE/NAME; the latest by default.
        name: of the result; the checkpoint's name by default.
        output: also write the page to this file; an earlier report is replaced.
        model_card: also write the full model card to this file.

    Raises:
        AraError: there is no checkpoint, an input is damaged, or a file must not be replaced.
    """
    started = begin(name, checkpoint)
    workspace = run.open()
    _refuse(output, "--output", workspace, run.force, replaces_reports=True)
    _refuse(model_card, "--model-card", workspace, run.force)
    with open_task("report", run, started) as task:
        truncated = task.workspace.require("checkpoint", checkpoint, verify=False)
        run.report.step(f"Reporting on {truncated.key}")
        sources, parents = _sources(task.workspace, truncated)
        # Another version may write another page from the same parents.
        settings = {
            "report_format": REPORT_FORMAT,
            "ara": __version__,
            **({"damaged": list(sources.damaged)} if sources.damaged else {}),
        }
        task.describe(name or truncated.name, settings, parents)
        # Silent: nothing is made from a report, so its replacement needs no message.
        done = task.finished(SILENT)
        if done is not None and not run.force:
            view = already_done(done, run)
            verify_files(view.path, manifest_of(view))
        else:
            document = gather(sources)
            # Before the folder is made: drawing opens files, and may fail.
            drawn = page(document)
            with task.writer() as stage:
                write_text(stage.folder / JSON_FILE, document.model_dump_json(indent=1) + "\n")
                write_text(stage.folder / HTML_FILE, drawn)
                ReportResults(document.title, document.verdict, truncated.name, document.missing).write(stage)
            view = task.view()
        _put_card(truncated, _card(view), run)
        if output is not None:
            _put(output, read_text(view.path / HTML_FILE), run)
        if model_card is not None:
            _put(model_card, _card(view), run)
        return view


def _card(view: StageView) -> str:
    """Return the model card of a report; raise :class:`CorruptedError` if its document cannot be read."""
    path = view.path / JSON_FILE
    try:
        document = Report.model_validate(read(path))
    except (OSError, ValueError) as error:
        raise CorruptedError(
            f"{path} cannot be read ({first_line(error)})", remake(manifest_of(view), force=True)
        ) from None
    return card(document)


def _put_card(truncated: StageView, text: str, run: Run) -> None:
    """Write the card into the checkpoint, unless an earlier version included the card in the checksums."""
    if CARD in manifest_of(truncated).files:
        run.report.fact(
            f"{truncated.key}/{CARD} is not changed: an earlier version of ARA included it in the checkpoint's "
            "checksums (--model-card FILE writes the card elsewhere)"
        )
        return
    path = truncated.path / CARD
    if path.parent.is_symlink():
        raise CorruptedError(f"{path.parent} is a link, expected a folder", remake(manifest_of(truncated), force=True))
    # A link is replaced, and its target is not written.
    written = text.encode()
    if not is_plain_file(path) or path.stat().st_size != len(written) or path.read_bytes() != written:
        if path.is_dir() and not path.is_symlink():
            raise OutputError(f"{path} is a folder, expected the model card", "move it away")
        _put(path, text, run)
        run.report.fact(f"the model card is in {path}")


def _sources(workspace: Workspace, truncated: StageView) -> tuple[Sources, list[StageView]]:
    """Return the inputs of the report, and the results that they come from."""
    everything = workspace.views()
    # Unfinished work may have the same key as a result.
    whole = {view.key: view for view in everything if view.manifest is not None}

    def above(child: StageView, kind: str) -> StageView:
        return whole[ancestor_key(child, kind, whole.__getitem__)]

    def measured(kind: str, of: StageView) -> list[StageView]:
        """Return the finished results of a kind that are about ``of``, oldest first."""
        made = [view for view in everything if view.kind == kind and view.state == "done"]
        return [view for view in made if _is_about(view, of)]

    chosen, decomposition = above(truncated, "ranks"), above(truncated, "factors")
    ModelIdentity.from_dict(manifest_of(decomposition).model)  # refuse a malformed one
    trained = [whole[key] for key in _parent_keys(chosen) if key in whole and whole[key].kind == "training"]
    layout = layout_of(chosen)
    specs = specs_of(decomposition, layout)
    verify_files(chosen.path, manifest_of(chosen), [RANKS_FILE])
    evaluations, benches = measured("evaluation", truncated), measured("benchmark", truncated)
    comparisons, exports = measured("comparison", decomposition), measured("graph", truncated)
    above_it = [whole[key] for key in ancestors(truncated, whole.__getitem__)]
    earlier = [view for view in reversed(above_it) if view.kind == "checkpoint"]
    parents = [truncated, *earlier, chosen, decomposition, *trained, *evaluations, *benches, *comparisons, *exports]
    others = []
    for other in everything:
        if other.kind != "checkpoint" or other.state != "done" or other.key == truncated.key:
            continue
        if decomposition.key in ancestors(other, whole.__getitem__):
            ranks, found = above(other, "ranks"), (measured("evaluation", other), measured("benchmark", other))
            others.append(_made(other, ranks, *found))
            parents += [other, ranks, *found[0], *found[1]]
    # Made from this checkpoint, or from an earlier one with its key.
    stale = [
        manifest_of(view)
        for view in everything
        if view.state == "stale" and view.kind != "report" and truncated.key in _parent_keys(view)
    ]
    # The parents of damaged results are unknown.
    damaged = [view for view in everything if view.state == "damaged" and view.kind in _MEASURED]
    place = () if workspace.root == Path(DEFAULT_ROOT) else ("-w", str(workspace.root))
    sources = Sources(
        decomposition=manifest_of(decomposition),
        current=_made(truncated, chosen, evaluations, benches, earlier),
        others=tuple(others),
        modules=_modules(decomposition, specs),
        ranks=read_allocation(chosen, specs),
        training=manifest_of(trained[0]) if trained else None,
        comparisons=tuple(map(manifest_of, comparisons)),
        exports=tuple(map(manifest_of, exports)),
        stale=tuple(stale),
        damaged=tuple(view.key for view in damaged),
        place=place,
    )
    return sources, list({view.key: view for view in parents}.values())


def _made(
    truncated: StageView,
    chosen: StageView,
    evaluations: Sequence[StageView],
    benches: Sequence[StageView],
    earlier: Sequence[StageView] = (),
) -> Made:
    return Made(
        manifest_of(truncated),
        manifest_of(chosen),
        tuple(map(manifest_of, evaluations)),
        tuple(map(manifest_of, benches)),
        tuple(map(manifest_of, earlier)),
    )


def _is_about(view: StageView, of: StageView) -> bool:
    """Tell whether ``of`` is the first parent of its kind; an evaluation may measure further checkpoints beside it."""
    makers = producers(of.kind)
    parents = (parent for parent in manifest_of(view).parents if parent.key.partition("/")[0] in makers)
    return next(parents, None) == parent_of(of)


def _parent_keys(view: StageView) -> list[str]:
    return [parent.key for parent in manifest_of(view).parents]


def _modules(decomposition: StageView, specs: Sequence[LinearSpec]) -> list[Module]:
    """Read only the spectra and verify their checksums; raise :class:`CorruptedError` if one does not match."""
    made, modules = manifest_of(decomposition), []
    for block in by_block(specs):
        path = decomposition.path / layer_file(block[0].layer)
        names = {f"{spec.name}.spectrum": spec for spec in block}
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in names}
        except Exception as error:  # safetensors has its own classes
            raise CorruptedError(f"{path} cannot be read ({error})", remake(made, True)) from None
        for name, sha256 in tensor_digests(tensors).items():
            if made.tensors[name].sha256 != sha256:
                raise CorruptedError(f"{path}: {name} does not match its checksum", remake(made, True))
            modules.append(Module(names[name], tensors[name]))
    return modules


def _refuse(path: Path | None, flag: str, workspace: Workspace, force: bool, *, replaces_reports: bool = False) -> None:
    """Refuse an output file that must not be written.

    Raises:
        OutputError: it is a folder, its folder does not exist, it is in the workspace, or it exists and is no report.
    """
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
        raise OutputError(f"{flag} {path} {what}", "name a file in an existing folder")
    if path.resolve().is_relative_to(workspace.root.resolve()):
        raise OutputError(
            f"{flag} {path} is in the workspace {workspace.root}, whose files have checksums",
            "choose a file outside the workspace",
        )
    if not path.exists() or force:
        return
    hint = "replace it with --force, or choose another file"
    if not replaces_reports:
        raise OutputError(f"{flag} {path} is there already", hint)
    if path.is_file():
        with open_regular(path) as file:
            if MARK.encode() in file.read(_FRONT):
                return
    raise OutputError(f"{flag} {path} is there already and is no report of ara", hint)


def _put(path: Path, text: str, run: Run) -> None:
    """Write a file under another name, then rename it; an existing file or link is replaced."""
    with disk_errors(path), written_aside(path, run.root) as aside:
        write_text(aside, text)
