"""Builds a config from values; what pydantic finds is put into our words."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from ara import bounds
from ara.errors import ProblemsError


def build(config: type[Any], /, **values: Any) -> Any:
    """Build ``config`` from ``values``; all problems are reported at once.

    Raises:
        ProblemsError: a value is out of range or has the wrong type, or a name is unknown.
    """
    try:
        return config(**values)
    except ValidationError as error:
        raise problems(config.__name__, error) from None


def problems(title: str, error: ValidationError) -> ProblemsError:
    """Put pydantic's findings into our words: field, what is wrong, what was got."""
    lines = []
    found = error.errors(include_url=False, include_context=False)
    refused_items = {item["loc"][0] for item in found if len(item["loc"]) > 1}
    for item in found:
        if item["type"] == "too_short" and item["loc"][0] in refused_items:
            continue  # nothing is left of it because its items were refused, which is said already
        name = ".".join(bounds.shown(str(part), quoted=False) for part in item["loc"]) or title
        said = item["msg"].removeprefix("Value error, ")
        lines.append(f"{name.replace('_', '-')}: {said[0].lower()}{said[1:]}, got {bounds.shown(item['input'])}")
    return ProblemsError("these settings cannot be used", lines)


def method_options(options_type: type[Any], values: dict[str, str]) -> Any:
    """Build a method's own options from ``NAME=VALUE`` strings.

    Raises:
        ProblemsError: unknown name, or a value out of range.
    """
    return build(options_type, **values)
