"""How a config field appears on the command line, where that differs from the rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """Metadata of a field: ``field: Annotated[str, Flag(short="-m")]``.

    The rule: the field ``seq_len`` becomes the option ``--seq-len`` of its type, and its description becomes the help.
    A field with choices shows them in place of the type. A switch is ``--chat/--no-chat`` if it is on by default, else
    ``--densify`` alone. A tuple is an option that may be repeated.

    Attributes:
        name: name of the option or argument, if it is not the field's.
        short: one-letter form of the option.
        metavar: placeholder of the value in the help.
        choices: whether the help shows the choices.
        argument: the field is a positional argument.
        commas: the tuple is one text with commas; this word names one item in messages.
        example: a valid text with commas.
        may_be_empty: an empty text is a value.
        user_path: ``~`` is expanded.
        removable: the fraction can also be given as its complement, with ``--remove``.
        hidden: the field has no option.
    """

    name: str | None = None
    short: str | None = None
    metavar: str | None = None
    choices: bool = True
    argument: bool = False
    commas: str | None = None
    example: str = ""
    may_be_empty: bool = False
    user_path: bool = False
    removable: bool = False
    hidden: bool = False


def flag_of(metadata: Iterable[Any]) -> Flag:
    """Return the :class:`Flag` among the metadata of a field, or the default one."""
    return next((item for item in metadata if isinstance(item, Flag)), Flag())
