"""The Typer application: one command per file in :mod:`ara_cli.commands`, in the order of the pipeline.

Commands are imported when they are called: ``ara --help`` reads only the table below.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from ara.errors import UsageError
from ara.pipeline import stages
from ara.version import __version__
from ara_cli.processes import silence_helpers
from ara_cli.streams import replace_closed

_SETTINGS = {"help_option_names": ["-h", "--help"]}

# Command → (module:function, one line for the help).
COMMANDS: dict[str, tuple[str, str]] = {
    "plan": ("plan:command", "What compressing a model will take: memory, disk, time of every stage"),
    "run": ("run:command", "All stages for one model, resuming what is done"),
    **{stage.name: (f"{stage.name.replace('-', '_')}:command", stage.help) for stage in stages()},
    "generate": ("generate:command", "Answer a prompt with the compressed model, in torch or ONNX Runtime"),
    "chat": ("chat:command", "Talk with the compressed model, in torch or ONNX Runtime"),
    "serve": ("serve:command", "Serve the compressed model over HTTP, with vLLM or transformers"),
    "status": ("status:command", "What the workspace holds, what is stale or missing, the next command"),
    "models": ("info:models", "Aliases of models"),
    "methods": ("info:methods", "Decompositions, allocators and recovery levels with their options"),
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

    def main(self, args: Sequence[str] | None = None, *more: Any, **named: Any) -> Any:
        """Run a command line; errors outside a command are reported like those inside one."""
        given = sys.argv[1:] if args is None else list(args)
        try:
            _check_arguments(given)
            return super().main(args, *more, **named)
        except BaseException as error:
            _end(error, given)
            raise

    def make_context(self, *args: Any, **named: Any) -> Any:
        """Read the arguments; this also writes the help."""
        with _exit_codes():
            return super().make_context(*args, **named)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _exit_codes():
            return super().invoke(ctx)

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


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Exit with a command's codes after Ctrl+C or when the reader of a pipe has ended; typer has other codes."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError) as error:
        from ara_cli.console import Console
        from ara_cli.session import report_error

        raise typer.Exit(report_error(error, Console()) or 1) from None


def _check_arguments(given: Sequence[str]) -> None:
    """Refuse arguments that are not UTF-8: names, paths and texts go into manifests, which are UTF-8.

    Raises:
        UsageError: names the argument.
    """
    for argument in given:
        if not argument.isascii():
            try:
                argument.encode("utf-8")
            except UnicodeEncodeError:
                raise UsageError(
                    f"the argument {argument!a} is not valid UTF-8",
                    "rename the file or folder, or write the text in UTF-8",
                ) from None


def _end(error: BaseException, given: Sequence[str]) -> None:
    """Report an error that was raised outside a command, and exit."""
    if isinstance(error, SystemExit):
        return
    # A usage error whose message could not be written to stderr keeps its exit code.
    if isinstance(error, OSError) and hasattr(error.__context__, "show"):
        sys.exit(2)
    from ara_cli.console import Console
    from ara_cli.session import report_error

    code = report_error(error, Console(as_json="--json" in given))
    if code is not None:
        sys.exit(code)


def main() -> None:
    """Entry point of the console scripts."""
    replace_closed()
    try:
        silence_helpers()
        app()
    except BaseException as error:
        _end(error, sys.argv[1:])
        raise
