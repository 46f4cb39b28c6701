"""``ara train-masks``."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import TrainMasksConfig, build
from ara_cli.options import (
    WORKSPACE,
    ForceOption,
    JsonOption,
    NameOption,
    QuietOption,
    WorkspaceOption,
    default,
    field,
)
from ara_cli.session import session

_C = TrainMasksConfig


def command(
    keep: Annotated[list[float] | None, field(_C, "keep", metavar="FLOAT")] = None,
    objective: Annotated[str, field(_C, "objective", metavar="priced|paper")] = default(_C, "objective"),
    loss: Annotated[str, field(_C, "loss", metavar="kl|ce")] = default(_C, "loss"),
    start: Annotated[str, field(_C, "start", metavar="sensitivity|uniform")] = default(_C, "start"),
    steps: Annotated[int, field(_C, "steps")] = default(_C, "steps"),
    batch: Annotated[int, field(_C, "batch")] = default(_C, "batch"),
    optimiser: Annotated[str, field(_C, "optimiser", metavar="newton|adam")] = default(_C, "optimiser"),
    rate: Annotated[float, field(_C, "rate")] = default(_C, "rate"),
    trust: Annotated[float, field(_C, "trust")] = default(_C, "trust"),
    damping: Annotated[float, field(_C, "damping")] = default(_C, "damping"),
    learning_rate: Annotated[float, field(_C, "learning_rate")] = default(_C, "learning_rate"),
    temperature: Annotated[float, field(_C, "temperature")] = default(_C, "temperature"),
    atoms: Annotated[int, field(_C, "atoms")] = default(_C, "atoms"),
    average: Annotated[float, field(_C, "average")] = default(_C, "average"),
    budget_weight: Annotated[float, field(_C, "budget_weight")] = default(_C, "budget_weight"),
    guidance_weight: Annotated[float, field(_C, "guidance_weight")] = default(_C, "guidance_weight"),
    check_every: Annotated[int, field(_C, "check_every")] = default(_C, "check_every"),
    save_every: Annotated[int, field(_C, "save_every")] = default(_C, "save_every"),
    layout: Annotated[str, field(_C, "layout", metavar="factors|pivoted")] = default(_C, "layout"),
    rank_multiple: Annotated[int, field(_C, "rank_multiple")] = default(_C, "rank_multiple"),
    min_rank: Annotated[int, field(_C, "min_rank")] = default(_C, "min_rank"),
    min_keep: Annotated[float, field(_C, "min_keep")] = default(_C, "min_keep"),
    exclude: Annotated[list[str] | None, field(_C, "exclude", metavar="PATTERN")] = None,
    samples: Annotated[int, field(_C, "samples")] = default(_C, "samples"),
    held_out: Annotated[int, field(_C, "held_out")] = default(_C, "held_out"),
    batch_size: Annotated[int, field(_C, "batch_size")] = default(_C, "batch_size"),
    seed: Annotated[int, field(_C, "seed")] = default(_C, "seed"),
    device: Annotated[str, field(_C, "device")] = default(_C, "device"),
    dtype: Annotated[str, field(_C, "dtype")] = default(_C, "dtype"),
    tensorboard: Annotated[bool, field(_C, "tensorboard", "--tensorboard")] = False,
    factors: Annotated[str | None, typer.Option(help="decomposition to train on [default: the latest]")] = None,
    name: NameOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    force: ForceOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Learn what every rank of every layer is worth; ara allocate --method ara meets any budget with it."""
    with session(workspace, quiet, as_json, force) as s:
        config = build(
            TrainMasksConfig,
            keep=tuple(keep) if keep else default(_C, "keep"),
            objective=objective,
            loss=loss,
            start=start,
            steps=steps,
            batch=batch,
            optimiser=optimiser,
            rate=rate,
            trust=trust,
            damping=damping,
            learning_rate=learning_rate,
            temperature=temperature,
            atoms=atoms,
            average=average,
            budget_weight=budget_weight,
            guidance_weight=guidance_weight,
            check_every=check_every,
            save_every=save_every,
            layout=layout,
            rank_multiple=rank_multiple,
            min_rank=min_rank,
            min_keep=min_keep,
            exclude=tuple(exclude or ()),
            samples=samples,
            held_out=held_out,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            tensorboard=tensorboard,
        )
        from ara.stages.train_masks import train_masks
        from ara_cli.render import show_end, show_training

        view = train_masks(config, s.run(), factors=factors, name=name, keep_on_interrupt=True)
        show_training(s.console, view)
        show_end(s.console, view, workspace)
