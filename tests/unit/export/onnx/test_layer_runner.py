"""Single layers in ONNX Runtime compute what the checkpoint's layer does, with the nodes of an export."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ara.errors import UsageError
from ara.evaluation.layer_times import random_tensors
from ara.layout_names import LAYOUT_NAMES, LayoutName
from ara.layouts import layout_named
from ara.models.weights import LinearSpec
from export.onnx.export_report import Precision
from export.onnx.layer_runner import OnnxLayers, layer_session
from export.targets import load_target


@pytest.mark.parametrize(("precision", "share"), [("fp32", 1e-5), ("int8", 0.02)])
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("rank", [None, 21])
def test_a_layer_multiplies_by_its_random_weight(
    precision: Precision, share: float, layout: LayoutName, rank: int | None
) -> None:
    # 48 outputs are three blocks of pivots in fp32.
    spec = LinearSpec("b.0", 0, "l", 48, 34, layout)
    tensors = random_tensors(spec, rank)
    weight = tensors["weight"] if rank is None else layout_named(layout).multiply(tensors, spec.m, torch.float32)
    x = np.random.default_rng(2).standard_normal((1, 7, 34), np.float32)
    (y,) = layer_session(spec, rank, precision, 1).run(None, {"x": x})
    expected = x @ weight.numpy().T
    assert np.linalg.norm(y - expected) <= share * np.linalg.norm(expected)
    # Rounding shows that the precision is the one asked for.
    assert (np.abs(y - expected).max() > 1e-3 * np.abs(expected).max()) == (precision == "int8")


def test_a_layer_is_bound_and_can_run_again_and_again() -> None:
    layers = OnnxLayers("int8", 1)
    prepared = layers.prepare(LinearSpec("b.0", 0, "l", 48, 34), 5, 3)
    assert prepared.run() is None and prepared.run() is None
    runtime = layers.runtime
    assert (runtime.backend, runtime.device, runtime.precision, runtime.threads) == ("onnx", "cpu", "int8", 1)


def test_a_precision_that_is_not_timed_is_refused() -> None:
    assert load_target("onnx").for_latency(None, 1).runtime.precision == "fp32"
    with pytest.raises(UsageError, match="cannot be timed in fp16"):
        load_target("onnx").for_latency("fp16", 1)
