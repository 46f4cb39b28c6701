"""The next command: it takes a result one stage further."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ara.layout_names import DEFAULT_LAYOUT
from ara.pipeline import Stage, naming_words, next_stage, producers, stage_named, stages, steps
from ara.workspace.store import DEFAULT_ROOT, Workspace
from ara.workspace.view import StageView, ancestors, parent_of

# Budgets to suggest after the last stage; the first one without a result is taken.
_OTHER_BUDGETS = (0.6, 0.8, 0.7, 0.5, 0.9, 0.4)
# Settings of ranks that were chosen with bits, for a size of the rounded checkpoint.
_SIZES = ("size", "bits_per_parameter", "budget_bytes")
# Bits per weight to which ara quantise rounds.
_FEW = {"4", "8"}


def next_command(workspace: Workspace, after: StageView | None = None) -> str:
    """Return the command that takes a result one stage further, ready to be pasted.

    Args:
        workspace: all results.
        after: the result that was just made; the latest by default. The command names it unless it is the default.
    """
    words = _next_words(workspace, after)
    if workspace.root != Path(DEFAULT_ROOT):
        words += ["-w", str(workspace.root)]
    return shlex.join(words)


def _next_words(workspace: Workspace, after: StageView | None) -> list[str]:
    views = workspace.views()
    done = [view for view in views if view.state == "done" and view.manifest is not None]
    if after is not None and after.kind == "comparison" and (words := _size_words(after)):
        return ["ara", producers("ranks")[0], *words, *_factors(after, views)]
    current = next((view for view in done if after is not None and view.key == after.key), None)
    if current is None or not _is_step(current):
        current = max(filter(_is_step, done), key=_created, default=None)
    if current is None:
        return ["ara", stages()[0].name, (workspace.model or {}).get("requested", "MODEL")]
    while (further := _further(current, workspace)) is not None:
        made = [view for view in done if view.kind == further.produces and _is_child(view, current)]
        if not made:
            return ["ara", further.name, *_given(further, current, views)]
        current = max(made, key=_created)
    return _another_budget(current, done, views)


def _further(view: StageView, workspace: Workspace) -> Stage | None:
    """Return the next stage for a result."""
    stage = next_stage(view.stage)
    if view.stage == "recover" and _has_bits(view, workspace):
        return stage_named("quantise")
    # A densified checkpoint has no ranks that a repair could keep.
    if stage is not None and stage.produces == view.kind and view.manifest and view.manifest.config.get("densify"):
        return next_stage(stage.name)
    return stage


def _has_bits(checkpoint: StageView, workspace: Workspace) -> bool:
    """Tell whether the ranks of a checkpoint were chosen with bits, to which its weights are to be rounded."""
    made_from = map(workspace.view, ancestors(checkpoint, workspace.view))
    ranks = next((view.manifest for view in made_from if view.kind == "ranks" and view.manifest), None)
    if ranks is None:
        return False
    size = ranks.results.get("size")
    if isinstance(size, dict) and isinstance(size.get("layers"), dict):
        # A large size may leave all of them as they are.
        return not _FEW.isdisjoint(size["layers"]) or size.get("embedding_bits") is not None
    return any(ranks.config.get(name) is not None for name in _SIZES)


def _size_words(comparison: StageView) -> list[str]:
    """Return the options of ``ara allocate`` for the first size of a comparison of sizes; none for another one."""
    config = comparison.manifest.config if comparison.manifest else {}
    if not config.get("size"):
        return []
    words = ["--size", config["size"][0]]
    for name, usual in (("embedding_bits", 16), ("layout", DEFAULT_LAYOUT)):
        if (value := config.get(name, usual)) != usual:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _is_step(view: StageView) -> bool:
    """Tell whether the pipeline has further stages for a result, or the result belongs to a required stage."""
    return any(view.stage == stage.name and (not stage.optional or next_stage(stage.name)) for stage in steps())


def _given(stage: Stage, parent: StageView, views: Sequence[StageView]) -> list[str]:
    """Return the options with which ``stage`` uses ``parent``."""
    if stage.produces == "ranks":
        return [*_budget(parent, views), *_naming(parent, views), *_factors(parent, views)]
    return [*(["--tasks", "wikitext2"] if stage.produces == "evaluation" else []), *_naming(parent, views)]


def _budget(parent: StageView, views: Sequence[StageView]) -> list[str]:
    """Return the budget of a training, of the latest training on these factors, or a default."""
    if parent.kind == "training":
        return _budget_words(parent)
    trained = [view for view in views if view.kind == "training" and view.state == "done" and _is_child(view, parent)]
    return _budget_words(trained[-1]) if trained else ["--keep", "0.8"]


def _another_budget(measured: StageView, done: Sequence[StageView], views: Sequence[StageView]) -> list[str]:
    """Return the command for another budget of the same factors."""
    keeps = {view.manifest.config.get("keep") for view in done if view.kind == "ranks" and view.manifest}
    keep = next((budget for budget in _OTHER_BUDGETS if budget not in keeps), _OTHER_BUDGETS[0])
    return ["ara", producers("ranks")[0], "--keep", f"{keep:g}", *_factors(measured, views)]


def _factors(view: StageView, views: Sequence[StageView]) -> list[str]:
    """Return the option that names the decomposition of a result; none if it is unknown or the default."""
    assert view.manifest is not None
    keys = [parent.key for parent in view.manifest.parents]
    factors = (one for one in views if one.key in keys and one.kind == "factors" and one.manifest is not None)
    return next((_naming(one, views) for one in factors), [])


def _naming(view: StageView, views: Sequence[StageView]) -> list[str]:
    """Return the option that names a result; none if it is the default: the latest, without a damaged one beside it."""
    rivals = [other for other in views if other.kind == view.kind and other.state in ("done", "stale", "damaged")]
    whole = [other for other in rivals if other.manifest is not None]
    if len(whole) == len(rivals) and max(whole, key=_created).key == view.key:
        return []
    return naming_words(view.stage, view.name)


def _is_child(view: StageView, parent: StageView) -> bool:
    return view.manifest is not None and parent_of(parent) in view.manifest.parents


def _created(view: StageView) -> str:
    return view.manifest.created if view.manifest else ""


def _budget_words(training: StageView) -> list[str]:
    """Return the options of ``ara allocate`` that fit a training."""
    assert training.manifest is not None
    config = training.manifest.config
    layout = config.get("layout", DEFAULT_LAYOUT)
    return ["--keep", f"{config['keep'][0]:g}", *([] if layout == DEFAULT_LAYOUT else ["--layout", layout])]
