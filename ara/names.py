"""Checks names of results, both for writing a result and for looking one up."""

from __future__ import annotations

from ara.errors import UsageError
from ara.pipeline import stage_named

# File systems allow 255 bytes; ``.NAME.partial`` and the like need some of them.
MAX_NAME_BYTES = 200
_RESERVED_ENDS = (".partial", ".copy", ".old")
_FORBIDDEN = frozenset("/\\:")


def check_name(name: str) -> str:
    """Return ``name`` if it is a valid name of a result.

    Raises:
        UsageError: it is empty, too long, no plain folder name, or holds white space or unprintable characters.
    """
    problem = name_problem(name)
    if problem is not None:
        raise UsageError(
            f"{name[:MAX_NAME_BYTES]!r} cannot be the name of a result: {problem}",
            "results have plain folder names, such as --name ara-0.80 (`ara status` lists all results)",
        )
    return name


def check_which(which: str) -> str:
    """Return ``which`` if it is a valid NAME or STAGE/NAME; else raise ``UsageError``."""
    stage, slash, name = which.partition("/")
    check_name(name if slash and stage_named(stage) is not None else which)
    return which


def name_problem(name: str) -> str | None:
    """Return what is wrong with ``name`` as the name of a result, or ``None``."""
    if not name:
        return "it is empty"
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "it is not valid UTF-8"
    if length > MAX_NAME_BYTES:
        return f"it has {length} bytes, at most {MAX_NAME_BYTES} are allowed"
    if name.startswith((".", "-")):
        return f"it starts with {name[0]!r}"
    if name.endswith(_RESERVED_ENDS):
        return f"it ends with {name[name.rindex('.') :]!r}, which ARA reserves"
    bad = next((char for char in name if char in _FORBIDDEN or char.isspace() or not char.isprintable()), None)
    return None if bad is None else f"it holds {bad!r}"
