"""A model must hold what its files hold: nothing random, nothing dropped, no codes in the place of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ara.errors import ModelError, NumericalError, UnsupportedModelError
from ara.models.sources import resolve
from tests.tiny import save_tiny

UP = "model.layers.0.mlp.up_proj.weight"

Tensors = dict[str, torch.Tensor]
Edit = Callable[..., Path]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Tensors]:
    folder = save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama", seed=2)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.fixture
def edited(parts: tuple[dict[str, Any], Tensors], tmp_path: Path) -> Edit:
    """Return a function that writes the tiny llama with other tensors or another config."""

    def write(tensors: Callable[[Tensors], Tensors] = lambda found: {}, **config: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**parts[0], **config}))
        changed = tensors(parts[1])
        whole = changed.pop("only", None) is not None
        stored = changed if whole else {**parts[1], **changed}
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return write


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return resolve(str(folder)).load_model(dtype)


def renamed(tensors: Tensors) -> Tensors:
    """The names of a model that is part of a larger one."""
    found = {f"model.language_model.{name.removeprefix('model.')}": tensor for name, tensor in tensors.items()}
    return {**found, "only": torch.empty(0)}


def codes(tensors: Tensors) -> Tensors:
    """A layer as bitsandbytes stores it."""
    scale = tensors[UP].abs().amax(1)
    return {UP: (tensors[UP] / scale[:, None] * 127).round().to(torch.int8), UP.replace("weight", "SCB"): scale}


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (
            lambda found: {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(84) for i in range(3)},
            {},
            r"holds 3 tensors \(model\.layers\.0\.self_attn\.q_proj\.bias, .*\) without a place in the model",
        ),
        (lambda found: {}, {"num_hidden_layers": 2}, r"holds 9 tensors \(model\.layers\.2\..*, …\) without a place"),
        (
            lambda found: {
                **{name: tensor for name, tensor in found.items() if name != "model.layers.2.mlp.up_proj.weight"},
                "only": torch.empty(0),
            },
            {},
            r"lacks 1 of the model's tensors: model\.layers\.2\.mlp\.up_proj\.weight",
        ),
        (
            lambda found: {},
            {"vocab_size": 261},
            r"lm_head\.weight of shape \[260, 60\], its config asks for \[261, 60\]",
        ),
        (
            renamed,
            {},
            r"lacks 30 of the model's tensors \(lm_head\.weight, .*and holds 30 tensors \(model\.language_model\.embed",
        ),
        (lambda found: {"v_head.weight": torch.ones(1, 60)}, {}, r"holds 1 tensor \(v_head\.weight\) without a place"),
    ],
    ids=["biases", "layers", "fewer", "shape", "prefix", "head"],
)
def test_tensors_without_a_place_and_places_without_a_tensor(
    edited: Edit, tensors: Any, config: dict[str, Any], said: str
) -> None:
    folder = edited(tensors, **config)
    with pytest.raises(ModelError, match=f"^{folder} .*{said}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert "config.json" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (codes, r"integers \(I8\) in place of 1 weight \(model\.layers\.0\.mlp\.up_proj\.weight\)"),
        (lambda found: {UP: codes(found)[UP]}, r"integers \(I8\) in place of 1 weight"),
        (
            lambda found: {UP: found[UP].to(torch.float8_e4m3fn), f"{UP}_scale_inv": torch.ones(1, 1)},
            r"1 tensor \(model\.layers\.0\.mlp\.up_proj\.weight_scale_inv\) of quantised weights",
        ),
    ],
    ids=["codes and scales", "codes", "float8"],
)
def test_codes_are_not_taken_for_weights(edited: Edit, tensors: Any, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        load(edited(tensors))
    assert "original weights" in (caught.value.hint or "")


def test_buffers_that_older_releases_stored_are_no_loss(edited: Edit, parts: tuple[dict[str, Any], Tensors]) -> None:
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(7),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 9, 9, dtype=torch.uint8),
        "model.decoder.version": torch.tensor([3.0]),
    }
    model = load(edited(lambda found: old))
    assert torch.equal(model.state_dict()[UP], parts[1][UP])


def test_weights_beyond_float16_are_not_called_broken(edited: Edit) -> None:
    folder = edited(lambda found: {UP: found[UP] * 1e6})
    with pytest.raises(NumericalError, match=rf"^{UP} of .* exceeds the range of float16") as caught:
        load(folder, torch.float16)
    assert "bfloat16" in (caught.value.hint or "")
    load(folder, torch.bfloat16)


def test_without_the_prefix_of_the_head_model(edited: Edit, parts: tuple[dict[str, Any], Tensors]) -> None:
    def bare(found: Tensors) -> Tensors:
        return {**{name.removeprefix("model."): tensor for name, tensor in found.items()}, "only": torch.empty(0)}

    assert torch.equal(load(edited(bare)).state_dict()[UP], parts[1][UP])
