"""Reads JSON that another program may have written (configs, indexes, manifests, journals, ranks), and writes JSON.

The reader describes every problem in one line. It refuses invalid JSON, irregular and too large files, deep nesting,
numbers with thousands of digits, and unpaired surrogates, which cannot be printed or stored. The writer refuses numbers
that the reader would refuse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ara.errors import AraError, ModelError, NumericalError
from ara.files import MAX_JSON_BYTES, read_text

# Levels of nesting. The deepest known file, the pipeline of a tokenizer, has 8.
MAX_DEPTH = 64

_Pairs = Callable[[list[tuple[str, Any]]], Any]


def parse(text: str, *, finite: bool = True, pairs: _Pairs | None = None) -> Any:
    """Return the content of a JSON text.

    Args:
        text: the document.
        finite: refuse NaN and infinity, which Python writes although JSON has no such numbers.
        pairs: makes an object from its (name, value) pairs; ``dict`` by default.

    Raises:
        ValueError: the text is refused.
    """
    try:
        found = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_constant=_no_constant if finite else None,
            parse_float=_finite_float if finite else None,
        )
    except RecursionError:
        raise ValueError(f"more than {MAX_DEPTH} levels inside each other") from None
    _check(found)
    return found


def read(path: Path, *, finite: bool = True, pairs: _Pairs | None = None, limit: int = MAX_JSON_BYTES) -> Any:
    """Return the content of a JSON file of at most ``limit`` bytes; other arguments as of :func:`parse`.

    Raises:
        OSError: it cannot be read, is no regular file, or too large.
        ValueError: it is not UTF-8 or not JSON.
    """
    return parse(read_text(path, limit), finite=finite, pairs=pairs)


def read_object(
    path: Path, hint: str | None, error: type[AraError] = ModelError, *, finite: bool = False
) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: of the file.
        hint: of the error.
        error: class of the error.
        finite: as of :func:`parse`; configs of models may hold infinities.

    Raises:
        AraError: of the class ``error``: no such file, not JSON, or not an object.
    """
    try:
        found = read(path, finite=finite)
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror})", hint) from None
    except ValueError as problem:
        raise error(f"{path} is not JSON ({problem})", hint) from None
    if not isinstance(found, dict):
        raise error(f"{path} holds a JSON {type(found).__name__}, expected an object", hint)
    return found


def dump(value: Any, what: str, *, indent: int | None = None) -> str:
    """Return plain data, which may hold pydantic models, as a JSON text.

    Args:
        value: the data.
        what: name of the data, for the error.
        indent: as of ``json.dumps``.

    Raises:
        NumericalError: a number is NaN or infinite; names its place.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False, default=lambda item: item.model_dump(mode="json"))
    except ValueError:
        place = _first_not_finite(value)
        if place is None:
            raise
    raise NumericalError(
        f"{what}: {place} is not a finite number, so it cannot be written as JSON",
        "try --dtype float32 or other settings",
    )


def first_problem(problem: ValidationError) -> str:
    """Return pydantic's first finding in one line: place and problem."""
    first = problem.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def _first_not_finite(value: Any, place: str = "") -> str | None:
    """Return the place of the first NaN or infinite number, such as ``a.b.0 (nan)``."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, float) and not math.isfinite(value):
        return f"{place or 'it'} ({value})"
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = (_first_not_finite(part, f"{place}.{name}" if place else str(name)) for name, part in parts)
    return next((one for one in found if one is not None), None)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def _check(found: Any) -> None:
    """Refuse deep nesting and invalid Unicode, without recursion."""
    level, depth = [found], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels inside each other")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str) and not item.isascii():
                item.encode("utf-8")
        level = below
