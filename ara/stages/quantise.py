"""``ara quantise``: round the matrices of a compressed checkpoint to few bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ara.artifacts.checkpoint import CHECKPOINT, RoundingFigures
from ara.artifacts.factors import FactorsSettings
from ara.artifacts.ranks import RanksResults, read_allocation
from ara.artifacts.ranks_file import RANKS_FILE, read_embedding_bits
from ara.config import QuantiseConfig
from ara.config.sizes import few_bits
from ara.data.tokens import TokenWindows
from ara.environment import keep_freed_memory
from ara.errors import NumericalError, UsageError
from ara.layouts.grid import BITS, Bits, Grid
from ara.layouts.modeling_ara import RoundedMatrix
from ara.models.checkpoint import load
from ara.models.embeddings import find_embeddings
from ara.models.likelihood import nll_of_windows
from ara.models.weights import find_blocks
from ara.quantisation.sequential import Parts, round_model
from ara.stages.common import Run, begin, model_of, open_task, window_reader
from ara.stages.compressed import Compressed, require_compressed
from ara.stages.tuning import placed
from ara.workspace.store import Workspace
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter

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
        plan = _plan(config, before)
        run.report.step(f"Rounding {before.view.key}: {plan}")
        resolved = placed(config, run)
        if resolved.method == "nearest":
            # Nothing is read to calibrate with.
            resolved = resolved.model_copy(update={"samples": QuantiseConfig.model_fields["samples"].default})
        task.describe(
            name or _name(before.view.name, config),
            resolved.model_dump(mode="json") | {"dtype": before.dtype, "compute_dtype": resolved.dtype},
            (before.view, before.factors),
        )
        if (done := task.done()) is not None:
            return done
        windows = _windows(resolved, before.factors, task.workspace, run)
        with task.writer(seed=config.seed, resumable=True) as stage:
            if finished := stage.all_work():
                run.report.fact(f"resuming: {len(finished)} blocks are rounded already")
            if resolved.device == "cpu":
                keep_freed_memory()
            model = load(before.view.path / CHECKPOINT, resolved.device, resolved.dtype)
            rounded, found = _rounded(model, resolved, before, plan, windows, _Parts(stage), run)
            before.write(model, stage, run, {"rounding": found.plain()}, rounded, rounding=found)
        return task.view()


def _rounded(
    model: PreTrainedModel,
    config: QuantiseConfig,
    before: Compressed,
    plan: _Plan,
    windows: tuple[TokenWindows, TokenWindows],
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
    first = _loss(model, held.ids, config.batch_size, run)
    ids = train.ids if calibrated else None
    rounded = round_model(model, before.specs, grids, ids, config.batch_size, parts, run.report)
    after = _loss(model, held.ids, config.batch_size, run)
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
        block=plan.block,
        zero_points=plan.zero_points,
        method=config.method,
        windows=train.windows if calibrated else 0,
        held_out=held.windows,
        seq_len=held.ids.shape[1],
        loss_before=first,
        loss_after=after,
        embedding_bits=plan.embedding_bits,
    )


@dataclass(frozen=True)
class _Plan:
    """What is rounded to how many bits.

    Attributes:
        layers: path of a factorised layer → bits; layers without an entry stay.
        embedding_bits: of the embedding and the head; ``None``: they stay.
        block, zero_points: of all grids.
    """

    layers: Mapping[str, Bits]
    embedding_bits: Bits | None
    block: int
    zero_points: bool

    def __str__(self) -> str:
        widths = " and ".join(map(str, sorted(set(self.layers.values()))))
        layers = [f"layers to {widths} bits"] if widths else []
        ends = [f"embedding and head to {self.embedding_bits} bits"] if self.embedding_bits else []
        return ", ".join(layers + ends)

    def grids(self, model: PreTrainedModel) -> dict[str, Grid]:
        """Return path of a layer, of the embedding or of the head → grid.

        Raises:
            UnsupportedModelError: embedding and head of the model cannot be rounded.
            UsageError: a block is longer than a row of the embedding.
        """
        found = {name: Grid(bits, self.block, self.zero_points) for name, bits in self.layers.items()}
        if self.embedding_bits is not None:
            found |= find_embeddings(model).on(Grid(self.embedding_bits, self.block, self.zero_points))
        return found


def _plan(config: QuantiseConfig, before: Compressed) -> _Plan:
    """Return the bits that the config names; where it names none, those that the allocation has chosen.

    Raises:
        UsageError: nothing is rounded.
    """
    layers: dict[str, Bits]
    block: int = config.block
    zero_points = config.zero_points
    if config.bits is not None:
        layers = dict.fromkeys((spec.name for spec in before.specs), config.bits)
    else:
        choices = read_allocation(before.ranks, before.specs).choices
        layers = {name: bits for name, choice in choices.items() for bits in BITS if choice.bits == bits}
        if (size := RanksResults.read(before.ranks).size) is not None:
            block, zero_points = size.block, size.zero_points
    asked = config.embedding_bits
    bits = read_embedding_bits(before.ranks.path / RANKS_FILE) if asked is None else few_bits(asked)
    if not layers and bits is None:
        raise UsageError(
            f"{before.ranks.key} gives no layer 4 or 8 bits",
            "say how many: --bits 8; or choose them: ara allocate --size 90MB",
        )
    return _Plan(layers, bits, block, zero_points)


def _name(before: str, config: QuantiseConfig) -> str:
    """Return a name such as ``energy-0.80-int4-embedding8``."""
    embedding = [] if config.embedding_bits is None else [f"embedding{config.embedding_bits}"]
    layers = [f"int{config.bits}"] if config.bits is not None else [] if embedding else ["rounded"]
    return "-".join([before, *layers, *embedding])


class _Parts(Parts):
    """Finished blocks in the unfinished folder of the stage."""

    def __init__(self, stage: StageWriter) -> None:
        self.stage = stage

    def part(self, name: str) -> Path | None:
        """See :class:`Parts`."""
        found = self.stage.work(name)
        return None if found is None else found[0]

    def finish_part(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """See :class:`Parts`."""
        self.stage.finish_work(name, tensors, {})


def _windows(
    config: QuantiseConfig, decomposition: StageView, workspace: Workspace, run: Run
) -> tuple[TokenWindows, TokenWindows]:
    """Return windows to calibrate with and held-out ones, from the text of the decomposition after its own windows."""
    from ara.data.mixtures import resolved_text

    made, source = FactorsSettings.read(decomposition), model_of(decomposition, run)
    spec = resolved_text(made.text, source.load_tokenizer())
    return window_reader(spec, source, made.seq_len, made.seed, workspace, run).further(
        made.samples, config.samples, config.held_out
    )


@torch.inference_mode()
def _loss(model: PreTrainedModel, windows: torch.Tensor, batch_size: int, run: Run) -> float:
    """Return the mean negative log-likelihood of a model, nats per token."""
    losses = nll_of_windows(
        lambda ids: model(input_ids=ids, use_cache=False).logits,
        windows,
        model.device,
        batch_size,
        run.report,
        "Reading held-out text",
    )
    return float(losses.mean())
