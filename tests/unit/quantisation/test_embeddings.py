"""Embedding and head of few bits: the checkpoint, what loads it, how they are rounded."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import ara
from ara.errors import ModelError, UnsupportedModelError, UsageError
from ara.layouts.grid import Bits, Grid
from ara.layouts.modeling_ara import RoundedEmbedding, RoundedLinear, TiedHead, rounded_like
from ara.models.accounting import weight_bytes
from ara.models.checkpoint import load, save_checkpoint
from ara.models.embeddings import find_embeddings
from ara.quantisation.embeddings import round_head
from ara.quantisation.nearest import round_to_nearest
from ara.quantisation.sequential import Parts, round_model
from ara.quantisation.storing import numbers_of
from tests.tiny import random_model, tiny_config, tiny_tokenizer

# Family, whether the head is tied.
MODELS = [("llama", True), ("llama", False), ("qwen2", True), ("gpt2", True), ("gemma", True), ("phi", False)]
IDS = torch.arange(3, 23)[None]
NUMBERS = {"steps", "scales", "zeros"}


class NoParts(Parts):
    """Stores nothing."""

    def part(self, name: str) -> None:
        """Return none."""

    def finish_part(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Forget them."""


def model_of(family: str, tied: bool) -> Any:
    config = tiny_config(family)
    config.tie_word_embeddings = tied
    return random_model(config).requires_grad_(False)


def rounded(model: Any, bits: Bits, folder: Path, windows: torch.Tensor | None = None) -> Path:
    """Round embedding and head of a model, and save it."""
    grids = find_embeddings(model).on(Grid(bits, 32, True))
    modules = round_model(model, [], grids, windows, 4, NoParts())
    save_checkpoint(model, tiny_tokenizer(), folder, ranks={}, provenance={}, rounded=modules)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize(("family", "tied"), MODELS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_way_to_load_gives_the_same_logits(family: str, tied: bool, bits: Bits, tmp_path: Path) -> None:
    model = model_of(family, tied)
    exact = logits(model)
    windows = torch.randint(4, 200, (8, 32), generator=torch.Generator().manual_seed(0))
    folder = rounded(model, bits, tmp_path / "checkpoint", windows)
    expected = logits(model)
    error = float((expected - exact).norm() / exact.norm())
    assert 0 < error < (0.02 if bits == 8 else 0.4)
    own = AutoModelForCausalLM.from_pretrained(folder)
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    own.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for one in (own, remote, again, copy.deepcopy(own), ara.load(folder, "cpu", "float32")):
        torch.testing.assert_close(logits(one), expected, rtol=1e-5, atol=1e-5)
    assert own.config.tie_word_embeddings == tied
    assert isinstance(own.get_input_embeddings(), RoundedEmbedding)
    assert isinstance(own.get_output_embeddings(), TiedHead if tied else RoundedLinear)


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_a_tied_matrix_is_stored_and_counted_once(family: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(family, tied)
    ends, before = find_embeddings(model), weight_bytes(model)
    folder = rounded(model, 8, tmp_path / "checkpoint")
    assert ends.tied == tied and ends.matrices == ((ends.embedding,) if tied else (ends.embedding, ends.head))
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert about["format_version"] == 4 and set(about["rounded"]) == set(ends.matrices)
    stored = {key for key in load_file(folder / "model.safetensors") if key.rpartition(".")[2] in NUMBERS}
    assert stored == {f"{path}.{part}" for path in ends.matrices for part in NUMBERS}
    own = AutoModelForCausalLM.from_pretrained(folder)
    saved = 4 * ends.parameters - ends.stored_bytes(Grid(8, 32, True))
    assert weight_bytes(own) == before - saved
    dense = load(folder, "cpu", "float32")
    assert (dense.get_output_embeddings().weight is dense.get_input_embeddings().weight) == tied
    assert weight_bytes(dense) == before
    dense.save_pretrained(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(plain.config, "quantization_config") and weight_bytes(plain) == before
    torch.testing.assert_close(logits(plain), logits(dense))


def test_a_lookup_has_the_dtype_of_the_model_and_exact_scales(tmp_path: Path) -> None:
    folder = rounded(model_of("gemma", True), 4, tmp_path / "checkpoint")
    exact, cast = (AutoModelForCausalLM.from_pretrained(folder, dtype=kind) for kind in (torch.float32, torch.bfloat16))
    rows = exact.get_input_embeddings()(IDS)
    assert rows.dtype == torch.float32 and cast.get_input_embeddings()(IDS).dtype == torch.bfloat16
    cast.to(torch.float16)
    assert cast.get_input_embeddings()(IDS).dtype == torch.float16
    assert torch.equal(cast.get_input_embeddings().scales, exact.get_input_embeddings().scales)
    # Gemma multiplies its rows by the root of their width.
    expected = exact.get_input_embeddings().weight[IDS] * exact.config.hidden_size**0.5
    torch.testing.assert_close(rows, expected)


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    own = AutoModelForCausalLM.from_pretrained(rounded(model_of("llama", True), 8, tmp_path / "checkpoint"))
    for wrong in (-1, 260):
        with pytest.raises(IndexError):
            own(input_ids=torch.tensor([[wrong]]))


def test_software_without_ara_and_damaged_files_do_not_load(tmp_path: Path) -> None:
    folder = rounded(model_of("llama", True), 8, tmp_path / "checkpoint")
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (0,)
    del tensors["model.embed_tokens.scales"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.scales"):
        load(folder, "cpu", "float32")


def _moment(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * n, n, generator=generator) @ torch.randn(n, n, generator=generator) * torch.logspace(0, -1, n)
    return x.T @ x / len(x)


def test_a_tied_matrix_serves_logits_and_rows() -> None:
    weight = torch.randn(300, 96, generator=torch.Generator().manual_seed(0))
    moment, grid = _moment(96), Grid(4, 32, True)

    def errors(found: torch.Tensor) -> tuple[float, float]:
        change = (found - weight).double()
        return float(((change @ moment.double()) * change).sum()), float(change.square().sum())

    model = model_of("llama", True)
    tied, apart = find_embeddings(model), find_embeddings(model_of("llama", False))
    nearest = errors(round_to_nearest(weight, grid).weight())
    both = errors(round_head(weight, tied, grid, moment).weight())
    head = errors(round_head(weight, apart, grid, moment).weight())
    assert head[0] < both[0] < 0.8 * nearest[0]
    assert nearest[1] <= both[1] < head[1] and both[1] < 1.5 * nearest[1]


def test_rows_in_parts_are_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid, moment = torch.randn(23, 40), Grid(4, 16, True), _moment(40)
    apart = find_embeddings(model_of("llama", False))
    whole = [numbers_of(one) for one in (round_to_nearest(weight, grid), round_head(weight, apart, grid, moment))]
    monkeypatch.setattr("ara.quantisation.nearest._ROWS", 7)
    monkeypatch.setattr("ara.layouts.modeling_ara._ROWS", 5)
    parts = [numbers_of(one) for one in (round_to_nearest(weight, grid), round_head(weight, apart, grid, moment))]
    for one, other in zip(whole, parts, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in NUMBERS)
    module = rounded_like(nn.Embedding(23, 40), 4, 16, True)
    module.load_state_dict(whole[0])
    torch.testing.assert_close(module.weight, round_to_nearest(weight, grid).weight())


class Shifted(nn.Embedding):
    """Does something unknown with its rows."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return shifted rows."""
        return super().forward(input) + 1


def test_what_cannot_be_rounded_is_said(tmp_path: Path) -> None:
    model = model_of("llama", True)
    with pytest.raises(UsageError, match="--block 64 is longer than a row of the embedding, which has 60 numbers"):
        find_embeddings(model).on(Grid(8, 64))
    model.set_input_embeddings(Shifted(260, 60))
    with pytest.raises(UnsupportedModelError, match="they are Shifted and Linear"):
        find_embeddings(model)
    with pytest.raises(ValueError, match="more than look up rows"):
        rounded_like(Shifted(260, 60), 8, 32, True)
