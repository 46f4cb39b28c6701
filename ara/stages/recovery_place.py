"""Where a recovery has the weights that it changes: in memory, or in files of the cache if they do not fit.

The dense model's weights stay in the files of the model (:mod:`ara.models.offload`); those of the compressed model
change, so they get files of their own, without names. A level that goes block by block then needs one block of them in
memory, and the results are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ara.artifacts.factors import FactorsResults
from ara.artifacts.ranks import read_allocation
from ara.config import RecoverConfig
from ara.errors import UsageError
from ara.layouts import layout_named
from ara.models.kept import Keep, in_a_file
from ara.models.memory import available_bytes, place_of_weights
from ara.models.placement import torch_dtype
from ara.recovery import LEVELS
from ara.recovery.base import Level
from ara.recovery.trainable import TRAINED
from ara.stages.common import Task, outputs_folder
from ara.stages.compressed import Compressed
from ara.stages.disk_room import Need, check_room, mebibytes


def place_changed_weights(
    before: Compressed, levels: Mapping[str, Level], config: RecoverConfig, task: Task
) -> Keep | None:
    """Return what puts the weights of the compressed model into files, or ``None``: they are in memory.

    Rounded checkpoints are always repaired in memory.

    Args:
        before: the checkpoint.
        levels: that run, by name.
        config: with resolved device and dtype.
        task: the stage, whose workspace has the files in its cache; says whether there are any.

    Raises:
        UsageError: a level changes all weights at once, and they do not fit into memory.
        DiskFullError: no room for the files.
    """
    run = task.run
    if config.device != "cpu" or run.offload == "none" or before.rounding is not None:
        return None
    inside, outside = _parameters(before)
    size, free = torch_dtype(config.dtype).itemsize * (inside + outside), available_bytes("cpu")
    beside = {name: level.beside_weights(config, inside) for name, level in levels.items()}
    at_once = {name: needed for name, needed in beside.items() if needed is not None}
    for name, needed in at_once.items():
        if place_of_weights(size, free, needed) != "memory":
            raise UsageError(
                f"the level {name} changes all weights at once: {mebibytes(size)} of weights and {mebibytes(needed)} "
                f"for their training, at least, do not fit into {mebibytes(free)} of free memory",
                f"use {_block_by_block(config)}; --offload none tries it all the same",
            )
    if at_once or (run.offload == "auto" and place_of_weights(size, free) == "memory"):
        return None
    folder = outputs_folder(task.workspace)
    run.report.fact(
        f"{mebibytes(size)} of compressed weights are changed in files of {folder}; {mebibytes(free)} of memory are "
        "free (--offload)"
    )
    if config.dtype != before.dtype:
        run.report.fact(
            f"they are stored in {before.dtype} and must fit into memory once, to be converted to {config.dtype}; with "
            f"--dtype {before.dtype} they need not"
        )
    # Each process of this machine has files of its own.
    needs = [Need("compressed weights", run.group.launch.local_size * size, folder)]
    if not task.unfinished():
        # The states before the first level and after each one; the blocks of the last level, or the result.
        needs.append(Need("unfinished work", (len(levels) + 2) * size, task.workspace.root))
    check_room(needs, "free some space, or choose another workspace with -w", run.report)
    return partial(in_a_file, folder=folder)


def _parameters(before: Compressed) -> tuple[int, int]:
    """Return the number of parameters of the trainable form: in the factorised layers, and elsewhere."""
    dense = FactorsResults.read(before.factors)
    ranks, cost = read_allocation(before.ranks, before.specs).low_rank(), layout_named(TRAINED).cost
    inside = sum(
        cost(spec.m, spec.n, ranks[spec.name]) if spec.name in ranks else spec.dense_cost for spec in before.specs
    )
    return inside, dense.model_parameters - dense.linear_parameters


def _block_by_block(config: RecoverConfig) -> str:
    """Return the options of the levels that change one block at a time."""
    able = [f"--level {entry.name}" for entry in LEVELS if entry.load()().beside_weights(config, 1) is None]
    return " or ".join(reversed(able))
