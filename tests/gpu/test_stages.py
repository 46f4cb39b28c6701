"""The stages on the device give what they give on the CPU, and so do the passes that they are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ara.calibration.gradients import collect_gradients
from ara.calibration.moments import collect_moments
from ara.config import DecomposeConfig
from ara.decomposition import DECOMPOSITIONS
from ara.models.blocks import BlockRunner, independent_starts
from ara.models.weights import find_linears
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.modules import load_modules
from benchmarks.gpu_check.outcome import Notes
from benchmarks.gpu_check.setting import Setting
from benchmarks.gpu_check.stages import Tolerance, compare, compress
from tests.tiny import tiny_model

# A float32 sum over a few thousand tokens, in another order.
_SUMS = 1e-4


def test_the_whole_chain(setting: Setting) -> None:
    """Decompose, train-masks, allocate, truncate, recover (closed and distill), eval."""
    notes = Notes()
    expected = compress(setting, "cpu", "reference")
    compare(compress(setting, setting.device, "device"), expected, Tolerance(), notes)
    assert notes.misses == []
    assert {"perplexity of dense", "divergence after closed", "trained ranks"} <= notes.numbers.keys()


@pytest.mark.parametrize("method", DECOMPOSITIONS.names())
def test_spectra_of_every_method(method: str, setting: Setting) -> None:
    def spectra(device: str) -> dict[str, torch.Tensor]:
        run = Run(setting.workspace / f"{method}-on-{device}")
        placed: dict[str, Any] = {"device": device, "dtype": "float32", "method": method}
        read = {"text": setting.text, "samples": 8, "seq_len": 48}
        view = decompose(DecomposeConfig(model=setting.model, **read, **placed), run)
        return {module.spec.name: module.spectrum for module in load_modules(view)}

    expected, found = spectra("cpu"), spectra(setting.device)
    for name, spectrum in expected.items():
        assert float((found[name] - spectrum).abs().max() / spectrum.max()) < Tolerance().spectrum


def test_moments_and_gradients_block_by_block(device: str) -> None:
    """In three parts that start from kept outputs, against one pass through the whole model on the CPU."""
    windows = torch.randint(4, 250, (6, 24), generator=torch.Generator().manual_seed(0))

    def statistics(device: str, parts: list[list[int]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        model = tiny_model("llama").to(device).requires_grad_(False)
        linears = find_linears(model)
        starts = independent_starts(model, windows[:1], [part[0] for part in parts[1:]])
        assert list(starts) == [part[0] for part in parts[1:]]
        found = {}
        forward, backward = (BlockRunner(model, windows, 2, starts) for _ in range(2))
        for part in parts:
            some = [spec for spec in linears if spec.layer in part]
            inputs = collect_moments(forward, some, {spec.name: spec.name for spec in some})
            outputs = collect_gradients(backward, some)
            for spec in some:
                found[spec.name] = inputs[spec.name].second_moment.cpu(), outputs[spec.name].second_moment.cpu()
        return found

    expected = statistics("cpu", [[0, 1, 2]])
    for name, moments in statistics(device, [[0], [1], [2]]).items():
        for ours, theirs in zip(moments, expected[name], strict=True):
            assert float((ours - theirs).abs().max() / theirs.abs().max()) < _SUMS
