"""``ara allocate --objective latency``: the times of all ranks on this machine, which the budget counts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

import torch

from ara.allocation import ALLOCATORS
from ara.artifacts.ranks import LatencyResults, ShapeLatency
from ara.config.allocate import TimedConfig
from ara.config.latency import LatencyConfig, Objective
from ara.environment import machine
from ara.errors import UsageError
from ara.evaluation.layer_times import LayerRunner, LayerRuntime, TorchLayers, layer_seconds
from ara.masks.table_cache import LayerTable, stored_table
from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation, Budget
from ara.solver.times import ShapeTimes, TimeTable
from ara.stages.common import Run, check_threads
from ara.workspace.store import Workspace

LATENCY: Objective = "latency"
# Ranks of a shape that are timed, evenly spaced, besides the least one; times are linear in between.
_RANKS = 12
# Passes of each layer; the median counts.
_ROUNDS = 31

C = TypeVar("C", bound=TimedConfig)


def check_settings(config: LatencyConfig) -> None:
    """Check that the settings of the measurement belong to the objective, and fit together.

    Raises:
        UsageError: they do not.
    """
    if config.objective != LATENCY:
        fields = LatencyConfig.model_fields
        for name in fields:
            value = getattr(config, name)
            if name.startswith("latency_") and value != fields[name].default:
                flag = f"--{name.replace('_', '-')} {value}"
                raise UsageError(f"{flag} is given without --objective latency", "add --objective latency")
        return
    check_threads(config.latency_threads, "--latency-threads")
    if config.latency_backend == "torch" and config.latency_precision is not None:
        raise UsageError(
            f"--latency-precision {config.latency_precision} is given, and --latency-backend is torch",
            "add --latency-backend onnx, or give --dtype instead",
        )


def refuse_objective(method: str, objective: Objective) -> None:
    """Check that an allocator supports an objective.

    Raises:
        UsageError: it does not, or there is no such allocator.
    """
    if objective not in ALLOCATORS.load(method).objectives:
        able = [name for name in ALLOCATORS.names() if objective in ALLOCATORS.load(name).objectives]
        raise UsageError(
            f"--method {method} does not support --objective {objective}", f"use --method {' or '.join(able)}"
        )


def keep_in_words(config: LatencyConfig, keep: float) -> str:
    """Return a budget in words: the share to keep, and of what, unless of the parameters."""
    return f"keep {keep:g}{' of the time' if config.objective == LATENCY else ''}"


def latency_words(config: LatencyConfig) -> list[str]:
    """Return the parts of a result's name for this objective; none for the other one."""
    if config.objective != LATENCY:
        return []
    default = LatencyConfig.model_fields["latency_tokens"].default
    precision = (
        [] if config.latency_backend == "torch" else [config.latency_backend, config.latency_precision or "fp32"]
    )
    return ["latency", *precision, *([] if config.latency_tokens == default else [f"{config.latency_tokens}tokens"])]


def timed_in(config: C, layers: LayerRunner | None) -> tuple[C, LayerRunner]:
    """Return the runner of the layers, and ``config`` with the machine that they are timed on.

    Args:
        config: with resolved device and dtype.
        layers: of a backend other than torch; ``None`` for torch.
    """
    if layers is None:
        assert config.latency_backend == "torch", "this backend needs a runner"
        layers = TorchLayers(config.device, config.dtype, config.latency_threads)
    here = _hardware(layers.runtime)
    return config.model_copy(update={"latency_machine": f"{here}; {layers.runtime.library}"}), layers


def measured_times(
    config: TimedConfig, specs: Sequence[LinearSpec], layers: LayerRunner, workspace: Workspace, run: Run
) -> TimeTable:
    """Time every shape of a model, dense and at some ranks, or read the times from the cache of the workspace.

    Times are those of this machine, runtime and number of tokens. Layers of one shape share them.

    Args:
        config: tokens, and multiple of the ranks.
        specs: the layers.
        layers: runs them.
        workspace: for the cache.
        run: reporter; with ``force`` the times are measured again.
    """
    shapes = {_name(spec): spec for spec in specs}
    timed = {name: [None, *timed_ranks(spec, config.rank_multiple)] for name, spec in shapes.items()}
    runtime = layers.runtime

    def measure() -> LayerTable:
        begun = time.monotonic()
        asked = [(shapes[name], rank) for name, ranks in timed.items() for rank in ranks]
        found = iter(layer_seconds(layers, asked, config.latency_tokens, _ROUNDS, run.report))
        values = {
            name: torch.tensor([next(found) for _ in ranks], dtype=torch.float64) for name, ranks in timed.items()
        }
        return LayerTable(values, time.monotonic() - begun)

    run.report.fact(f"times of {config.latency_tokens} tokens in {runtime.library}, {runtime.precision}")
    key = ["times", machine(), asdict(runtime), config.layout, config.latency_tokens, _ROUNDS, timed]
    sizes = {name: len(ranks) for name, ranks in timed.items()}
    folder = workspace.cache / "tables"
    table = stored_table(folder, key, sizes, measure, "table of times", run.report, again=run.force)
    return TimeTable({(spec.m, spec.n): _times(timed[name], table.values[name]) for name, spec in shapes.items()})


def timed_ranks(spec: LinearSpec, multiple: int) -> list[int]:
    """Return the ranks of a layer that are timed: its least and its largest one, and some in between."""
    steps = spec.top_rank // multiple
    return sorted({multiple * max(1, round(steps * i / _RANKS)) for i in range(_RANKS + 1)}) if steps else []


def latency_results(
    config: TimedConfig,
    specs: Sequence[LinearSpec],
    allocation: Allocation,
    budget: Budget,
    runtime: LayerRuntime,
) -> LatencyResults:
    """Return the predicted time of an allocation, and the times that it was predicted from."""
    assert budget.times is not None
    ranks = allocation.ranks
    return LatencyResults(
        **asdict(runtime),
        machine=machine(),
        tokens=config.latency_tokens,
        dense_ns=sum(budget.dense_cost(spec) for spec in specs),
        limit_ns=budget.limit,
        predicted_ns=budget.times.total(specs, ranks),
        shapes=tuple(
            ShapeLatency((m, n), times.dense, {str(rank): value for rank, value in times.ranks.items()})
            for (m, n), times in budget.times.shapes.items()
        ),
    )


def _times(ranks: Sequence[int | None], seconds: torch.Tensor) -> ShapeTimes:
    found: Mapping[int | None, float] = dict(zip(ranks, seconds.tolist(), strict=True))
    return ShapeTimes.of_seconds(found[None], {rank: value for rank, value in found.items() if rank is not None})


def _name(spec: LinearSpec) -> str:
    return f"{spec.m}x{spec.n}"


def _hardware(runtime: LayerRuntime) -> str:
    """Return the processor, or the GPU, in words."""
    if runtime.device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(runtime.device))
    about = machine()
    return f"{about['processor'] or about['system']}, {about['cores']} cores"
