"""Makes the options of a command from the parameters of its function.

A command is a function of keyword-only parameters, one of them ``s: Session``. :func:`command_line` reads their types:

- a config (``config: EvalConfig``): every field is an option, and the function gets the config, built and checked;
- ``Maker[EvalConfig]``: the same options, but the function builds the config itself;
- a frozen dataclass of options (``which: WhichCheckpoint``): the function gets an instance;
- ``Session``: the options of every command, last in the help; the function runs within the session;
- any other type is an option, as in Typer.

An option that several configs share appears once, with the help text of the first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Protocol, TypeVar, get_args, get_origin, get_type_hints

import typer

from ara.config import StageConfig, build
from ara_cli.fields import FieldOption, Only, field_options, long_flag, parameter_of
from ara_cli.options import SessionOptions
from ara_cli.session import Session, session

C = TypeVar("C", bound=StageConfig, covariant=True)
# Values of all options: parameter → value.
Given = Mapping[str, Any]


class Maker(Protocol[C]):
    """Builds a config from the options."""

    def __call__(self, **more: Any) -> C:
        """Return the config; ``more`` are fields without an option, and ``None`` means the default."""


@dataclass(frozen=True)
class _Part:
    """One parameter of a command's function.

    Attributes:
        parameters: its options, as parameters for Typer.
        value: returns the argument of the function from the values of all options.
        may_be_empty: options for which an empty text is allowed.
    """

    parameters: tuple[inspect.Parameter, ...]
    value: Callable[[Given], Any]
    may_be_empty: frozenset[str] = frozenset()


def command_line(
    after: Mapping[str, tuple[str, ...]] | None = None, without: Collection[str] = (), several: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command's function its options.

    Args:
        after: option → options that follow it in the help; the others are in the order of the parameters.
        without: options of :class:`ara_cli.options.SessionOptions` that the command does not have.
        several: whether torchrun may run the command in several processes.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        """Return ``function`` with the signature that Typer reads, run within a session."""
        hints = get_type_hints(function, include_extras=True)
        parts = {
            name: _part(parameter.replace(annotation=hints[name]))
            for name, parameter in inspect.signature(function).parameters.items()
            if hints[name] is not Session
        }
        of_session = _group(SessionOptions, without=without)
        parameters = _in_order([*parts.values(), of_session], after or {})
        may_be_empty = {name for part in parts.values() for name in part.may_be_empty}

        @functools.wraps(function)
        def call(**given: Any) -> None:
            _refuse_empty(given, [parameter for parameter in parameters if parameter.name not in may_be_empty])
            options = of_session.value(given)
            circumstances = options.workspace, options.quiet, options.as_json, options.force, options.offload
            with session(*circumstances, several) as s:
                function(s=s, **{name: part.value(given) for name, part in parts.items()})

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate


def _part(parameter: inspect.Parameter) -> _Part:
    """Return the part for a parameter, by its type."""
    hint = parameter.annotation
    kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if get_origin(kind) is Maker:
        return _makers(get_args(kind)[0], *extras)
    if inspect.isclass(kind) and issubclass(kind, StageConfig):
        makers = _makers(kind, *extras)
        return replace(makers, value=lambda given: makers.value(given)())
    if is_dataclass(kind):
        return _group(kind, *extras)
    return _Part((parameter,), lambda given: given[parameter.name])


def _makers(config: type[StageConfig], only: Only | None = None) -> _Part:
    """Return the options of a config; the value is a function that builds it."""
    options = field_options(config, only)
    parameters = tuple(parameter for option in options for parameter in option.parameters())
    may_be_empty = frozenset(option.name for option in options if option.flag.may_be_empty)
    return _Part(parameters, lambda given: functools.partial(_make, config, options, given), may_be_empty)


def _make(config: type[StageConfig], options: Iterable[FieldOption], given: Given, /, **more: Any) -> Any:
    """Build a config from the values of options and ``more`` fields; ``None`` means the default.

    Raises:
        UsageError: the value of an option cannot be parsed.
        ProblemsError: a value is out of range or has the wrong type.
    """
    values = {**{option.field: option.value(given) for option in options}, **more}
    return build(config, **{field: value for field, value in values.items() if value is not None})


def _group(kind: Any, use: str = "", without: Collection[str] = ()) -> _Part:
    """Return the options of a frozen dataclass; ``use`` fills the placeholder in their help texts."""
    hints = get_type_hints(kind, include_extras=True)
    parameters = []
    for field in fields(kind):
        if field.name not in without:
            plain, about = get_args(hints[field.name])
            about = copy(about)
            about.help = " ".join(about.help.format(use=use).split())
            parameters.append(parameter_of(field.name, plain, about, field.default))
    names = [parameter.name for parameter in parameters]
    return _Part(tuple(parameters), lambda given: kind(**{name: given[name] for name in names}))


def _in_order(parts: Iterable[_Part], after: Mapping[str, tuple[str, ...]]) -> list[inspect.Parameter]:
    """Return the parameters of all parts in the order of the help; of equal names only the first."""
    found: dict[str, inspect.Parameter] = {}
    for part in parts:
        for parameter in part.parameters:
            found.setdefault(parameter.name, parameter)
    moved = {name for group in after.values() for name in group}
    names = [name for name in found if name not in moved]
    for anchor, group in after.items():
        place = names.index(anchor) + 1
        names[place:place] = group
    return [found[name] for name in names]


def _refuse_empty(given: Given, parameters: Iterable[inspect.Parameter]) -> None:
    """Refuse empty values: with an unset variable, ``--name "$NAME"`` would otherwise silently mean the default.

    Raises:
        BadParameter: names the option.
    """
    for parameter in parameters:
        value = given[parameter.name]
        if value == "" or (isinstance(value, list | tuple) and "" in value):
            raise typer.BadParameter("it is empty", param_hint=_as_typed(parameter))


def _as_typed(parameter: inspect.Parameter) -> str:
    """Return ``--from`` for a parameter with that flag, else ``--seq-len`` for ``seq_len``."""
    _, about, *_ = get_args(parameter.annotation)
    # Typer keeps the first flag of an annotation where the default of a bare option would be.
    flags = [flag for flag in (about.default, *(about.param_decls or ())) if isinstance(flag, str)]
    return next((flag for flag in flags if flag.startswith("--")), long_flag(parameter.name))
