"""Values that nobody means, for every option of every command."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from ara_cli.app import app

# What a slip, an unset variable or a careless script hands over.
ODD_TEXTS = ("", "\n", "\x1b", "nan", "-1", "9" * 400, "../x", "~nouser/x")
ODD_NUMBERS = ("", "x", "nan", "inf", "-1", "1e400", "1e-300", "9" * 400, "9" * 5000)
# How Python keeps the byte 0xff.
NOT_UTF8 = "\udcff"


def commands() -> dict[str, Any]:
    """Return every command of ``ara`` by its name."""
    group: Any = typer.main.get_command(app)
    return {name: group.get_command(None, name) for name in group.list_commands(None)}


def odd_lines(command: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield what is odd, and the words to append to a valid command line; an argument stands for itself."""
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            yield from ((f"{parameter.name}={value[:20]!r}", ["--", value]) for value in (*ODD_TEXTS, NOT_UTF8))
        elif not (parameter.is_flag or parameter.name == "help"):
            flag = parameter.opts[0]
            values = ODD_NUMBERS if _takes_numbers(parameter) else ODD_TEXTS
            yield from ((f"{flag}={value[:20]!r}", [flag, value]) for value in values)
            if parameter.name == "option":
                yield from ((f"-O steps={value[:20]!r}", ["-O", f"steps={value}"]) for value in ODD_NUMBERS)
                yield from ((f"-O {value[:20]!r}=1", ["-O", f"{value}=1"]) for value in ODD_TEXTS)
    yield "--name=NOT_UTF8", ["--name", NOT_UTF8]


def _takes_numbers(parameter: Any) -> bool:
    """Tell what an option takes; where typer does not say, it is a text."""
    return getattr(getattr(parameter, "type_descriptor", None), "annotation", None) in (int, float)
