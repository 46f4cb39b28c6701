"""Variants of mask training: each changes one setting and is compared by its held-out loss.

    ARA_DATA_DIR=... make bench-ablation
    python benchmarks/ablation.py --workspace bench-quality --only default --only adam

All variants have the same factors and budget, and read the same number of windows in the same order: variants with
fewer windows per step make more steps. Most start from the same sensitivity table. No evaluation text is read. A
finished variant is not trained again. An interrupted one continues.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ara.artifacts.training import TrainingResults
from ara.config import DecomposeConfig, TrainMasksConfig
from ara.errors import AraError
from ara.layout_names import DEFAULT_LAYOUT, LAYOUT_NAMES
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.train_masks import train_masks
from ara_cli.console import Column, Console
from ara_cli.formatting import seconds_text

# One step of Adam changes little, so it makes more steps of fewer windows.
SMALL_STEPS = {"batch": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "cross-entropy": {"loss": "ce"},
    "batch 4": SMALL_STEPS,
    "rate 1 (no memory of earlier steps)": {"rate": 1.0},
    "trust 0.1": {"trust": 0.1},
    "no curvature": {"damping": 0.0},
    "start uniform": {"start": "uniform"},
    "adam": {"optimiser": "adam", **SMALL_STEPS},
    "adam, 16 atoms": {"optimiser": "adam", "atoms": 16, **SMALL_STEPS},
    "adam, temperature 0.3": {"optimiser": "adam", "temperature": 0.3, **SMALL_STEPS},
    "adam, no average": {"optimiser": "adam", "average": 0.0, **SMALL_STEPS},
    "paper": {"objective": "paper", **SMALL_STEPS},
    "paper, start uniform": {"objective": "paper", "start": "uniform", "learning_rate": 0.2, **SMALL_STEPS},
    "paper, start uniform, no guidance": {
        "objective": "paper",
        "start": "uniform",
        "learning_rate": 0.2,
        "guidance_weight": 0.0,
        **SMALL_STEPS,
    },
}
_BATCH = 16


def main() -> None:
    """Train all variants and print the gain of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="model to compress")
    parser.add_argument("--keep", type=float, default=0.8, help="budget")
    parser.add_argument("--layout", default=DEFAULT_LAYOUT, choices=LAYOUT_NAMES, help="of low-rank layers")
    parser.add_argument("--steps", type=int, default=12, help="training steps of 16 windows, or 4 times as many of 4")
    parser.add_argument("--samples", type=int, default=256, help="calibration windows of the factors")
    parser.add_argument(
        "--only", action="append", choices=VARIANTS, help="variant to train; may be repeated [default: all]"
    )
    parser.add_argument("--workspace", type=Path, default=Path("bench-quality"), help="where to work")
    arguments = parser.parse_args()
    console = Console()
    run = Run(arguments.workspace, "python benchmarks/ablation.py", console)
    decompose(DecomposeConfig(model=arguments.model, method="two-sided", samples=arguments.samples, text="c4"), run)
    only = arguments.only or list(VARIANTS)
    prefix = f"ablation-{arguments.layout}-{arguments.keep:g}-{arguments.steps}x{arguments.samples}"
    rows = []
    for number, (label, changes) in enumerate(VARIANTS.items()):
        if label not in only:
            continue
        console.step(label)
        batch = changes.get("batch", _BATCH)
        paced = {"steps": arguments.steps * _BATCH // batch, "check_every": 2 * _BATCH // batch}
        config = TrainMasksConfig(keep=(arguments.keep,), layout=arguments.layout, **paced, **changes)
        try:
            view = train_masks(config, run, factors="two-sided", name=f"{prefix}-{number:02d}")
        except AraError as error:
            rows.append((label, "", "", "", "", str(error)))
            continue
        found = TrainingResults.read(view).budgets[f"{arguments.keep:g}"]
        dense = sum(rank == "dense" for rank in found.ranks.values())
        at = f"{found.best_step} of {found.steps}"
        rows.append((label, f"{found.held_out:.4f}", f"{found.won:+.4f}", at, str(dense), seconds_text(found.seconds)))
    columns = [
        Column("variant", "left"),
        Column("held-out loss"),
        Column("won over its start"),
        Column("best step"),
        Column("dense layers"),
        Column("time"),
    ]
    console.table(f"keep {arguments.keep:g}, {arguments.layout}", columns, rows)


if __name__ == "__main__":
    main()
