"""Exported graphs run on the device, in fp16, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.gpu_check.graphs import FORMS, binding, graph_of, parity, prompt
from benchmarks.gpu_check.outcome import Notes
from benchmarks.gpu_check.setting import Setting
from export.onnx.runner import PROVIDERS, OnnxDecoder


def test_every_form_equals_torch(setting: Setting) -> None:
    notes = Notes()
    parity(setting, notes)
    assert notes.misses == []
    assert {case["case"] for form in FORMS for case in notes.numbers[form]} == {"prefill", "decode", "chunks", "padded"}


def test_caches_stay_on_the_device(setting: Setting) -> None:
    notes = Notes()
    binding(setting, notes)
    assert notes.misses == []
    assert notes.numbers["devices of the caches"] == [setting.device]


@pytest.mark.parametrize("form", FORMS)
def test_generation(form: str, setting: Setting) -> None:
    decoder = OnnxDecoder(graph_of(setting, form))
    assert decoder.session.get_providers()[0] == PROVIDERS[setting.device]
    read = prompt(setting, form)
    tokens = list(decoder.generate(read, 8, stop=set()))
    # One pass over all of them gives the same tokens, each nearly the most likely one.
    rows = decoder.forward(np.array([[*read, *tokens]]))[0][0, len(read) - 1 : -1]
    assert len(tokens) == 8
    assert float((rows.max(-1) - rows[np.arange(8), tokens]).max()) < 3e-2 * max(1.0, float(np.abs(rows).max()))
