"""Checkpoints that are read for export: whole ones, and broken ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ara.errors import ModelError, NumericalError
from export.onnx.quantize import BLOCK, quantize, scales_of
from export.onnx.stored_weights import Checkpoint

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def copy(checkpoint: Callable[..., Any], tmp_path: Path) -> Callable[[str | None], Path]:
    """Return a function that copies a checkpoint, to be broken."""
    return lambda layout: Path(shutil.copytree(checkpoint("llama", layout).folder, tmp_path / "copy"))


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= values
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("layout", [None, "factors", "pivoted"])
def test_layers_are_described_as_they_are_stored(layout: str | None, checkpoint: Callable[..., Any]) -> None:
    made = checkpoint("llama", layout)
    found = Checkpoint(made.folder)
    layer = found.linear(UP, 92, 102)
    module = made.model.get_submodule(UP)
    assert found.compressed is (layout is not None)
    assert layer.rank == getattr(module, "rank", None)
    assert layer.layout == layout
    assert layer.bias is None
    stored = load_file(made.folder / "model.safetensors")
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
@pytest.mark.parametrize("part", ["A", "B", "C"])
def test_factors_of_another_shape_are_named(layout: str, part: str, copy: Callable[..., Path]) -> None:
    folder = copy(layout)
    tensors = load_file(folder / "model.safetensors")
    name = f"{UP}.{part}.weight"
    if name not in tensors:
        pytest.skip("the other layout has it")
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"up_proj\.{part}\.weight in .* has shape .*, expected"):
        Checkpoint(folder).linear(UP, 92, 102)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"no (tensor )?{UP}\.{part}\.weight"):
        Checkpoint(folder).linear(UP, 92, 102)


def test_shards(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy("factors")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    found = Checkpoint(folder)
    assert all(torch.equal(found.tensor(name), tensors[name]) for name in names)

    (folder / "model-00002-of-00002.safetensors").rename(tmp_path / "aside")
    with pytest.raises(ModelError, match=r"lacks 1 of 2 weight files: model-00002-of-00002\.safetensors"):
        Checkpoint(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes((tmp_path / "aside").read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is damaged"):
        Checkpoint(folder)
    index.write_text(json.dumps({"weight_map": {names[0]: "../elsewhere.safetensors"}}))
    with pytest.raises(ModelError, match=r"names the file '\.\./elsewhere\.safetensors', which is not in its folder"):
        Checkpoint(folder)
    index.write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        Checkpoint(folder)


def test_what_is_no_checkpoint(copy: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a checkpoint folder"):
        Checkpoint(tmp_path / "none")
    folder = copy("factors")
    (folder / "model.safetensors").rename(folder / "aside")
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        Checkpoint(folder)
    (folder / "aside").rename(folder / "model.safetensors")
    change(folder, format_version=99)
    with pytest.raises(ModelError, match="ARA format 99"):
        Checkpoint(folder)
    ranks = json.loads((folder / "config.json").read_text())["quantization_config"]["ranks"]
    change(folder, format_version=2, ranks={**ranks, "model.layers.9.mlp.up_proj": 3})
    with pytest.raises(
        ModelError, match=r"gives model\.layers\.9\.mlp\.up_proj a rank .*up_proj\.A\.weight is stored$"
    ):
        Checkpoint(folder)
    for wrong in ([3], "all", {UP: "3"}, {UP: -1}, {UP: 1.0}):
        change(folder, ranks=wrong)
        with pytest.raises(ModelError, match=r"quantization_config\.ranks"):
            Checkpoint(folder)
    change(folder, quant_method="gptq")
    with pytest.raises(ModelError, match="quantised by 'gptq'; only dense and ARA"):
        Checkpoint(folder)


@pytest.mark.parametrize(("m", "n"), [(7, 64), (5, 33), (3, 1), (1, 32)])
def test_blocks_are_off_by_at_most_half_a_step(m: int, n: int) -> None:
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    blocks, scales = quantize(weight), scales_of(weight)
    assert blocks.shape == (m, -(-n // BLOCK), BLOCK) and blocks.dtype.name == "uint8"
    step = scales.view(m, -1, 1)
    back = (torch.from_numpy(blocks).float() - 128) * step
    assert (
        (back.view(m, -1)[:, :n] - weight).abs() <= 0.5001 * step.expand_as(back).reshape(m, -1)[:, :n] + 1e-9
    ).all()
    assert (back.view(m, -1)[:, n:] == 0).all() and (back[0] == 0).all()


def test_scales_in_half_precision_are_rounded_before_the_weights_are() -> None:
    weight = 0.01 * torch.randn(9, 70, generator=torch.Generator().manual_seed(0))
    scales = scales_of(weight, torch.float16)
    assert torch.equal(scales, scales.half().float()) and not torch.equal(scales, scales_of(weight))
    back = (torch.from_numpy(quantize(weight, torch.float16)).float() - 128) * scales.view(9, -1, 1)
    assert (back.flatten(1)[:, :70] - weight).abs().max() <= 0.51 * scales.max()
    with pytest.raises(NumericalError, match="beyond float16"):
        scales_of(weight * 1e-7, torch.float16)
