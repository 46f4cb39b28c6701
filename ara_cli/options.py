"""Options shared by the commands; their words come from the configs in :mod:`ara.config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ara.config import StageConfig
from ara.errors import UsageError
from ara.workspace import DEFAULT_ROOT


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


def _folder(given: object) -> Path:
    """Read the folder of a workspace: an empty text would be the current folder, which nobody has named."""
    text = str(given)
    if not text:
        raise typer.BadParameter(f"got an empty text, expected a folder ({DEFAULT_ROOT} when -w is left out)")
    return Path(text)


WorkspaceOption = Annotated[
    Path,
    typer.Option(
        "--workspace",
        "-w",
        envvar="ARA_WORKSPACE",
        help="folder that holds all results of one model",
        parser=_folder,
        metavar="PATH",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="say nothing but results, warnings and errors")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
ForceOption = Annotated[bool, typer.Option("--force", help="do it again even if the same result is there")]
NameOption = Annotated[str | None, typer.Option("--name", help="name of the result [default: says method and keep]")]

WORKSPACE = Path(DEFAULT_ROOT)


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
    """Split ``a,b`` into names, each once, in their order.

    Raises:
        UsageError: there is none.
    """
    names = tuple(dict.fromkeys(part.strip() for part in tasks.split(",") if part.strip()))
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
