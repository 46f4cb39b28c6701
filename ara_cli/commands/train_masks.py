"""``ara train-masks``."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import TrainMasksConfig
from ara_cli.options import NameOption
from ara_cli.session import Session
from ara_cli.signature import command_line


@command_line(after={"batch": ("optimiser",), "check_every": ("save_every",), "dtype": ("tensorboard",)}, several=True)
def command(
    *,
    config: TrainMasksConfig,
    factors: Annotated[
        str | None, typer.Option(help="result of ara decompose to train on [default: the latest]")
    ] = None,
    name: NameOption = None,
    s: Session,
) -> None:
    """Learn what loss every rank of every layer costs. ara allocate --method ara then meets any budget."""
    from ara.stages.train_masks import train_masks
    from ara_cli.render import show_end, show_training

    view = train_masks(config, s.run(), factors=factors, name=name, keep_on_interrupt=True)
    show_training(s.console, view)
    show_end(s.console, view, s.root)
