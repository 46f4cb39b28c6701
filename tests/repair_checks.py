"""What several processes do when they repair a model together; run by :class:`tests.forks.Forks`."""

from __future__ import annotations

import copy
import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ara.distributed.group import Group
from ara.distributed.launch import launched
from ara.distributed.torch_group import joined
from ara.layouts.modeling_ara import separate_experts
from ara.recovery.base import Level
from ara.recovery.block import Block
from ara.recovery.closed import Closed
from ara.recovery.distill import Distill
from tests.recovery import tiny_recovery, weights_of
from tests.tiny import tiny_model

# Neither windows nor batches divide evenly among three processes, and the last batch has fewer windows than these.
_SIZES = {"windows": 10, "held_out": 5, "batch_size": 4}


def check_levels() -> None:
    """Part of the change of the logits by which several processes may differ from one: see docs/processes.md."""
    with joined(launched()) as group:
        _compare(group, Closed(), 1e-4)
        _compare(group, Block(), 1e-3, block_epochs=1, block_rate=1e-4)
        _compare(group, Block(), 1e-3, block_epochs=1, block_rate=1e-4, block_metric="full", look_ahead=True)
        _compare(group, Distill(), 5e-3, steps=3, batch=2, check_every=1)


def check_experts() -> None:
    with joined(launched()) as group:
        layers = _compare(group, Closed(), 1e-4, separate_experts(tiny_model("mixtral")), windows=23, held_out=13)
        corrected = [name for name in layers["layers"] if ".experts." in name]
        # Some saw too few tokens.
        assert 0 < len(corrected) < 2 * 5 * 3


def _compare(
    group: Group, level: Level, tolerance: float, family: str | PreTrainedModel = "llama", **settings: Any
) -> Any:
    """Repair a model alone and together: all processes get the same bits, nearly those of one; return the details."""
    logits, weights, details = [], [], []
    for processes in (Group(), group):
        with tempfile.TemporaryDirectory() as folder:
            recovery = tiny_recovery(Path(folder), copy.deepcopy(family), **{**_SIZES, **settings})
            before = _logits(recovery.model, recovery.unseen.ids)
            outcome = level.repair(replace(recovery, group=processes))
            logits.append(_logits(recovery.model, recovery.unseen.ids))
        weights.append(weights_of(recovery.model))
        details.append(outcome.details)
    group.agree((_digest(weights[1]), outcome.notes, details[1]), "the repaired model")
    alone, together = logits
    assert float((together - alone).norm()) < tolerance * float((alone - before).norm())
    return details[1]


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def _digest(weights: dict[str, torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for weight in weights.values():
        sha.update(weight.numpy().tobytes())
    return sha.hexdigest()
