"""Recomputed activations: the same gradients with less memory."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ara.models import kept
from ara.models import recompute as module
from ara.models.recompute import choose_recomputation, measure_graph, recomputed
from ara.models.scores import LOSS_TENSORS
from ara.models.weights import find_blocks
from tests.recorder import Recorder
from tests.tiny import FAMILIES, tiny_model

IDS = torch.arange(2 * 12).view(2, 12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradients_are_the_same_bit_for_bit(family):
    model = tiny_model(family)
    expected = _gradients(model)
    blocks = find_blocks(model)[1]
    with recomputed(blocks):
        model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    _assert_same(model, expected)
    assert not any("forward" in vars(block) for block in blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_of_blocks_wait_in_files(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No input of a block is in memory between the passes, and what lies free in the heap is given back for each."""
    model, report, trimmed = tiny_model(family), Recorder(), []
    expected = _gradients(model)
    monkeypatch.setattr(module, "available_bytes", lambda device: 1)
    monkeypatch.setattr(module, "trim_heap", lambda: trimmed.append(len(in_files)))
    in_files: list[torch.Tensor] = []
    in_a_file = kept.in_a_file

    def noted(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
        in_files.append(in_a_file(tensor, folder))
        return in_files[-1]

    monkeypatch.setattr(kept, "in_a_file", noted)
    found = choose_recomputation(model, IDS[:1], 2, report, tmp_path / "outputs")
    blocks, inputs = find_blocks(model)[1], []
    assert found.blocks == tuple(blocks) and found.keep is not None
    handles = [
        block.register_forward_pre_hook(
            lambda block, args, named: inputs.append(weakref.ref(args[0] if args else named["hidden_states"])),
            with_kwargs=True,
        )
        for block in blocks
    ]
    with found.active():
        loss = model(input_ids=IDS, use_cache=False).logits.square().sum()
    assert len(inputs) == len(in_files) == len(trimmed) == len(blocks)
    assert not any(reference() is not None for reference in inputs)
    assert not list((tmp_path / "outputs").iterdir())
    for handle in handles:
        handle.remove()
    loss.backward()
    assert len(trimmed) == 2 * len(blocks)
    _assert_same(model, expected)
    size = sum(tensor.nbytes for tensor in in_files)
    assert measure_graph(model, IDS).inputs == size
    assert f"from {size / 2**20:,.0f} MiB of block inputs in {tmp_path / 'outputs'};" in report.facts[0]


def test_inputs_stay_in_memory_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, report = tiny_model("llama"), Recorder()
    monkeypatch.setattr(module, "available_bytes", lambda device: 1)
    size = measure_graph(model, IDS[:1]).inputs
    for free, in_files in ((4 * size, True), (4 * size - 4, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        found = choose_recomputation(model, IDS[:1], 1, report, tmp_path)
        assert found.blocks and (found.keep is not None) == in_files
        assert (str(tmp_path) in report.facts[-1]) == in_files


def test_the_bytes_that_a_graph_keeps():
    """The estimate from one block is near what a whole pass saves for its backward pass."""
    model = tiny_model("llama")
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=IDS, use_cache=False).logits
    own = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *model.buffers())}
    kept = sum(size for address, size in saved.items() if address not in own)
    assert measure_graph(model, IDS).logits == logits.nbytes
    found = measure_graph(model, IDS).kept
    assert found == pytest.approx(kept, rel=0.15)
    assert measure_graph(model, IDS[:1]).kept == pytest.approx(found / 2, rel=0.05)
    # Matrices without a gradient need no inputs kept.
    assert 0 < measure_graph(model.requires_grad_(False), IDS).kept < found


def test_activations_are_kept_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, report = tiny_model("llama"), Recorder()
    graph = measure_graph(model, IDS[:1])
    needed = 5 * (graph.kept + LOSS_TENSORS * graph.logits) + 7
    monkeypatch.setattr(module, "available_bytes", lambda device: 2 * needed)
    assert choose_recomputation(model, IDS[:1], 5, report, extra=7).blocks == ()
    assert not report.facts
    monkeypatch.setattr(module, "available_bytes", lambda device: 2 * needed - 2)
    found = choose_recomputation(model, IDS[:1], 5, report, extra=7)
    assert found.blocks == tuple(find_blocks(model)[1]) and found.keep is None
    assert "computed again in the backward pass" in report.facts[0]


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients of a pass that keeps all activations; the model has none afterwards."""
    model(IDS).logits.square().sum().backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return found


def _assert_same(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
