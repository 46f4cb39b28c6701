"""vLLM with ARA's plugin: the likelihoods of a text, equal to those in torch."""

from __future__ import annotations

import gc

import torch

from ara.errors import UnavailableError
from ara.layout_names import LAYOUT_NAMES
from ara.models.checkpoint import load, load_tokenizer
from ara.models.likelihood import nll_of_model
from ara.models.placement import choose_placement
from benchmarks.gpu_check.graphs import checkpoint_of
from benchmarks.gpu_check.outcome import Notes, NotRun
from benchmarks.gpu_check.setting import Setting
from export.onnx.proof import text_windows
from export.vllm.runtime import VllmRuntime

# Nats per token by which a window's loss in vLLM may differ from that in torch in float32.
_TOLERANCE = 2e-2


def vllm(setting: Setting, notes: Notes) -> None:
    """Read windows of text in vLLM and in torch, in every layout.

    Raises:
        NotRun: vLLM is not installed, or its build is for another device.
    """
    runtime = VllmRuntime()
    try:
        device = runtime.device()
    except UnavailableError as error:
        raise NotRun(f"{error}: docs/gpu.md says how to name an environment that has it") from None
    if device != setting.device:
        raise NotRun(f"this vLLM runs on {device}, and not on {setting.device}")
    dtype = choose_placement(setting.device).dtype
    for form in LAYOUT_NAMES:
        folder = checkpoint_of(setting, form)
        windows = text_windows(load_tokenizer(folder), "evaluation", setting.sizes.windows, setting.sizes.seq_len)
        expected = _losses_in_torch(folder, windows, setting.device)
        with runtime.open(folder, dtype) as model:
            found = torch.tensor(model.window_nlls(windows), dtype=torch.float64)
        notes.keep(f"losses of {form}", {"vllm": found.tolist(), "torch": expected.tolist()})
        notes.within(f"loss of a window, {form}", float((found - expected).abs().max()), _TOLERANCE)


def _losses_in_torch(folder: object, windows: torch.Tensor, device: str) -> torch.Tensor:
    """Return the mean loss of every window in float32, and give the memory of the GPU back."""
    found = nll_of_model(load(str(folder), device, "float32"), windows, 1)
    gc.collect()
    torch.cuda.empty_cache()
    return found
