"""The command that comes next: what brings a result one stage further."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ara.layout_names import DEFAULT_LAYOUT
from ara.workspace.store import DEFAULT_ROOT, Workspace
from ara.workspace.view import StageView, parent_of

# The stages that a result of one of them leads to.
_FURTHER = {"decompose": "allocate", "train-masks": "allocate", "allocate": "truncate", "truncate": "eval"}
# Budgets to try when all is done, the first that is not there.
_OTHER_BUDGETS = (0.6, 0.8, 0.7, 0.5, 0.9, 0.4)


def next_command(workspace: Workspace, after: StageView | None = None) -> str:
    """Return the command that would bring a result one stage further, ready to be pasted.

    Args:
        workspace: all results.
        after: the one that was just made; by default the latest. Results that another one would be taken for are named.
    """
    words = _next_words(workspace, after)
    if workspace.root != Path(DEFAULT_ROOT):
        words += ["-w", str(workspace.root)]
    return shlex.join(words)


def _next_words(workspace: Workspace, after: StageView | None) -> list[str]:
    views = workspace.views()
    done = [view for view in views if view.state == "done" and view.manifest is not None]
    current = next((view for view in done if after is not None and view.key == after.key), None)
    if current is None or current.stage not in (*_FURTHER, "eval"):
        steps = [view for view in done if view.stage in (*_FURTHER, "eval")]
        current = max(steps, key=_created, default=None)
    if current is None:
        return ["ara", "decompose", (workspace.model or {}).get("requested", "MODEL")]
    while current.stage in _FURTHER:
        further = _FURTHER[current.stage]
        made = [view for view in done if view.stage == further and _is_child(view, current)]
        if not made:
            return ["ara", further, *_given(further, current, views)]
        current = max(made, key=_created)
    return _another_budget(current, done, views)


def _given(stage: str, parent: StageView, views: Sequence[StageView]) -> list[str]:
    """Return the options by which ``stage`` takes up ``parent``, a result of the stage before."""
    if stage == "truncate":
        return _naming("--allocation", parent, views)
    if stage == "eval":
        return ["--tasks", "wikitext2", *_naming("--checkpoint", parent, views)]
    if parent.stage == "train-masks":
        return [*_budget_words(parent), *_naming("--masks", parent, views), *_factors(parent, views)]
    trained = [view for view in views if view.stage == "train-masks" and view.state == "done"]
    trained = [view for view in trained if _is_child(view, parent)]
    budget = _budget_words(trained[-1]) if trained else ["--keep", "0.8"]
    return [*budget, *_naming("--factors", parent, views)]


def _another_budget(measured: StageView, done: Sequence[StageView], views: Sequence[StageView]) -> list[str]:
    """Return what gives another budget from the same factors, when one is measured."""
    keeps = {view.manifest.config.get("keep") for view in done if view.stage == "allocate" and view.manifest}
    keep = next((budget for budget in _OTHER_BUDGETS if budget not in keeps), _OTHER_BUDGETS[0])
    return ["ara", "allocate", "--keep", f"{keep:g}", *_factors(measured, views)]


def _factors(view: StageView, views: Sequence[StageView]) -> list[str]:
    """Return the option that names the decomposition of a result, where it says which and that is not the latest."""
    assert view.manifest is not None
    keys = [parent.key for parent in view.manifest.parents]
    return next(
        (_naming("--factors", parent, views) for parent in views if parent.key in keys and _is_factors(parent)), []
    )


def _is_factors(view: StageView) -> bool:
    return view.stage == "decompose" and view.manifest is not None


def _naming(flag: str, view: StageView, views: Sequence[StageView]) -> list[str]:
    """Return the option that names a result, unless it is taken without: the latest, and none beside it damaged."""
    rivals = [other for other in views if other.stage == view.stage and other.state in ("done", "stale", "damaged")]
    whole = [other for other in rivals if other.manifest is not None]
    return [] if len(whole) == len(rivals) and max(whole, key=_created).key == view.key else [flag, view.name]


def _is_child(view: StageView, parent: StageView) -> bool:
    return view.manifest is not None and parent_of(parent) in view.manifest.parents


def _created(view: StageView) -> str:
    return view.manifest.created if view.manifest else ""


def _budget_words(training: StageView) -> list[str]:
    """Return the options of ``ara allocate`` that go with a training."""
    assert training.manifest is not None
    layout = training.manifest.config.get("layout", DEFAULT_LAYOUT)
    budget = next(iter(training.manifest.results["budgets"]))
    return ["--keep", budget, *([] if layout == DEFAULT_LAYOUT else ["--layout", layout])]
