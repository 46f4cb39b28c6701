"""The Typer application: one command per file in :mod:`ara_cli.commands`, in the order of the pipeline."""

from __future__ import annotations

from collections.abc import Callable

import typer

from ara.pipeline import STAGES
from ara.version import __version__
from ara_cli.commands import allocate, decompose, evaluate, export, info, run, status, train_masks, truncate

app = typer.Typer(
    name="ara",
    help="Shrink large language models by low-rank factorisation, and run them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_STAGE_COMMANDS: dict[str, Callable[..., None]] = {
    "decompose": decompose.command,
    "train-masks": train_masks.command,
    "allocate": allocate.command,
    "truncate": truncate.command,
    "eval": evaluate.command,
    "export": export.command,
}

app.command("run", help="All stages for one model, resuming what is done.")(run.command)
for _stage in STAGES:
    app.command(_stage.name, help=f"{_stage.title}: {_stage.reads} → {_stage.writes}.")(_STAGE_COMMANDS[_stage.name])
app.command("status", help="What the workspace holds, what is stale or missing, and the next command.")(status.command)
app.command("models", help="Names for models.")(info.models)
app.command("methods", help="Decompositions and allocators with their options.")(info.methods)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"ara {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="show the version"),
) -> None:
    pass


def main() -> None:
    """Entry point of the console scripts."""
    app()
