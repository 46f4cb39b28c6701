"""Single layers are timed in turn, and are those of a checkpoint; nothing of how fast they are."""

from __future__ import annotations

import time

import pytest
import torch

from ara.evaluation.layer_times import LayerRuntime, TorchLayers, layer_seconds, random_tensors
from ara.layout_names import LAYOUT_NAMES, LayoutName
from ara.layouts import layout_named
from ara.models.weights import LinearSpec
from tests.layer_times import FakeLayers
from tests.recorder import Recorder

SPEC = LinearSpec("b.0", 0, "l", 30, 22)


def test_the_time_of_a_layer_is_the_median_over_the_rounds_after_the_first() -> None:
    passes: dict[int | None, list[float]] = {None: [100, 3, 1, 9], 4: [100, 5, 5, 5], 7: [0, 2, 8, 4]}
    layers = FakeLayers(lambda spec, rank: passes[rank].pop(0))
    report = Recorder()
    asked = [(SPEC, None), (SPEC, 7), (SPEC, 4)]
    assert layer_seconds(layers, asked, 19, 3, report) == [3, 4, 5]
    assert layers.asked == [(30, 22, None, 19), (30, 22, 7, 19), (30, 22, 4, 19)]
    assert not any(passes.values()) and report.bars == ["Preparing layers", "Timing layers"]


def test_torch_has_the_threads_of_the_runtime_only_while_layers_are_timed() -> None:
    before, seen = torch.get_num_threads(), set()
    wanted = 3 if before != 3 else 2
    layers = FakeLayers(lambda spec, rank: seen.add(torch.get_num_threads()) or 1.0)
    object.__setattr__(layers.runtime, "threads", wanted)
    layer_seconds(layers, [(SPEC, None)], 5, 1)
    assert seen == {wanted} and torch.get_num_threads() == before


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("rank", [None, 5])
def test_layers_in_torch_multiply_by_their_random_weights(layout: LayoutName, rank: int | None) -> None:
    spec = LinearSpec("b.0", 0, "l", 30, 22, layout)
    layers = TorchLayers("cpu", "float32", 1)
    tensors = random_tensors(spec, rank)
    weight = tensors["weight"] if rank is None else layout_named(layout).multiply(tensors, spec.m, torch.float32)
    y = layers.prepare(spec, rank, 22).run()
    assert isinstance(y, torch.Tensor) and y.shape == (1, 22, 30) and y.dtype == torch.float32
    x = torch.linalg.lstsq(weight, y[0].T).solution.T  # 30 outputs determine the 22 inputs, unless the rank is less
    torch.testing.assert_close(x @ weight.T, y[0], atol=1e-3, rtol=1e-3)
    half = TorchLayers("cpu", "bfloat16", 1).prepare(spec, rank, 3).run()
    assert isinstance(half, torch.Tensor) and half.dtype == torch.bfloat16
    assert layers.runtime == LayerRuntime("torch", "cpu", "float32", 1, f"torch {torch.__version__}")


def test_processor_time_counts_where_one_thread_does_all_the_work() -> None:
    assert LayerRuntime("torch", "cpu", "float32", 1, "x").clock is time.thread_time
    assert LayerRuntime("torch", "cpu", "float32", 2, "x").clock is time.perf_counter
    assert LayerRuntime("torch", "cuda:1", "float32", 1, "x").clock is time.perf_counter
