"""``ara allocate --size``: ranks and bits under one budget of bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from ara.allocation.forms import JOINT
from ara.allocation.guard import Verdict, verdict_of
from ara.allocation.joint import Rounder
from ara.allocation.sized import SizedAllocator, least_bytes
from ara.artifacts.factors import FactorsResults, specs_of
from ara.artifacts.ranks import SizeResults
from ara.config import AllocateConfig
from ara.config.allocate import SizedConfig
from ara.config.sizes import few_bits
from ara.errors import UsageError
from ara.layouts.grid import BITS, Grid
from ara.models.embeddings import find_embeddings
from ara.solver.file_sizes import bytes_beside, bytes_saved, check_room
from ara.solver.problem import Allocation
from ara.stages.common import Run, model_of
from ara.stages.modules import load_modules
from ara.stages.moments import kept_moments
from ara.stages.tuning import open_tuning_context
from ara.workspace.store import Workspace
from ara.workspace.view import StageView

if TYPE_CHECKING:
    import torch

# Fields of the config that give a size.
SIZES = ("size", "bits_per_parameter", "budget_bytes")


def allocate_bytes(
    config: AllocateConfig,
    decomposition: StageView,
    workspace: Workspace,
    run: Run,
) -> tuple[Allocation, Verdict | None, SizeResults]:
    """Choose rank and bits of every layer; the guard compares with one width for all, dense or at chosen ranks.

    Args:
        config: with a size, and with resolved device and dtype.
        decomposition: the factors.
        workspace: for the caches.
        run: reporter.

    Raises:
        UsageError: the size is too small.
    """
    limit = config.limit_bytes(FactorsResults.read(decomposition).model_parameters)
    others = other_bytes(decomposition) - saved_bytes(config, decomposition, run)
    # Before anything is measured.
    specs = specs_of(decomposition, config.layout)
    least = least_bytes(config, specs, _grids(config, config.bits), config.bits)
    check_room(limit, others, config.asked_sizes[0], least)
    sized = open_sized_allocator(config, config.bits, decomposition, workspace, run)
    chosen, verdict = sized.best(limit - others, config.bits), None
    if config.guard:
        candidates = {JOINT: chosen, **_one_width(sized, limit - others, sized.widths(config.bits))}
        verdict = verdict_of(candidates, sized.rounder.losses(candidates))
        shown = ", ".join(f"{name} {verdict.held_out[name]:.4f}" for name in ("dense", *candidates))
        run.report.fact(f"held-out negative log-likelihood, nats per token: {shown}")
        if verdict.winner != JOINT:
            run.report.warn(
                f"{verdict.winner} is better than {JOINT} on held-out text and is used instead (off: --no-guard)"
            )
        chosen = candidates[verdict.winner]
    counts = Counter(str(choice.bits) for choice in chosen.choices.values())
    size = SizeResults(
        limit=limit,
        linear=chosen.cost,
        others=others,
        layers=dict(sorted(counts.items())),
        block=config.blocks[0],
        blocks=blocks_of(chosen) if len(config.blocks) > 1 else None,
        zero_points=config.zero_points,
        embedding_bits=few_bits(config.embedding_bits),
    )
    return chosen, verdict, size


def blocks_of(allocation: Allocation) -> dict[str, int]:
    """Return length of blocks → number of layers, of those with few bits."""
    counts = Counter(str(choice.block) for choice in allocation.choices.values() if choice.block is not None)
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def refuse_with_size(config: AllocateConfig, masks: str | None) -> None:
    """Check that a size is the only budget, and that no method is named.

    Args:
        config: with at least one size.
        masks: name of a training.

    Raises:
        UsageError: it is not.
    """
    keep = [f"--keep {config.keep:g}"] if config.keep is not None and "keep" in config.model_fields_set else []
    budgets = [*keep, *config.asked_sizes]
    if len(budgets) > 1:
        raise UsageError(f"{' and '.join(budgets)} are given together", "give one budget")
    if config.objective != "parameters":
        raise UsageError(
            f"--objective {config.objective} and {budgets[0]} are given together",
            f"a size limits bytes: omit --objective, or give --keep instead of {budgets[0]}",
        )
    others = {"--method": None if config.method == "auto" else config.method, "--masks": masks}
    for flag, value in others.items():
        if value is not None:
            raise UsageError(
                f"{flag} {value} and {budgets[0]} are given together",
                f"omit {flag}: ranks and bits for a size have a method of their own",
            )


def size_name(config: AllocateConfig) -> str:
    """Return a size as a part of a name: ``90MB``, ``3.5bits`` or ``90000000B``."""
    if config.size is not None:
        return config.size
    return f"{config.budget_bytes}B" if config.budget_bytes is not None else f"{config.bits_per_parameter:g}bits"


def open_sized_allocator(
    config: SizedConfig,
    bits: Sequence[int],
    decomposition: StageView,
    workspace: Workspace,
    run: Run,
    windows: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> SizedAllocator:
    """Load the model, and measure what ranks and rounding lose.

    Args:
        config: with resolved device and dtype.
        bits: bits per weight that will be chosen from; 16 means not rounded.
        decomposition: the factors.
        workspace: for the caches.
        run: reporter.
        windows: see :func:`ara.stages.tuning.open_tuning_context`.
    """
    modules = load_modules(decomposition, config.layout)
    specs = [module.spec for module in modules]
    context = open_tuning_context(decomposition, specs, config, workspace, run, windows)
    context = replace(context, moments=kept_moments(decomposition, run))
    grids = _grids(config, bits)
    ends = few_bits(config.embedding_bits)
    grid = None if ends is None else Grid(ends, config.blocks[0], config.zero_points)
    return SizedAllocator(modules, Rounder(context, grids, grid), config)


def _grids(config: SizedConfig, bits: Sequence[int]) -> list[Grid]:
    """Return the grids to choose from: every number of bits with every length of blocks."""
    widths = [width for width in BITS if width in bits]
    return [Grid(width, block, config.zero_points) for width in widths for block in config.blocks]


def _one_width(sized: SizedAllocator, limit: int, widths: Sequence[int]) -> dict[str, Allocation]:
    """Return the allocations of one width for all layers, by name: dense where that fits, and at the best ranks."""
    found = {}
    for bits in widths:
        # Of several lengths of blocks, the best that fit.
        with suppress(UsageError):
            found[f"dense, {bits} bits"] = sized.best(limit, (bits,), ranks=False)
        # Of a single width they are the choice itself.
        if len(widths) > 1:
            with suppress(UsageError):
                found[f"ranks, {bits} bits"] = sized.best(limit, (bits,))
    return found


def other_bytes(decomposition: StageView) -> int:
    """Return the bytes of all that is not a factorised layer, with the headers of the weight files."""
    results, specs = FactorsResults.read(decomposition), specs_of(decomposition)
    return bytes_beside(results.model_parameters - results.linear_parameters, specs)


def saved_bytes(config: SizedConfig, decomposition: StageView, run: Run) -> int:
    """Return by how many bytes the embedding and the head become smaller.

    Raises:
        UnsupportedModelError: they cannot be rounded.
        UsageError: a block is longer than a row.
    """
    bits = few_bits(config.embedding_bits)
    if bits is None:
        return 0
    embeddings = find_embeddings(model_of(decomposition, run).empty_model())
    return bytes_saved(embeddings, specs_of(decomposition)[0].bits, Grid(bits, config.blocks[0], config.zero_points))
