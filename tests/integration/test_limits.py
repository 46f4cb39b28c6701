"""Limits of the machine on files, for real: each is one line, and nothing half-written stays."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ara, refused
from tests.damage import contents, listing


@contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def stages(root: Path, text: str) -> dict[str, tuple[object, ...]]:
    here = ("-w", root, "-q", "--name", "x")
    cpu = ("--device", "cpu", "--dtype", "float32")
    return {
        "decompose": (
            "decompose", _model(root), "--text", text, "--samples", 8, "--seq-len", 40, "--method", "plain", *cpu, *here
        ),
        "truncate": ("truncate", *here),
        "eval": ("eval", "--tasks", text, "--seq-len", 64, "--max-windows", 1, *cpu, *here),
        "report": ("report", *here),
    }  # fmt: skip


def _model(root: Path) -> str:
    from ara.workspace.store import Workspace

    return str((Workspace.open(root).model or {})["location"])


@pytest.mark.parametrize("stage", ["decompose", "truncate", "eval", "report"])
def test_a_limit_on_the_size_of_files(copied: Path, tiny_text: str, stage: str) -> None:
    command, before = stages(copied, tiny_text)[stage], contents(copied)
    with limited(resource.RLIMIT_FSIZE, {"eval": 100, "report": 5_000}.get(stage, 20_000)):
        refused(ara(*command), 1, "a file exceeds the size limit", "ulimit -f")
    assert contents(copied) == before
    assert not list((copied / stage).glob(".x.*"))


def test_a_limit_on_the_size_of_exported_files(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """numpy writes the weights, and says neither errno nor reason."""
    command = ("export", "--source", checkpoint("llama").folder, "--output", tmp_path / "out", "--no-parity", "-q")
    with limited(resource.RLIMIT_FSIZE, 20_000):
        refused(ara(*command), 1, "a file exceeds the size limit", "ulimit -f")
    assert listing(tmp_path) == set() and not os.listdir(tmp_path)


@contextmanager
def free_files(count: int) -> Iterator[None]:
    """Let this process open ``count`` more files at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    with limited(resource.RLIMIT_NOFILE, min(soft, 200)):
        try:
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        for descriptor in taken[:count]:
            os.close(descriptor)
        try:
            yield
        finally:
            for descriptor in taken[count:]:
                os.close(descriptor)


@pytest.mark.parametrize("stage", ["decompose", "truncate", "eval", "report"])
def test_a_limit_on_open_files(copied: Path, tiny_text: str, stage: str) -> None:
    command, before = stages(copied, tiny_text)[stage], contents(copied)
    for count in range(1, 12):
        with free_files(count):
            result = ara(*command)
        if result.exit_code == 0:
            break
        refused(result, 1, "oo many open files", "ulimit -n")
        assert contents(copied) == before
        assert not list((copied / stage).glob(".x.*"))
    assert 1 < count < 11
