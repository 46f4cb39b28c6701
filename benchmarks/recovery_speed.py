"""Speed of the levels that train, compared with a forward and backward pass of the dense model, in turn in one run.

    python benchmarks/recovery_speed.py --workspace WS --checkpoint NAME

The dense pass computes gradients of all weights of its blocks, with cross-entropy. A step of distillation reads the
same windows: logits of the dense model (computed, or from its kept output), forward and backward pass, optimiser. Block
training goes through all blocks: targets, a step per epoch, and the block's outputs; its time is divided by the epochs.
The windows are random tokens: only times are measured.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from ara.artifacts.checkpoint import CHECKPOINT
from ara.artifacts.ranks import layout_of
from ara.models.checkpoint import load
from ara.models.losses import token_losses
from ara.models.placement import choose_placement, torch_dtype
from ara.models.scores import Head
from ara.models.weights import find_blocks
from ara.recovery.base import Passes, RecoveryText
from ara.recovery.metric import Metric
from ara.recovery.optimiser import MasterOptimiser, Method, trained
from ara.recovery.side_by_side import SideBySide
from ara.recovery.teacher import Teacher, divergence_from
from ara.recovery.trainable import to_trainable
from ara.stages.common import Run, model_of
from ara_cli.console import Column, Console
from benchmarks.in_turn import seconds_in_turn


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=Path("ara-demo"), help="with a checkpoint")
    parser.add_argument("--checkpoint", help="NAME or STAGE/NAME [default: the latest]")
    parser.add_argument("--windows", type=int, default=4, help="windows per pass")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window")
    parser.add_argument("--epochs", type=int, default=2, help="passes of block training")
    parser.add_argument("--optimiser", default="muon", choices=("muon", "adamw"), help="of matrices in distillation")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    console = Console()
    run = Run(arguments.workspace, "python benchmarks/recovery_speed.py", console)
    workspace, placement = run.open(), choose_placement()
    checkpoint = workspace.require("checkpoint", arguments.checkpoint)
    chosen = workspace.ancestor(checkpoint, "ranks")
    source = model_of(workspace.ancestor(chosen, "factors"), run)
    dtype = torch_dtype(placement.dtype)
    dense, reference = (source.load_model(dtype, placement.device).eval().requires_grad_(False) for _ in range(2))
    model = load(checkpoint.path / CHECKPOINT, placement.device, placement.dtype)
    to_trainable(model, layout_of(chosen))
    size = (arguments.windows, arguments.seq_len)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, size, generator=generator).to(dense.device)
    passes = _passes(dense, reference, model, ids, arguments.epochs, arguments.optimiser)
    seconds = seconds_in_turn(console, passes, arguments.rounds, dense.device)
    base = "dense, forward and backward"
    rows = []
    for name, values in seconds.items():
        each = [value / (arguments.epochs if "block" in name else 1) for value in values]
        ratios = [value / first for value, first in zip(each, seconds[base], strict=True)]
        share = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})"
        rows.append((name, f"{ids.numel() / statistics.median(each):,.0f}", share))
    columns = [Column("", "left"), Column("tokens/s"), Column("time over dense (range)")]
    title = f"{checkpoint.key}, {size[0]} × {size[1]} tokens, {arguments.rounds} rounds, {placement.dtype}"
    console.table(title, columns, rows)


def _passes(
    dense: torch.nn.Module,
    reference: torch.nn.Module,
    model: torch.nn.Module,
    ids: torch.Tensor,
    epochs: int,
    method: Method,
) -> dict[str, Callable[[], None]]:
    """Return what is timed, by name; ``reference`` is a second dense model, whose blocks get gradients."""
    text = RecoveryText(ids)
    rows = torch.arange(len(ids))
    for block in find_blocks(reference)[1]:
        block.requires_grad_(True)
    path, blocks = find_blocks(model)
    parameters = {name: one for name, one in model.named_parameters() if name.startswith(f"{path}.")}
    metric = Metric(None, ids.device)
    model.requires_grad_(False)
    trained(parameters.items())

    def dense_pass() -> None:
        """Run the dense model forward and backward."""
        token_losses(reference(input_ids=ids, use_cache=False).logits, ids).sum().backward()
        reference.zero_grad(set_to_none=True)

    @cache
    def optimiser() -> MasterOptimiser:
        return MasterOptimiser(trained(parameters.items()), 10**6, 1e-9, method=method)

    def distil(teacher: Teacher) -> None:
        """Take one step of distillation."""
        head.scores(ids).losses(divergence_from(teacher.scores(rows), ids)).sum().backward()
        optimiser().step(1 / ids.numel())

    def block_training() -> None:
        """Train every block for all epochs, from the embeddings on."""
        for block in blocks:
            block.requires_grad_(False)
        pair = SideBySide(dense, model, text, len(ids), Passes(independent=True), False)
        for index, block in enumerate(blocks):
            pair.aim()
            adam = MasterOptimiser(trained(block.named_parameters()), 10**6, 1e-9)
            for _ in range(epochs):
                (pair.forms(0, [metric], pair.run(0))[0] / ids.numel()).backward()
                adam.step()
            block.requires_grad_(False)
            if index + 1 < len(blocks):
                pair.advance(pair.outputs())
        trained(parameters.items())

    head, kept = Head(model), Teacher(dense, ids, keep=True)
    return {
        "dense, forward and backward": dense_pass,
        "distill, dense logits computed": lambda: distil(Teacher(dense, ids, keep=False)),
        "distill, dense output kept": lambda: distil(kept),
        f"block, {epochs} epochs, per epoch": block_training,
    }


if __name__ == "__main__":
    main()
