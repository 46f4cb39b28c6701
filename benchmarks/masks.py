"""Speed of mask training: its forward and backward pass compared with that of the dense model, in turn in one run.

    python benchmarks/masks.py --workspace bench-quality --factors two-sided

The dense pass reads the same text. It computes gradients back to the embeddings and of no weight, as mask training
does. A second dense row has gradients of all weights of the linear layers, as in training of a model. The loss is
cross-entropy. Rows with KL have the loss of ``ara train-masks``, which also needs a pass of the dense model.
The ranks are those of ``--keep``: uniform, and by the energy allocator, which leaves layers dense.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ara.allocation.energy import Energy
from ara.allocation.uniform import Uniform
from ara.artifacts.factors import specs_of
from ara.config import AllocateConfig
from ara.masks.model import LossKind
from ara.models.losses import token_losses
from ara.solver.problem import Budget
from ara.stages.common import Run, model_of
from ara.stages.modules import load_modules
from ara.stages.tuning import open_tuning_context, placed
from ara_cli.console import Column, Console
from benchmarks.in_turn import seconds_in_turn


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=Path("bench-quality"), help="with a decomposition")
    parser.add_argument("--factors", help="decomposition [default: the latest]")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--windows", type=int, default=4, help="windows per pass")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    console = Console()
    run = Run(arguments.workspace, "python benchmarks/masks.py", console)
    workspace = run.open()
    view = workspace.require("factors", arguments.factors)
    config = placed(AllocateConfig(), run)
    context = open_tuning_context(view, specs_of(view), config, workspace, run)
    modules, model = load_modules(view), context.model
    budget = Budget.for_keep([module.spec for module in modules], arguments.keep)
    cuts = {name: kind().allocate(modules, budget).ranks for name, kind in (("uniform", Uniform), ("energy", Energy))}
    windows = context.train[: arguments.windows].to(model.device)
    plain = model_of(view, run).load_model(model.model.dtype, str(model.device)).requires_grad_(False)
    names = {spec.name for spec in model.specs}

    def dense(weights: bool) -> None:
        for name in names:
            plain.get_submodule(name).weight.requires_grad_(weights)
        embedded = plain.get_input_embeddings()(windows).requires_grad_()
        token_losses(plain(inputs_embeds=embedded, use_cache=False).logits, windows).sum().backward()
        plain.zero_grad(set_to_none=True)

    def masked(cut: str, loss: LossKind) -> None:
        model.use(cuts[cut])
        model.gradients(windows, loss, len(windows))

    passes: dict[str, Callable[[], None]] = {
        "dense": lambda: dense(False),
        "dense with weight gradients": lambda: dense(True),
        **{f"masks, {name} ranks": partial(masked, name, "ce") for name in cuts},
        **{f"masks, {name} ranks, KL": partial(masked, name, "kl") for name in cuts},
    }
    seconds = seconds_in_turn(console, passes, arguments.rounds, model.device)
    rows = []
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["dense"], strict=True)]
        rows.append(
            (
                name,
                f"{windows.numel() / statistics.median(values):,.0f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})",
            )
        )
    columns = [Column("forward + backward of", "left"), Column("tokens/s"), Column("time over dense (range)")]
    title = f"keep {arguments.keep:g}, {windows.shape[0]} × {windows.shape[1]} tokens, {arguments.rounds} rounds"
    console.table(title, columns, rows)


if __name__ == "__main__":
    main()
