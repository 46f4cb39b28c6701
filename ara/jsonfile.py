"""The one reader of JSON that somebody else may have written: configs, indexes, manifests, journals, ranks.

Whatever such a file holds, one line says what is wrong with it. It refuses what is not JSON, what is not a regular file
or is too large, nesting that no reader of ours survives, numbers with thousands of digits, and half a surrogate pair,
which nothing could print or store. The writer beside it writes no number that a reader would refuse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ara.errors import AraError, ModelError, NumericalError
from ara.files import MAX_JSON_BYTES, read_text

# Objects and lists inside each other. The deepest file that we know, a tokenizer's pipeline, has 8.
MAX_DEPTH = 64

_Schema = TypeVar("_Schema", bound=BaseModel)
_Pairs = Callable[[list[tuple[str, Any]]], Any]


def parse(text: str, *, finite: bool = True, pairs: _Pairs | None = None) -> Any:
    """Return what a JSON text holds.

    Args:
        text: the document.
        finite: refuse NaN and infinity, which Python's writer produces and JSON does not know.
        pairs: makes an object from its names and values in their order; ``dict`` by default.

    Raises:
        ValueError: for whatever is wrong with it.
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
    """Return what a JSON file holds; arguments as of :func:`parse`, and the most bytes that it may have.

    Raises:
        OSError: it cannot be read, is no regular file, or too large.
        ValueError: it is not UTF-8 or not JSON.
    """
    return parse(read_text(path, limit), finite=finite, pairs=pairs)


def read_object(
    path: Path,
    hint: str | None,
    error: type[AraError] = ModelError,
    *,
    finite: bool = False,
    pairs: _Pairs | None = None,
) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: of the file.
        hint: what to do when it cannot be read.
        error: class of what is raised.
        finite: as of :func:`parse`; configs of models do hold infinities.
        pairs: as of :func:`parse`.

    Raises:
        AraError: of the class ``error``: no such file, not JSON, or not an object.
    """
    try:
        found = read(path, finite=finite, pairs=pairs)
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror})", hint) from None
    except ValueError as problem:
        raise error(f"{path} is not JSON ({problem})", hint) from None
    if not isinstance(found, dict):
        raise error(f"{path} holds a JSON {type(found).__name__}, expected an object", hint)
    return found


def read_typed(
    path: Path, schema: type[_Schema], hint: str | None, error: type[AraError] = ModelError, *, finite: bool = True
) -> _Schema:
    """Return the JSON object in a file as ``schema`` describes it.

    Args:
        path: of the file.
        schema: a pydantic model; whether unknown names are refused is its own matter.
        hint: what to do when it cannot be read.
        error: class of what is raised.
        finite: as of :func:`parse`.

    Raises:
        AraError: of the class ``error``: as :func:`read_object`, or a field is missing or has the wrong type.
    """
    return validated(read_object(path, hint, error, finite=finite), path, schema, hint, error)


def validated(
    found: Any, path: Path, schema: type[_Schema], hint: str | None, error: type[AraError] = ModelError
) -> _Schema:
    """Return what was read from ``path`` as ``schema`` describes it; arguments as of :func:`read_typed`.

    Raises:
        AraError: of the class ``error``: a field is missing or has the wrong type; names the first.
    """
    try:
        return schema.model_validate(found)
    except ValidationError as problem:
        raise error(f"{path}: {first_problem(problem)}", hint) from None


def dump(value: Any, what: str, *, indent: int | None = None) -> str:
    """Return plain data, pydantic models inside allowed, as a JSON text that every reader takes.

    Args:
        value: what is to be written.
        what: it is, for the error.
        indent: as of ``json.dumps``.

    Raises:
        NumericalError: a number is NaN or infinite; names its place.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False, default=_dumped)
    except ValueError:
        place = _first_not_finite(value)
        if place is None:
            raise
    raise NumericalError(
        f"{what}: {place} is not a finite number, and JSON knows no others",
        "a result with it could not be read again, so nothing was written; --dtype float32 or other settings may help",
    )


def first_problem(problem: ValidationError) -> str:
    """Return the first of pydantic's findings in one line: place, what is wrong."""
    first = problem.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def _dumped(item: Any) -> Any:
    return item.model_dump(mode="json")


def _first_not_finite(value: Any, place: str = "") -> str | None:
    """Return where the first number stands that is NaN or infinite, as ``a.b.0 (nan)``."""
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
    """Refuse what is nested too deeply, and strings that are no Unicode; level by level, not by recursion."""
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
