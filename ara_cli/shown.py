"""Turns errors while showing a result into one line: its manifest may have been written by another program."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec

from ara.errors import CorruptedError, first_line
from ara.workspace.manifest import remake
from ara.workspace.view import StageView
from ara_cli.console import Console

_Rest = ParamSpec("_Rest")


@contextmanager
def shown(view: StageView) -> Iterator[None]:
    """Turn the errors over missing or wrong figures into one that names the result.

    Raises:
        CorruptedError: instead of these errors.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        assert view.manifest is not None
        raise CorruptedError(
            f"{view.key} cannot be shown: it was written in another form ({type(error).__name__}: {first_line(error)})",
            remake(view.manifest, True),
        ) from error


def shows_results(
    show: Callable[Concatenate[Console, StageView, _Rest], None],
) -> Callable[Concatenate[Console, StageView, _Rest], None]:
    """Decorate a function that shows one result with :func:`shown`."""

    @wraps(show)
    def guarded(console: Console, view: StageView, /, *rest: _Rest.args, **named: _Rest.kwargs) -> None:
        with shown(view):
            show(console, view, *rest, **named)

    return guarded
