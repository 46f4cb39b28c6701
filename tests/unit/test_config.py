"""Every number that can be set has bounds, every text can be stored; a new field without them fails here."""

import math
import types
import typing
from typing import Annotated, Any

import pytest

from ara.allocation import ALLOCATORS
from ara.config import (
    DecomposeConfig,
    EvalConfig,
    MethodOptions,
    Settings,
    StageConfig,
    TruncateConfig,
    build,
    method_options,
)
from ara.decomposition import DECOMPOSITIONS
from ara.errors import ProblemsError
from export.config import ExportConfig

ODD = [math.nan, math.inf, -math.inf, 1e308, -1e308, 10**30, -(10**30), 10**5000, -1, 1e-320]
ODD += ["", "x", "nan", "inf", "-inf", "1e400", "9" * 400, "9" * 5000, "\0", "\udcff", None, [], {}]


def every_config():
    for registry in (ALLOCATORS, DECOMPOSITIONS):
        for entry in registry:
            entry.load()
    assert ExportConfig in StageConfig.__subclasses__()
    found, waiting = [], [Settings]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        found.append(kind)
    return [kind for kind in dict.fromkeys(found) if kind.__module__.startswith(("ara.", "export."))]


def numbers(annotation: Any, metadata: tuple[Any, ...] = ()) -> list[tuple[type, tuple[Any, ...]]]:
    """Return the numeric types inside an annotation, each with what is said of it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return numbers(arguments[0], tuple(arguments[1].metadata))
    if origin in (typing.Union, types.UnionType):
        return [found for argument in arguments for found in numbers(argument, metadata)]
    if origin in (tuple, list, dict):
        return [found for argument in arguments for found in numbers(argument)]
    return [(annotation, metadata)] if annotation in (int, float) else []


CONFIGS = every_config()
FIELDS = [(kind, name) for kind in CONFIGS for name in kind.model_fields]
NUMERIC = [(kind, name) for kind, name in FIELDS if numbers(kind.model_fields[name].annotation)]


def ids(cases):
    return [f"{kind.__name__}.{name}" for kind, name in cases]


def with_others(kind: type[Settings], name: str, value: Any) -> dict[str, Any]:
    needed = {"model": "m"} if issubclass(kind, DecomposeConfig) else {}
    return {**needed, name: value}


def flat(value: Any) -> list[Any]:
    return [item for part in value for item in flat(part)] if isinstance(value, tuple) else [value]


def test_the_walk_finds_what_there_is():
    names = {kind.__name__ for kind in CONFIGS}
    assert {"TrainMasksConfig", "BenchConfig", "ExportConfig", "GumbelOptions", "ProbeOptions"} <= names
    assert len(NUMERIC) > 60
    assert (TruncateConfig, "dtype") not in NUMERIC


@pytest.mark.parametrize(("kind", "name"), NUMERIC, ids=ids(NUMERIC))
def test_every_number_has_both_bounds_and_odd_values_are_refused(kind, name):
    field = kind.model_fields[name]
    for number, said in numbers(field.annotation, tuple(field.metadata)):
        limits = {attribute: getattr(item, attribute) for item in said for attribute in vars_of(item)}
        lower, upper = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
        assert lower is not None and upper is not None, f"{kind.__name__}.{name}: {number.__name__} without bounds"
        assert -(2**31) <= lower < upper <= largest(name)
        assert number is float or lower >= 0
    for value in ODD:
        for given in (value, (value,)):
            try:
                made = build(kind, **with_others(kind, name, given))
            except ProblemsError as error:
                assert len(str(error)) < 400  # what was got is cut
                continue
            for item in flat(getattr(made, name)):
                assert item is None or abs(item) <= largest(name), (kind, name, value)


def largest(name: str) -> int:
    """Return the largest upper bound that a field may have; bytes are counted one by one."""
    return 2**50 if name.endswith("_bytes") else 2**31


def vars_of(item: Any) -> list[str]:
    return [attribute for attribute in ("ge", "gt", "le", "lt") if getattr(item, attribute, None) is not None]


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=ids(FIELDS))
def test_text_that_no_manifest_can_hold_is_refused(kind, name):
    for text in ("a\0b", "a\udcffb"):
        for given in (text, (text,), {"a": text}, {text: "a"}):
            with pytest.raises(ProblemsError):
                build(kind, **with_others(kind, name, given))


@pytest.mark.parametrize(
    "size", ["0GB", "0.0GB", "9" * 400 + "GB", "1e3GB", "-1GB", "nanGB", "1GB\n", "٣GB", "0.001KB"]
)
def test_shards_have_some_bytes(size):
    with pytest.raises(ProblemsError, match="max-shard-size"):
        build(TruncateConfig, max_shard_size=size)


def test_sizes_of_shards_that_are_used():
    for size in ("1KB", "200KB", "0.5GB", "5GB", "1000TB"):
        assert build(TruncateConfig, max_shard_size=size).max_shard_size == size


def test_options_of_a_method_may_be_called_anything():
    for name in ("config", "self", "options_type", "\udcff", "a\nb", "model_fields"):
        with pytest.raises(ProblemsError) as caught:
            method_options(MethodOptions, {name: "1"})
        assert len(caught.value.problems) == 1
        assert all(char.isprintable() for char in caught.value.problems[0])


def test_bounds_do_not_stand_in_the_way():
    assert build(DecomposeConfig, model="m", samples=10**5, seq_len=2**20, moment_memory=1e-6).seq_len == 2**20
    assert build(EvalConfig, max_windows=10**6, limit=10**6, seq_len=131072).limit == 10**6
