"""``ara quantise``: round the matrices of a compressed checkpoint to few bits."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ara.artifacts.checkpoint import CHECKPOINT, RoundingFigures
from ara.artifacts.factors import FactorsResults
from ara.artifacts.ranks import RanksResults, read_allocation
from ara.artifacts.ranks_file import RANKS_FILE, FewBits, read_few_bits
from ara.calibration.kept_moments import KeptMoments
from ara.config import QuantiseConfig
from ara.config.sizes import few_bits
from ara.data.tokens import TokenWindows
from ara.environment import keep_freed_memory
from ara.errors import NumericalError, UsageError
from ara.layouts.grid import Grid
from ara.layouts.modeling_ara import RoundedMatrix
from ara.models.checkpoint import load
from ara.models.likelihood import nll_of_model
from ara.models.weights import find_blocks
from ara.quantisation.plan import RoundingPlan
from ara.quantisation.sequential import Parts, round_model
from ara.stages.common import Run, begin, embedding_words, open_task
from ara.stages.compressed import Compressed, require_compressed
from ara.stages.moments import kept_moments
from ara.stages.rounding_parts import RoundingParts
from ara.stages.tuning import further_windows, placed
from ara.workspace.view import StageView

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantise(config: QuantiseConfig, run: Run, *, checkpoint: str | None = None, name: str | None = None) -> StageView:
    """Round a checkpoint to few bits, and store the result as a further checkpoint.

    Norms, biases and positions stay as they are, and the embedding and the head unless they have bits of their own.

    Args:
        config: bits, length of blocks, method, calibration windows.
        run: workspace and reporter.
        checkpoint: NAME or STAGE/NAME of the checkpoint; by default the latest that is not rounded.
        name: of the result; the checkpoint's name and the bits by default.

    Raises:
        AraError: no checkpoint, a densified or rounded one, too little text, NaN, or a loss beyond the tolerance.
    """
    started = begin(name, checkpoint)
    with open_task("quantise", run, started) as task:
        before = require_compressed(task.workspace, checkpoint, (), "quantise")
        if before.rounding is not None:
            raise UsageError(
                f"{before.view.key} is rounded to {before.rounding.widths} bits",
                "quantise the checkpoint that it was made from",
            )
        wanted = config.method == "calibrated" and config.inputs == "dense"
        if wanted and FactorsResults.read(before.factors).moments is None:
            raise UsageError(
                f"--inputs dense is given, and {before.factors.key} has kept no second moments",
                "omit it to read text instead; or run ara decompose --keep-moments yes",
            )
        config, plan = _plan(config, before)
        run.report.step(f"Rounding {before.view.key}: {plan}")
        resolved = placed(config, run)
        moments = kept_moments(before.factors, run) if wanted else None
        if resolved.method == "nearest" or (moments is not None and plan.embedding_bits is None):
            # Nothing is read to calibrate with.
            resolved = resolved.model_copy(update={"samples": QuantiseConfig.model_fields["samples"].default})
        settings = resolved.model_dump(mode="json", exclude={"inputs"})
        settings |= {"dtype": before.dtype, "compute_dtype": resolved.dtype}
        if moments is not None:
            settings["inputs"] = "dense"
        task.describe(name or _name(before.view.name, config), settings, (before.view, before.factors))
        if (done := task.done()) is not None:
            return done
        windows = further_windows(before.factors, resolved.samples, resolved.held_out, task.workspace, run)
        with task.writer(seed=config.seed, resumable=True) as stage:
            if finished := stage.all_work():
                run.report.fact(f"resuming: {len(finished)} blocks are rounded already")
            if resolved.device == "cpu":
                keep_freed_memory()
            model = load(before.view.path / CHECKPOINT, resolved.device, resolved.dtype, before.shared_experts)
            rounded, found = _rounded(model, resolved, before, plan, windows, moments, RoundingParts(stage), run)
            before.write(model, stage, run, {"rounding": found.plain()}, rounded, rounding=found)
        return task.view()


def _rounded(
    model: PreTrainedModel,
    config: QuantiseConfig,
    before: Compressed,
    plan: RoundingPlan,
    windows: tuple[TokenWindows, TokenWindows],
    moments: KeptMoments | None,
    parts: Parts,
    run: Run,
) -> tuple[dict[str, RoundedMatrix], RoundingFigures]:
    """Round the model in place, and measure it before and after.

    Args:
        model: the checkpoint's; afterwards its weights are the rounded ones.
        config: with resolved device and dtype.
        before: the checkpoint.
        plan: what is rounded to how many bits.
        windows: to calibrate with, and held-out ones.
        moments: of the layers' inputs in the dense model; ``None``: their inputs are read.
        parts: finished blocks of an interrupted run.
        run: reporter.

    Returns:
        Path of a matrix → its module of few bits, and the figures.

    Raises:
        NumericalError: NaN, or a loss beyond the tolerance.
    """
    train, held = windows
    calibrated = config.method == "calibrated"
    grids = plan.grids(model)
    first = float(nll_of_model(model, held.ids, config.batch_size, run.report).mean())
    ids = train.ids if calibrated else None
    rounded = round_model(model, before.specs, grids, ids, config.batch_size, parts, run.report, moments)
    after = float(nll_of_model(model, held.ids, config.batch_size, run.report).mean())
    run.report.fact(f"held-out loss {first:.4f} → {after:.4f} nats per token")
    if not after - first <= config.tolerance:
        raise NumericalError(
            f"rounding raises the held-out loss from {first:.4f} to {after:.4f} nats per token, "
            f"allowed are {config.tolerance:g}",
            "use --bits 8, a smaller --block, or a larger --tolerance",
        )
    inside = f"{find_blocks(model)[0]}."
    counts = Counter(str(one.bits) for path, one in rounded.items() if path.startswith(inside))
    return rounded, RoundingFigures(
        bits=dict(sorted(counts.items())),
        block=plan.blocks[0],
        zero_points=any(one.zeros is not None for one in rounded.values()),
        method=config.method,
        windows=0 if not calibrated else train.windows if moments is None else _windows_of(before.factors),
        held_out=held.windows,
        seq_len=held.ids.shape[1],
        loss_before=first,
        loss_after=after,
        embedding_bits=plan.embedding_bits,
        blocks=plan.blocks if len(plan.blocks) > 1 else None,
    )


def _windows_of(decomposition: StageView) -> int:
    """Return the number of windows that a decomposition has read."""
    windows = FactorsResults.read(decomposition).windows
    return windows[0] if windows else 0


def _plan(config: QuantiseConfig, before: Compressed) -> tuple[QuantiseConfig, RoundingPlan]:
    """Return the bits that the config names; where it names none, bits and blocks that the allocation has chosen.

    Returns:
        The config with the grid of layers for which nothing else is chosen, and the plan.

    Raises:
        UsageError: nothing is rounded.
    """
    few = read_few_bits(before.ranks.path / RANKS_FILE)
    layers: dict[str, Grid]
    grid: tuple[int, bool]
    size = None
    if config.bits is not None:
        grid = config.block, config.zero_points
        layers = dict.fromkeys((spec.name for spec in before.specs), Grid(config.bits, *grid))
    else:
        size = RanksResults.read(before.ranks).size
        grid = _grid(config, few if size is None else FewBits(few.embedding, size.block, size.zero_points), before)
        layers = read_allocation(before.ranks, before.specs).grids(*grid)
    bits = few.embedding if config.embedding_bits is None else few_bits(config.embedding_bits)
    if not layers and bits is None:
        if size is not None:
            raise UsageError(
                f"nothing is to be rounded: in {before.ranks.key} all layers have their full width within the size",
                f"use {before.view.key} as it is, or say how many bits: --bits 8",
            )
        raise UsageError(
            f"{before.ranks.key} gives no layer 4 or 8 bits",
            "say how many: --bits 8; or choose them: ara allocate --size 90MB",
        )
    settled = config.model_copy(update=dict(zip(("block", "zero_points"), grid, strict=True)))
    return settled, RoundingPlan(layers, None if bits is None else Grid(bits, *grid))


def _grid(config: QuantiseConfig, few: FewBits, before: Compressed) -> tuple[int, bool]:
    """Return block and zero points of what has few bits: those that the ranks were chosen with, where they say.

    Raises:
        UsageError: another block, or no zero points, are asked for.
    """
    chosen = {"block": few.block, "zero_points": few.zero_points}
    for key, value in chosen.items():
        asked = getattr(config, key)
        # The default cannot be told from the same value on the command line.
        if value not in (None, asked) and asked != QuantiseConfig.model_fields[key].default:
            flag = f"--block {asked}" if key == "block" else "--no-zero-points"
            made = f"blocks of {value}" if key == "block" else "zero points"
            raise UsageError(
                f"{flag} is given, and the ranks and bits of {before.ranks.key} were chosen with {made}",
                f"omit {flag.split()[0]}, or give it to ara allocate",
            )
    block = config.block if few.block is None else few.block
    return block, config.zero_points if few.zero_points is None else few.zero_points


def _name(before: str, config: QuantiseConfig) -> str:
    """Return a name such as ``energy-0.80-int4-embedding8``."""
    embedding = embedding_words(config.embedding_bits)
    layers = [f"int{config.bits}"] if config.bits is not None else [] if embedding else ["rounded"]
    return "-".join([before, *layers, *embedding])
