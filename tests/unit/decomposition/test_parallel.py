"""Layers side by side: the order, the errors and the number of threads are those of one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from ara.decomposition import parallel
from ara.decomposition.parallel import map_layers
from ara.models.weights import LinearSpec

_THREADS = 4
_PLENTY = 1 << 50


def _layers(count: int) -> list[tuple[LinearSpec, int]]:
    return [(LinearSpec(f"layers.{i}.up_proj", i, "up_proj", 5, 3), 10 * i) for i in range(count)]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four threads and any amount of memory, whatever runs the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    monkeypatch.setattr(parallel, "available_bytes", lambda device: _PLENTY)
    yield
    torch.set_num_threads(before)


class Work:
    """Notes who was called and in which thread; sleeps so that calls overlap."""

    def __init__(self, seconds: float = 0.02, fails: int | None = None) -> None:
        self.seconds, self.fails = seconds, fails
        self.calls: list[int] = []
        self.threads: set[str] = set()
        self.limits: set[int] = set()
        self.most = self._running = 0
        self._lock = threading.Lock()

    def __call__(self, spec: LinearSpec, stats: int) -> tuple[str, int]:
        with self._lock:
            self.calls.append(spec.layer)
            self.threads.add(threading.current_thread().name)
            self.limits.add(torch.get_num_threads())
            self._running += 1
            self.most = max(self.most, self._running)
        time.sleep(self.seconds / (1 + spec.layer))  # later ones are done first
        with self._lock:
            self._running -= 1
        if spec.layer == self.fails:
            raise RuntimeError(f"layer {spec.layer}")
        return spec.name, stats


def test_results_come_in_order_from_several_threads() -> None:
    work = Work()
    assert list(map_layers(work, _layers(9), "cpu")) == [(spec.name, stats) for spec, stats in _layers(9)]
    assert 1 < work.most <= _THREADS
    assert all(name.startswith("ara-factor") for name in work.threads)


def test_no_layers_are_no_work() -> None:
    """One of several processes may have no layer of a block."""
    assert list(map_layers(lambda spec, stats: stats, [], "cpu")) == []


def test_an_exception_comes_at_its_turn() -> None:
    seen = []
    with pytest.raises(RuntimeError, match="layer 2"):
        for name, _ in map_layers(Work(fails=2), _layers(40), "cpu"):
            seen.append(name)
    assert seen == ["layers.0.up_proj", "layers.1.up_proj"]


def test_what_has_not_begun_is_left_out_after_an_exception() -> None:
    work = Work(seconds=0.2, fails=0)
    with pytest.raises(RuntimeError, match="layer 0"):
        list(map_layers(work, _layers(400), "cpu"))
    assert len(work.calls) < 400


def test_ctrl_c_while_work_is_handed_out_waits_for_the_running_only(monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = []
    submit = ThreadPoolExecutor.submit

    def interrupted(pool: ThreadPoolExecutor, *arguments: Any) -> Any:
        if len(submitted) == 30:
            raise KeyboardInterrupt
        submitted.append(arguments)
        return submit(pool, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    work = Work(seconds=0.5)
    with pytest.raises(KeyboardInterrupt):
        list(map_layers(work, _layers(40), "cpu"))
    assert len(work.calls) < 30
    assert torch.get_num_threads() == _THREADS


@pytest.mark.parametrize("fails", [None, 1])
def test_the_number_of_threads_is_restored(fails: int | None) -> None:
    work = Work(fails=fails)
    try:
        list(map_layers(work, _layers(2), "cpu"))
    except RuntimeError:
        assert fails is not None
    assert work.limits == {_THREADS // 2}  # two workers share the four
    assert torch.get_num_threads() == _THREADS


@pytest.mark.parametrize("case", ["one-thread", "one-layer", "little-memory", "gpu"])
def test_one_after_the_other_in_this_thread(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    if case == "one-thread":
        torch.set_num_threads(1)
    if case == "little-memory":
        monkeypatch.setattr(parallel, "available_bytes", lambda device: 1)
    layers, work = _layers(1 if case == "one-layer" else 5), Work()
    assert list(map_layers(work, layers, "meta" if case == "gpu" else "cpu")) == [
        (spec.name, stats) for spec, stats in layers
    ]
    assert work.threads == {threading.current_thread().name}


def test_memory_limits_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    # m = 5, n = 3 in float64: G and its factors, W and its own; twice that, as half of the memory may be used.
    one = 2 * 8 * (3 * 3 * 3 + 3 * 5 * 5 + 4 * 15)
    monkeypatch.setattr(parallel, "available_bytes", lambda device: 3 * one - 1)
    work = Work()
    list(map_layers(work, _layers(8), "cpu"))
    assert work.most == 2
