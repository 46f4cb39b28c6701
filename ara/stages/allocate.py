"""``ara allocate``: choose a rank, or dense, for every layer under one budget; the factors are only read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from ara.allocation import ALLOCATORS
from ara.allocation.base import Allocation, Allocator, Module, cost
from ara.allocation.budget import Budget
from ara.allocation.ranks_file import RANKS_FILE, ranks_document, read_ranks
from ara.config import AllocateConfig, method_options
from ara.errors import UsageError
from ara.manifest import file_sha256
from ara.models.linears import LinearSpec
from ara.stage_view import StageView, parent_of
from ara.stages.common import Run, already_done, begin, layer_file, specs_of


def allocate(
    config: AllocateConfig, run: Run, *, factors: str | None = None, name: str | None = None, ranks: Path | None = None
) -> StageView:
    """Allocate ranks and store them as ``ranks.json``.

    Args:
        config: budget and method.
        run: workspace and reporter.
        factors: name of the decomposition; the latest by default.
        name: of the result; says method and keep by default.
        ranks: take the ranks from this file instead of a method; with ``config.keep`` they are held to that budget.

    Raises:
        AraError: no decomposition, a budget that cannot be met, a ranks file that does not fit.
    """
    started = begin()
    workspace = run.open()
    with workspace.lock(run.command):
        decomposition = workspace.require("decompose", factors)
        specs = specs_of(decomposition)
        if ranks is None:
            if config.keep is None:
                raise UsageError("no budget given", "add --keep 0.8, for example")
            run.report.step(f"Allocating ranks by {config.method} at keep {config.keep:g}")
        else:
            run.report.step(f"Reading ranks from {ranks}")
            _refuse_method_settings(config)
        name = name or default_name(config, decomposition.name, ranks)
        resolved = config if ranks is None else config.model_copy(update={"ranks_sha256": _checksum(ranks)})
        assert decomposition.manifest is not None
        facts = {"config": resolved, "model": decomposition.manifest.model, "parents": (parent_of(decomposition),)}
        done = workspace.finished("allocate", name, facts, run.report)
        if done is not None and not run.force:
            return already_done(done, run)
        allocation = _from_file(config, ranks, specs) if ranks else _by_method(config, decomposition, specs)
        results = summary(allocation, specs, decomposition.manifest.results["model_parameters"])
        with workspace.writer("allocate", name, facts, command=run.command, started=started) as stage:
            about = {"method": "file" if ranks else config.method, **{k: v for k, v in results.items() if k != "kinds"}}
            (stage.folder / RANKS_FILE).write_text(ranks_document(allocation, about), encoding="utf-8")
            stage.results.update(results)
        return workspace.view(f"allocate/{name}")


def default_name(config: AllocateConfig, factors: str, ranks: Path | None = None) -> str:
    """Return a name that says decomposition (unless whitened), method and keep, such as ``energy-0.80``."""
    parts = [] if factors == "whitened" else [factors]
    if ranks is not None:
        return "-".join([*parts, ranks.stem])
    assert config.keep is not None
    keep = f"{config.keep:g}"
    parts += [config.method, keep if len(keep) > 4 else f"{config.keep:.2f}"]
    if config.rank_multiple > 1:
        parts.append(f"x{config.rank_multiple}")
    return "-".join(parts)


def load_modules(decomposition: StageView) -> list[Module]:
    """Read the spectra of a decomposition, and nothing else of its factors."""
    modules, specs = [], specs_of(decomposition)
    for layer in dict.fromkeys(spec.layer for spec in specs):
        with safe_open(decomposition.path / layer_file(layer), "pt") as file:
            for spec in (spec for spec in specs if spec.layer == layer):
                modules.append(Module(spec, file.get_tensor(f"{spec.name}.spectrum")))
    return modules


def summary(allocation: Allocation, specs: list[LinearSpec], model_parameters: int) -> dict[str, Any]:
    """Return the figures of an allocation: what is kept of the linear layers and of the whole model, and by kind."""
    linear_parameters = sum(spec.dense_cost for spec in specs)
    parameters = allocation.cost(specs)
    kinds = {}
    for kind in dict.fromkeys(spec.kind for spec in specs):
        members = [spec for spec in specs if spec.kind == kind]
        ranks = [rank for spec in members if (rank := allocation.ranks[spec.name]) is not None]
        kinds[kind] = {
            "layers": len(members),
            "shape": [members[0].m, members[0].n],
            "dense": len(members) - len(ranks),
            "rank_min": min(ranks, default=None),
            "rank_mean": sum(ranks) / len(ranks) if ranks else None,
            "rank_max": max(ranks, default=None),
            "keep": sum(cost(s, allocation.ranks[s.name]) for s in members) / sum(s.dense_cost for s in members),
        }
    return {
        "linear_parameters_dense": linear_parameters,
        "linear_parameters": parameters,
        "linear_keep": parameters / linear_parameters,
        "model_parameters_dense": model_parameters,
        "model_parameters": model_parameters - linear_parameters + parameters,
        "model_keep": (model_parameters - linear_parameters + parameters) / model_parameters,
        "dense_layers": allocation.dense_count(),
        "kinds": kinds,
    }


def read_allocation(view: StageView, specs: list[LinearSpec]) -> Allocation:
    """Read the ranks of a finished allocation."""
    return read_ranks(view.path / RANKS_FILE, specs)


def _by_method(config: AllocateConfig, decomposition: StageView, specs: list[LinearSpec]) -> Allocation:
    entry = ALLOCATORS.entry(config.method)
    allocator: Allocator = entry.load()(method_options(entry.load().Options, config.options))
    assert config.keep is not None
    budget = Budget.for_keep(specs, config.keep, config.rank_multiple, config.min_rank)
    allocation = allocator.allocate(load_modules(decomposition), budget)
    assert allocation.cost(specs) <= budget.parameters, f"{config.method} went over the budget"
    return allocation


def _refuse_method_settings(config: AllocateConfig) -> None:
    """Settings of a method mean nothing when the ranks come from a file."""
    unset = AllocateConfig(keep=config.keep)
    given = [
        key for key in ("method", "options", "rank_multiple", "min_rank") if getattr(config, key) != getattr(unset, key)
    ]
    if given:
        flags = ", ".join(f"--{key.replace('_', '-').removesuffix('s')}" for key in given)
        raise UsageError(f"--ranks FILE and {flags} are both given", "the file says every rank: leave the others out")


def _from_file(config: AllocateConfig, path: Path, specs: list[LinearSpec]) -> Allocation:
    allocation = read_ranks(path, specs)
    if config.keep is not None:
        limit = Budget.for_keep(specs, config.keep).parameters
        spent = allocation.cost(specs)
        if spent > limit:
            raise UsageError(
                f"the ranks in {path} cost {spent:,} parameters; keep {config.keep:g} allows {limit:,}",
                f"lower some ranks, or give --keep {allocation.keep(specs) + 0.0005:.3f}, or no --keep at all",
            )
    return allocation


def _checksum(path: Path) -> str | None:
    # A file that cannot be read is reported by read_ranks, in full.
    return file_sha256(path) if path.is_file() else None
