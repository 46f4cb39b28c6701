"""Device and dtype: what is chosen, and that the reason is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ara.errors import UsageError
from ara.models import placement
from ara.models.placement import Placement, choose_placement, torch_dtype


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Return a function that pretends to be another machine."""

    def pretend(gpus: int = 0, gpu_bf16: bool = True, features: tuple[str, ...] = (), onednn: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(placement, "_cuda_multiplies_bf16", lambda device: gpu_bf16)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
        capabilities = dict.fromkeys(features, True) | {"avx512_fp16": True, "amx_int8": False}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)

    return pretend


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        ({"features": ("avx512_bf16",)}, ("cpu", "bfloat16", "no CUDA device; the processor multiplies bf16 natively")),
        ({"features": ("amx_bf16",)}, ("cpu", "bfloat16", "no CUDA device; the processor multiplies bf16 natively")),
        ({"features": ("bf16", "sve")}, ("cpu", "bfloat16", "no CUDA device; the processor multiplies bf16 natively")),
        ({"features": ("avx512_f",)}, ("cpu", "float32", "no CUDA device; the processor has no bf16 arithmetic")),
        (
            {"features": ("bf16",), "onednn": False},
            ("cpu", "float32", "no CUDA device; the processor has no bf16 arithmetic"),
        ),
        ({"gpus": 1}, ("cuda", "bfloat16", "a CUDA device is there; the GPU multiplies bf16 natively")),
        ({"gpus": 1, "gpu_bf16": False}, ("cuda", "float16", "a CUDA device is there; the GPU has no bf16 arithmetic")),
    ],
)
def test_auto(machine, hardware: dict, expected: tuple[str, str, str]) -> None:
    machine(**hardware)
    device, dtype, reason = expected
    assert choose_placement() == Placement(device, dtype, f"{device}, {dtype}: {reason}")


def test_older_torch_is_asked_feature_by_feature(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert choose_placement().dtype == "bfloat16"
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert choose_placement().dtype == "float32"


def test_what_is_asked_for_is_taken(machine) -> None:
    machine(gpus=2, features=("avx512_bf16",))
    assert choose_placement("cpu", "float32") == Placement(
        "cpu", "float32", "cpu, float32: cpu as asked; float32 as asked"
    )
    assert choose_placement("cuda:1").device == "cuda:1"
    assert choose_placement("cuda", "float16").dtype == "float16"


@pytest.mark.parametrize(
    ("gpus", "device", "words"),
    [
        (0, "cuda", "device cuda was asked for, but"),
        (0, "cuda:0", "device cuda:0 was asked for, but"),
        (2, "cuda:2", "there are 2 CUDA devices: cuda:0 to cuda:1"),
        (0, "gpu", "unknown device 'gpu': .*known are auto, cpu, cuda, cuda:N, mps"),
        (0, "cuda:x", "unknown device"),
        (0, "cuda:-1", "unknown device"),
        (0, "", "unknown device"),
    ],
)
def test_devices_that_cannot_be(machine, gpus: int, device: str, words: str) -> None:
    machine(gpus=gpus)
    with pytest.raises(UsageError, match=words) as caught:
        choose_placement(device)
    assert caught.value.exit_code == 2


def test_mps_only_when_there(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match="mps"):
        choose_placement("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_placement("mps").device == "mps"
    assert choose_placement("auto").device == "cpu"


@pytest.mark.parametrize("name", ["bf16", "int8", "double", ""])
def test_unknown_dtypes_list_the_known(machine, name: str) -> None:
    machine()
    with pytest.raises(UsageError, match="known are auto, float32, bfloat16, float16"):
        choose_placement("cpu", name)
    with pytest.raises(UsageError, match="known are float32, bfloat16, float16"):
        torch_dtype(name)


def test_torch_dtype() -> None:
    assert torch_dtype("bfloat16") is torch.bfloat16
    assert torch_dtype("float32") is torch.float32
    with pytest.raises(UsageError):
        torch_dtype("auto")


def test_bf16_is_chosen_where_the_kernel_says_that_the_processor_has_it() -> None:
    told = Path("/proc/cpuinfo")
    if not told.exists() or not torch.backends.mkldnn.is_available():
        pytest.skip("needs Linux and oneDNN")
    has_bf16 = not {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}.isdisjoint(told.read_text().split())
    chosen = choose_placement("cpu")
    assert chosen.dtype == ("bfloat16" if has_bf16 else "float32")
    product = torch.full((3, 5), 2, dtype=torch_dtype(chosen.dtype)) @ torch.ones(5, 7, dtype=torch_dtype(chosen.dtype))
    assert product.tolist() == [[10.0] * 7] * 3
