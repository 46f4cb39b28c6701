"""A language model with linear layers of any shapes, made on the fly, for what has to look at a model.

Transformers only have a few shapes, all tied to the hidden width. Here every layer reads and writes the hidden state
through fixed random matrices, so its shape is free, as the shapes of the allocators' tests are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import nn

from ara.artifacts.factors import layer_file
from ara.decomposition.subspace import weighted_factors
from ara.masks.context import TuningContext
from ara.masks.model import MaskedModel
from ara.models.weights import find_linears
from ara.solver.problem import Module

VOCABULARY = 19
WIDTH = 22
LAYERS_PER_BLOCK = 4
# Logits that are neither flat nor one-hot: the dense model's text has about half the entropy of a uniform one.
HEAD_SCALE = 2.5


class ToyModel(nn.Module):
    """Blocks of linear layers; position i sees the mean over positions 0 … i. Called as transformers' models are."""

    def __init__(self, shapes: Sequence[tuple[int, int]], seed: int = 0) -> None:
        """Draw all weights.

        Args:
            shapes: (m, n) of every linear layer, in the order of the model.
            seed: of the weights; the global random state stays as it is.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("embedding", torch.randn(VOCABULARY, WIDTH, generator=generator))
        self.register_buffer("head", torch.randn(VOCABULARY, WIDTH, generator=generator) * HEAD_SCALE / WIDTH**0.5)
        starts = range(0, len(shapes), LAYERS_PER_BLOCK)
        self.blocks = nn.ModuleList(_Block(shapes[i : i + LAYERS_PER_BLOCK], generator) for i in starts)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Map ids (b, t) to an object with ``logits`` (b, t, v)."""
        x = self.embedding[input_ids]
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=_normed(x) @ self.head.T)


class _Block(nn.Module):
    def __init__(self, shapes: Sequence[tuple[int, int]], generator: torch.Generator) -> None:
        super().__init__()
        for i, (m, n) in enumerate(shapes):
            self.add_module(f"l{i}", _Layer(m, n, generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        x = (x + x.cumsum(1) / positions[:, None]) / 2
        for layer in self.children():
            x = x + layer(_normed(x))
        return x


class _Layer(nn.Module):
    """Hidden state → fixed (n, d) → tanh → the linear layer (m, n) → fixed (d, m)."""

    def __init__(self, m: int, n: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("read", torch.randn(n, WIDTH, generator=generator) / WIDTH**0.5)
        self.register_buffer("write", torch.randn(WIDTH, m, generator=generator) / m**0.5)
        self.linear = nn.utils.skip_init(nn.Linear, n, m)
        # Spectra that fall at different rates and layers that matter differently: else all allocations are alike.
        decay, gain = torch.rand(2, generator=generator).tolist()
        weight = torch.randn(m, n, generator=generator) * torch.arange(1, n + 1) ** -decay
        with torch.no_grad():
            self.linear.weight.copy_(weight * (0.5 + gain) * (m / weight.square().sum()).sqrt())
            self.linear.bias.copy_(0.1 * torch.randn(m, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.tanh(x @ self.read.T)) @ self.write.T


def _normed(x: torch.Tensor) -> torch.Tensor:
    return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


def toy_problem(folder: Path, shapes: Sequence[tuple[int, int]], seed: int = 0) -> tuple[list[Module], TuningContext]:
    """Factorise a toy model by plain SVD.

    Args:
        folder: where the factors go, named as a decomposition names them.
        shapes: (m, n) of every linear layer.
        seed: of the model and the text.

    Returns:
        The layers with their spectra, and the dense model with text that was drawn from it: 6 windows of 12 tokens to
        learn from, 4 to compare on.
    """
    model = ToyModel(shapes, seed).eval()
    windows = _drawn_text(model, count=10, length=12, seed=seed)
    modules, files = [], {}
    for layer in range(len(model.blocks)):
        tensors = {}
        for spec in (spec for spec in find_linears(model) if spec.layer == layer):
            factors = weighted_factors(model.get_submodule(spec.name).weight.detach().double(), None)
            tensors[f"{spec.name}.A"] = factors.a.float().contiguous()
            tensors[f"{spec.name}.B"] = factors.b.float().contiguous()
            tensors[f"{spec.name}.spectrum"] = factors.spectrum
            modules.append(Module(spec, factors.spectrum))
            files[spec.name] = folder / layer_file(layer)
        save_file(tensors, folder / layer_file(layer))
    masked = MaskedModel(model, [module.spec for module in modules], files)
    return modules, TuningContext(masked, train=windows[:6], held_out=windows[6:], seed=seed)


@torch.no_grad()
def _drawn_text(model: ToyModel, count: int, length: int, seed: int) -> torch.Tensor:
    """Draw windows (count, length) from the model: the text it is best at, so that every cut costs likelihood."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (count, 1), generator=generator)
    while ids.shape[1] < length:
        probabilities = torch.softmax(model(ids).logits[:, -1], -1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return ids
