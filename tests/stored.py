"""Made-up results: the least settings and figures that each stage's must have, and how to store them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ara.workspace.store import Workspace
from ara.workspace.view import StageView, parent_of

MODEL = {"requested": "demo", "fingerprint": "a" * 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "decompose": {"method": "plain", "text": "c4", "samples": 4, "seq_len": 8, "seed": 0, "dtype": "float32"},
    "train-masks": {"objective": "priced", "samples": 4, "held_out": 2, "keep": [0.8]},
    "allocate": {"method": "energy", "rank_multiple": 1, "min_rank": 1, "min_keep": 0.0, "exclude": []},
    "truncate": {"dtype": "float32"},
    "recover": {"dtype": "float32"},
    "quantise": {"dtype": "float32"},
}
_BUDGET = {"ranks": {"x": 3}, "start_held_out": 3.5, "held_out": 3.25, "best_step": 1, "steps": 2, "seconds": 1.5}
_KEPT = {"linear_keep": 0.8, "model_keep": 0.9, "dense_layers": 1}
_CHECKPOINT = {
    **_KEPT,
    "low_rank_layers": 2,
    "parameters": 7,
    "weight_bytes": 8,
    "dense_weight_bytes": 9,
    "densified": False,
    "disk_bytes": 8,
}
FIGURES: dict[str, dict[str, Any]] = {
    "decompose": {"modules": [], "linear_parameters": 0, "model_parameters": 7},
    "train-masks": {
        "budgets": {"0.8": {**_BUDGET, "backward_passes": 3}},
        "log": {},
        "table_seconds": 0.5,
        "table_windows": 4,
    },
    "allocate": {
        **_KEPT,
        "linear_parameters_dense": 6,
        "linear_parameters": 5,
        "model_parameters_dense": 8,
        "model_parameters": 7,
        "kinds": {},
    },
    "truncate": _CHECKPOINT,
    "recover": _CHECKPOINT,
    "quantise": _CHECKPOINT,
    "export": {"precision": "fp32", "last_logits": False},
    "eval": {"chosen": "x", "variants": {}, "tasks": {}, "continuations": [], "zero_shot": None, "interleaved": True},
    "report": {"title": "x", "checkpoint": "x", "verdict": "x", "missing": []},
    "compare": {"methods": {"dense": {"held_out": 3.0}, "energy": {"held_out": 3.1}}},
    "bench": {
        "chosen": "x",
        "backend": "torch",
        "device": "cpu",
        "machine": {},
        "precision": "float32",
        "threads": 1,
        "interleaved": False,
        "models": {},
        "last_logits": False,
        "cases": [],
    },
}


def store(
    workspace: Workspace,
    key: str,
    text: str = "content",
    parents: Sequence[str] = (),
    seed: int = 0,
    **settings: Any,
) -> StageView:
    """Store a result of one text file, made from the results named in ``parents``, with further ``settings``."""
    stage, _, name = key.partition("/")
    facts = {
        "config": {**SETTINGS.get(stage, {}), "seed": seed, **settings},
        "model": MODEL,
        "parents": tuple(parent_of(workspace.view(parent)) for parent in parents),
    }
    with workspace.lock("ara test"), workspace.writer(stage, name, facts, command="ara test") as writer:
        writer.results.update(FIGURES[stage])
        (writer.folder / "x.txt").write_text(text)
    return workspace.view(key)
