"""What is shown of a result's figures, whoever wrote them: what does not fit a table is told in one line."""

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
    """Turn a figure that is missing, or of another type, into an error that names the result.

    Raises:
        CorruptedError: see there.
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
    """Decorate a function that shows one result; see :func:`shown`."""

    @wraps(show)
    def guarded(console: Console, view: StageView, /, *rest: _Rest.args, **named: _Rest.kwargs) -> None:
        with shown(view):
            show(console, view, *rest, **named)

    return guarded
