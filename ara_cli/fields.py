"""Turns the fields of a config into options of a command, and the values of the options into fields."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from ara.config import Settings, StageConfig
from ara.config.flags import flag_of
from ara.files import expand_user
from ara_cli.options import RemoveOption
from ara_cli.values import keep_of, names, pairs, whole_numbers
from export.targets import TARGETS, backends, measuring_backends

# Fields whose choices are registered in a package that the config may not import; those of one config come first.
_REGISTERED: dict[str, Callable[[], list[str]]] = {
    "EvalConfig.backend": measuring_backends,
    "BenchConfig.backend": measuring_backends,
    "backend": backends,
    "latency_backend": backends,
    "target": TARGETS.names,
}


class FieldOption:
    """The option that sets one field of a config; :class:`ara.config.flags.Flag` has the rules.

    Attributes:
        field: name of the field.
        flag: what differs from ``--field-name``.
        name: of the option's parameter.
        long: the option as it is typed.
    """

    def __init__(self, config: type[StageConfig], field: str, name: str | None = None) -> None:
        """Take a field; ``name`` is the option's name if it differs."""
        self.field = field
        self._registered = _REGISTERED.get(f"{config.__name__}.{field}", _REGISTERED.get(field))
        self._info = config.model_fields[field]
        self.flag = flag_of(self._info.metadata)
        if name is not None:
            self.flag = replace(self.flag, name=name, short=None)
        self.name = self.flag.name or field
        self.long = long_flag(self.name)
        # The item type is X for X | None, tuple[X, ...] and dict[str, X].
        self._type = _without_none(self._info.annotation)
        self._collection = get_origin(self._type) if get_origin(self._type) in (tuple, dict) else None
        self._item = _without_annotation(get_args(self._type)[0]) if self._collection else self._type
        self._chosen = get_origin(self._type) is Literal
        self._repeated = self._collection is not None and self.flag.commas is None

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yield the option as a parameter for Typer, and ``--remove`` after the option that it complements."""
        kind = int if _are_whole(self._type) else self._item
        if kind not in (int, float, bool) or self.flag.commas:
            kind = str
        yield parameter_of(self.name, list[kind] if self._repeated else kind, self._about(), self._default())  # type: ignore[valid-type]
        if self.flag.removable:
            remove, about = get_args(RemoveOption)
            yield parameter_of("remove", remove, about, None)

    def value(self, given: Mapping[str, Any]) -> Any:
        """Return the value of the field from the values of all options; ``None`` means the default.

        Raises:
            UsageError: the value cannot be parsed.
        """
        value = given[self.name]
        if self.flag.removable:
            return keep_of(value, given["remove"])
        if value is None or value == []:
            return None
        if self._collection is dict:
            return pairs(value)
        if self.flag.commas is not None:
            if self._item is int or _are_whole(self._item):
                return whole_numbers(value, self.long)
            return names(value, self.long, self.flag.commas, self.flag.example)
        return str(expand_user(value, self.long)) if self.flag.user_path else value

    def _about(self) -> Any:
        """Return the option's flags, help text and metavar."""
        text = self._info.description
        if self.flag.argument:
            return typer.Argument(help=text, metavar=self.flag.metavar)
        if self._item is bool:
            return typer.Option(f"{self.long}/--no-{self.long[2:]}" if self._info.default else self.long, help=text)
        flags = (self.long, self.flag.short) if self.flag.short else (self.long,)
        return typer.Option(*flags, help=text, metavar=self.flag.metavar or "|".join(self._choices()) or None)

    def _choices(self) -> list[str]:
        if self._registered is not None:
            return self._registered()
        return [str(one) for one in get_args(self._type)] if self._chosen and self.flag.choices else []

    def _default(self) -> Any:
        """Return the default for the help; ``None``: the help shows none."""
        if self._info.is_required():
            return inspect.Parameter.empty
        if self._repeated or self.flag.removable:
            return None
        default = self._info.default
        return ",".join(map(str, default)) or None if self._collection is tuple else default


class Only:
    """Names the fields of a config for which a command has options.

    Args:
        fields: fields whose options have their usual names.
        renamed: option → field, for options with another name.
    """

    def __init__(self, *fields: str, **renamed: str) -> None:
        self.options = {**{field: None for field in fields}, **{field: option for option, field in renamed.items()}}


def field_options(config: type[StageConfig], only: Only | None = None) -> list[FieldOption]:
    """Return the options of a config in the order of the help: its own fields, then those of its bases."""
    if only is not None:
        return [FieldOption(config, field, name) for field, name in only.options.items()]
    return [option for option in (FieldOption(config, field) for field in _ordered(config)) if not option.flag.hidden]


def parameter_of(name: str, kind: Any, about: Any, default: Any) -> inspect.Parameter:
    """Return a function parameter that Typer turns into an option."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, about])


def long_flag(name: str) -> str:
    """Return ``--seq-len`` for ``seq_len``."""
    return f"--{name.replace('_', '-')}"


def _ordered(config: type[Settings]) -> Iterator[str]:
    """Yield the fields of a class, then those of its bases, the last base first."""
    bases = [base for base in reversed(config.__bases__) if issubclass(base, Settings)]
    yield from (field for field in config.model_fields if not any(field in base.model_fields for base in bases))
    for base in bases:
        yield from _ordered(base)


def _are_whole(annotation: Any) -> bool:
    """Tell whether a type is a choice of whole numbers."""
    return get_origin(annotation) is Literal and all(type(choice) is int for choice in get_args(annotation))


def _without_none(annotation: Any) -> Any:
    """Return ``X`` for ``X | None``."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not types.NoneType)
    return annotation


def _without_annotation(annotation: Any) -> Any:
    """Return ``X`` for ``Annotated[X, ...]``."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
