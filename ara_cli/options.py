"""Options shared by the commands; their words come from the configs in :mod:`ara.config`."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ara.bounds import shown
from ara.config import StageConfig
from ara.errors import UsageError
from ara.files import expand_user
from ara.workspace.store import DEFAULT_ROOT


def field(config: type[StageConfig], name: str, *flags: str, metavar: str | None = None) -> Any:
    """Return a Typer option for one field of a config, with the field's own description as help.

    Args:
        config: the config class.
        name: of the field.
        flags: option names; ``--field-name`` by default.
        metavar: what stands for the value in the help.
    """
    help_text = config.model_fields[name].description
    return typer.Option(*(flags or (f"--{name.replace('_', '-')}",)), help=help_text, metavar=metavar)


def default(config: type[StageConfig], name: str) -> Any:
    """Return the default of one field of a config."""
    return config.model_fields[name].get_default(call_default_factory=True)


def joined(values: tuple[int, ...]) -> str:
    """Return numbers as an option takes them: ``1,4``."""
    return ",".join(str(value) for value in values)


def path_option(*flags: str, help: str, metavar: str, envvar: str | None = None) -> Any:
    """Return a Typer option for a path, in which ``~`` is written out; one that cannot be a path is a usage error."""
    return typer.Option(*flags, help=help, metavar=metavar, envvar=envvar, parser=_path)


def _path(text: str | Path) -> Path:
    if not str(text):
        raise typer.BadParameter("it is empty, expected a path")
    try:
        path = expand_user(text, "path")
        path.resolve()
        path.exists()
    except UsageError as error:
        raise typer.BadParameter(f"{error}; {error.hint}") from None
    except RuntimeError:  # of pathlib
        raise typer.BadParameter(f"{str(text)!r} is a link that leads back to itself") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise typer.BadParameter(f"{shown(text)}: {error.strerror}") from None
    return path


WorkspaceOption = Annotated[
    Path,
    path_option(
        "--workspace",
        "-w",
        envvar="ARA_WORKSPACE",
        help="folder that holds all results of one model",
        metavar="PATH",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="say nothing but results, warnings and errors")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
ForceOption = Annotated[bool, typer.Option("--force", help="do it again even if the same result is there")]
NameOption = Annotated[str | None, typer.Option("--name", help="name of the result [default: says method and keep]")]

WORKSPACE = Path(DEFAULT_ROOT)
# Options for which nothing is an answer, as their help says.
_MAY_BE_EMPTY = ("prefill", "decode")


def refusing_empty(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command``, with every text that is given but empty refused: none of them means anything.

    A script with an unset variable would otherwise get what it did not ask for: ``--name "$NAME"`` the default name.
    """

    @functools.wraps(command)
    def call(**given: Any) -> None:
        for name, value in given.items():
            if name not in _MAY_BE_EMPTY and (value == "" or (isinstance(value, list | tuple) and "" in value)):
                raise typer.BadParameter("it is empty", param_hint=f"--{name.replace('_', '-')}")
        command(**given)

    return call


def pairs(values: list[str] | None) -> dict[str, str]:
    """Read ``NAME=VALUE`` options.

    Raises:
        UsageError: one has no ``=`` or no name.
    """
    result = {}
    for value in values or []:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise UsageError(f"got -O {value!r}, expected NAME=VALUE", "for example -O alpha=0.5")
        result[name] = text
    return result


def keep_of(keep: float | None, remove: float | None, fallback: float | None) -> float | None:
    """Return the fraction to keep from ``--keep`` or ``--remove``.

    Raises:
        UsageError: both are given, or one is outside its range.
    """
    if keep is not None and remove is not None:
        raise UsageError(
            f"--keep {keep:g} and --remove {remove:g} are both given", "give one: --keep 0.8 is --remove 0.2"
        )
    if remove is not None:
        if not 0 <= remove < 1:
            raise UsageError(
                f"--remove must be in [0, 1), got {remove:g}", "--remove 0.2 leaves 80 % of the parameters"
            )
        return round(1 - remove, 12)
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"--keep must be in (0, 1], got {keep:g}", "--keep 0.8 leaves 80 % of the parameters")
    return keep if keep is not None else fallback


def task_names(tasks: str, flag: str = "--tasks", what: str = "task", example: str = "wikitext2") -> tuple[str, ...]:
    """Split ``a,b`` into names, each once, in their order; the path of a ``file:`` may hold commas.

    Raises:
        UsageError: there is none.
    """
    from ara.data.filespecs import split_names

    names = tuple(split_names(tasks))
    if not names:
        raise UsageError(f"{flag} {tasks!r} names no {what}", f"for example {flag} {example}")
    return names


def whole_numbers(text: str, flag: str) -> tuple[int, ...]:
    """Split ``1,4`` into numbers, each once, in their order; an empty text gives none.

    Raises:
        UsageError: a part is no whole number.
    """
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise UsageError(f"{flag} {text!r}: expected whole numbers", f"several with commas: {flag} 1,4") from None
