"""Tiny pairs of a dense and a compressed model for the levels of recovery, and a store for their finished parts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ara.artifacts.factors import layer_file
from ara.config import RecoverConfig
from ara.decomposition.subspace import weighted_factors
from ara.layouts import layout_named
from ara.layouts.modeling_ara import replace_linear
from ara.models.weights import LinearSpec, bias_of, find_linears
from ara.recovery.base import Recovery, RecoveryText, Saved
from ara.recovery.trainable import balanced
from tests.tiny import tiny_model, tiny_texts, tiny_tokenizer


class MemorySaved(Saved):
    """Keeps parts as files in a folder, and the state in memory.

    Attributes:
        finished: names of the finished parts, in order.
        states: number of saved states.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.finished: list[str] = []
        self.states = 0
        self._values: dict[str, str] = {}
        self._state: tuple[dict[str, torch.Tensor], str] | None = None

    def part(self, name: str) -> Path | None:
        return self.folder / f"{name}.safetensors" if name in self.finished else None

    def finish_part(self, name: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, self.folder / f"{name}.safetensors")
        self._values[name] = json.dumps(dict(values), allow_nan=False)
        self.finished.append(name)

    def values(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._values[name])
        return found

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        if self._state is None:
            return None
        tensors, values = self._state
        return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(values)

    def save_state(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._state = copies, json.dumps(dict(values), allow_nan=False)
        self.states += 1

    def log_file(self, name: str) -> Path:
        return self.folder / name

    def write_folder(self, name: str, write: Callable[[Path], object]) -> None:
        folder = self.folder / name
        folder.mkdir()
        write(folder)


def tiny_recovery(
    folder: Path,
    family: str | PreTrainedModel = "llama",
    keep: float = 0.4,
    *,
    windows: int = 12,
    held_out: int = 4,
    length: int = 24,
    saved: Saved | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Recovery:
    """Return a tiny dense model, the same one cut to uniform ranks by plain SVD, and text; the same ones each time.

    The last layer of every block stays dense.

    Args:
        folder: where the factors go; finished parts go into its folder ``saved``.
        family: one of :data:`tests.tiny.FAMILIES`, or a dense model.
        keep: of every low-rank layer, in the layout ``factors``.
        windows: to repair with.
        held_out: further windows.
        length: tokens of a window.
        saved: finished parts of an earlier run.
        dtype: of both models.
        settings: of :class:`RecoverConfig`.
    """
    dense = (tiny_model(family) if isinstance(family, str) else family).to(dtype).requires_grad_(False).eval()
    model = copy.deepcopy(dense)
    specs = find_linears(dense)
    last = {spec.layer: spec.name for spec in specs}
    files: dict[str, Path] = {}
    for layer in last:
        tensors: dict[str, torch.Tensor] = {}
        for spec in (spec for spec in specs if spec.layer == layer):
            files[spec.name] = folder / layer_file(layer)
            tensors |= _factors(dense, spec)
            if spec.name != last[layer]:
                _truncate(model, spec, tensors, keep)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / layer_file(layer))
    ids = _tokens((windows + held_out) * length, dense.config.vocab_size).view(-1, length)
    config = {"device": "cpu", "dtype": str(dtype).removeprefix("torch."), "samples": windows, "held_out": held_out}
    return Recovery(
        dense=dense,
        model=model,
        specs=specs,
        factors=files,
        train=RecoveryText(ids[:windows]),
        held_out=RecoveryText(ids[windows:]),
        unseen=RecoveryText(ids[windows:]),
        config=RecoverConfig(**{**config, "seq_len": length, **settings}),
        saved=saved or MemorySaved(folder / "saved"),
    )


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return copies of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def stored(saved: Saved, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a finished part."""
    path = saved.part(name)
    assert path is not None, name
    return load_file(path)


def _factors(model: PreTrainedModel, spec: LinearSpec) -> dict[str, torch.Tensor]:
    factors = weighted_factors(spec.weight.read(model).double(), None)
    stored = {"A": factors.a.float(), "B": factors.b.float(), "spectrum": factors.spectrum}
    return {f"{spec.name}.{key}": tensor.contiguous() for key, tensor in stored.items()}


def _truncate(model: PreTrainedModel, spec: LinearSpec, factors: Mapping[str, torch.Tensor], keep: float) -> None:
    rank = max(1, int(keep * spec.m * spec.n / (spec.m + spec.n)))
    a, b = balanced(factors[f"{spec.name}.A"][:rank], factors[f"{spec.name}.B"][:, :rank])
    owner = spec.weight.owner(model)
    transposed = type(owner).__name__ == "Conv1D"
    built = layout_named("factors").build(a, b, bias_of(owner), transposed, dtype=model.dtype)
    replace_linear(model, spec.name, built)


def _tokens(count: int, vocabulary: int) -> torch.Tensor:
    """Return the first ``count`` tokens of a text."""
    found: list[int] = tiny_tokenizer()("\n".join(tiny_texts()), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(found[:count]) % vocabulary
