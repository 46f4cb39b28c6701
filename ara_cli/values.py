"""Parses the values of options: paths, pairs, lists with commas, the fraction to keep."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import typer

from ara.bounds import shown
from ara.errors import UsageError
from ara.files import expand_user


def existing_or_new_path(text: str | Path) -> Path:
    """Return a path with ``~`` expanded.

    Raises:
        BadParameter: not a possible path.
    """
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


def pairs(values: Sequence[str]) -> dict[str, str]:
    """Read ``NAME=VALUE`` options.

    Raises:
        UsageError: one has no ``=`` or no name.
    """
    result = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise UsageError(f"got -O {value!r}, expected NAME=VALUE", "for example -O alpha=0.5")
        result[name] = text
    return result


def keep_of(keep: float | None, remove: float | None) -> float | None:
    """Return the fraction to keep from ``--keep`` or ``--remove``; ``None`` if neither is given.

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
    return keep


def names(text: str, flag: str, what: str, example: str) -> tuple[str, ...]:
    """Split ``a,b`` into names in their order, without repetitions; the path of ``file:PATH`` may contain commas.

    Raises:
        UsageError: there are none.
    """
    from ara.data.filespecs import split_names

    found = tuple(split_names(text))
    if not found:
        raise UsageError(f"{flag} {text!r} names no {what}", f"for example {flag} {example}")
    return found


def whole_numbers(text: str, flag: str) -> tuple[int, ...]:
    """Split ``1,4`` into numbers in their order, without repetitions; an empty text gives none.

    Raises:
        UsageError: a part is not a whole number.
    """
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise UsageError(f"{flag} {text!r}: expected whole numbers", f"several with commas: {flag} 1,4") from None
