"""The Typer application: one command per file in :mod:`ara_cli.commands`, in the order of the pipeline.

Commands are imported when they are called: ``ara --help`` reads only the table below.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from ara.pipeline import STAGES
from ara.version import __version__

_SETTINGS = {"help_option_names": ["-h", "--help"]}

# Command → (module:function, one line for the help).
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run:command", "All stages for one model, resuming what is done"),
    **{
        stage.name: (f"{stage.name.replace('-', '_')}:command", f"{stage.title}: {stage.reads} → {stage.writes}")
        for stage in STAGES
    },
    "compare": ("compare:command", "All allocators side by side: loss, perplexity, cost, a picture of their ranks"),
    "bench": ("bench:command", "Speed, memory and size of the dense and the compressed model, in turn in one run"),
    "report": ("report:command", "One page about a checkpoint: sizes, quality, speed, ranks; and a model card"),
    "generate": ("generate:command", "Answer a prompt with the compressed model, in torch or ONNX Runtime"),
    "status": ("status:command", "What the workspace holds, what is stale or missing, the next command"),
    "models": ("info:models", "Names for models"),
    "methods": ("info:methods", "Decompositions and allocators with their options"),
}


class _LazyGroup(TyperGroup):
    """Imports the module of a command when the command is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name][0].partition(":")
        single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        body = getattr(importlib.import_module(f"ara_cli.commands.{module}"), function)
        single.command(cmd_name, context_settings=_SETTINGS)(body)
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, title) for name, (_, title) in COMMANDS.items()])


app = typer.Typer(
    name="ara",
    cls=_LazyGroup,
    help="Shrink large language models by low-rank factorisation, and run them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=_SETTINGS,
)


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
    """Entry point of the console scripts; what fails before a command has begun is told like what fails in one."""
    try:
        app()
    except Exception as error:
        from ara_cli.console import Console
        from ara_cli.session import our_bug

        told = our_bug(error)
        if told is None:
            raise
        Console().error(told)
        sys.exit(told.exit_code)
