"""Names the weights of a model, and finds the linear layers that can be factorised.

Layers are found in the model, never listed per architecture. The decoder blocks are the ``nn.ModuleList`` with the most
parameters; only the language model of a model that also reads pictures is searched. Every ``nn.Linear`` in the list, or
``Conv1D`` (GPT-2's transposed linear layer), is a candidate, and so is every layer of separate experts. Embeddings and
the head are outside the blocks and stay unchanged, and so do routers, whose few outputs leave nothing to save.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from ara.errors import UnsupportedModelError, UsageError
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.layouts import layout_named
from ara.layouts.base import Number
from ara.layouts.grid import Grid
from ara.layouts.modeling_ara import (
    CompressedLinear,
    SeparateExperts,
    SharedLinear,
    expert_layers,
    replace_linear,
    shared_layers_of_experts,
)
from ara.models.multimodal import language_modules, reading_text_alone

# Blocks that an error lists.
_SHOWN_BLOCKS = 8


@dataclass(frozen=True)
class WeightRef:
    """The weight (m, n) of a linear layer or an embedding of a model.

    Attributes:
        name: path of the module.
    """

    name: str

    def owner(self, model: nn.Module) -> nn.Module:
        """Return the module."""
        return model.get_submodule(self.name)

    def read(self, model: nn.Module) -> torch.Tensor:
        """Return the matrix as (m, n) = (out, in), without gradient; always a view. A ``Conv1D`` stores (n, m)."""
        owner = self.owner(model)
        stored = owner.weight
        assert isinstance(stored, torch.Tensor)
        return stored.detach().T if isinstance(owner, Conv1D) else stored.detach()

    def replace(self, model: nn.Module, new: nn.Module | torch.Tensor) -> None:
        """Replace the module by another one, or overwrite the matrix (m, n) by a tensor, bit by bit."""
        if isinstance(new, torch.Tensor):
            self.read(model).copy_(new)
        else:
            replace_linear(model, self.name, new)

    def on_input(self, model: nn.Module, call: Callable[[torch.Tensor], None]) -> RemovableHandle:
        """Call ``call`` with the input (..., n) before each run of the layer, until the handle is removed."""
        return self.owner(model).register_forward_pre_hook(lambda module, args: call(args[0]))

    def on_output(self, model: nn.Module, call: Callable[..., None]) -> RemovableHandle:
        """Call ``call`` with the output (..., m) after each run of the layer, until the handle is removed.

        For a layer of all experts it also gets the inputs (t, n), and which experts got them.
        """
        return self.owner(model).register_forward_hook(
            lambda module, args, output: call(output, *args) if len(args) > 1 else call(output)
        )


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer of a decoder block.

    Attributes:
        name: its path in the model.
        layer: index of its decoder block.
        kind: path inside the block, such as ``self_attn.q_proj``; without the number of an expert.
        m: out features; of a layer of all experts, of all of them together.
        n: in features.
        layout: how it is stored at a lower rank; determines what a rank costs.
        bits: per weight in the model.
        stored: largest rank whose factors are stored; ``None`` for all ranks.
        experts: how many experts of a block have this layer together, with one factor A; 1 for any other layer.
    """

    name: str
    layer: int
    kind: str
    m: int
    n: int
    layout: LayoutName = DEFAULT_LAYOUT
    bits: int = 16
    stored: int | None = None
    experts: int = 1

    @property
    def weight(self) -> WeightRef:
        """The matrix (m, n) in the model."""
        return WeightRef(self.name)

    @property
    def pool(self) -> str | None:
        """If the layer is an expert's: path of the list with this layer of all experts; else ``None``."""
        return None if self.name.endswith(self.kind) else self.name.rpartition(".")[0]

    @property
    def full_rank(self) -> int:
        """r = min(m, n)."""
        return min(self.m, self.n)

    @property
    def stored_rank(self) -> int:
        """The largest rank whose factors are stored."""
        return self.full_rank if self.stored is None else self.stored

    @property
    def dense_cost(self) -> int:
        """Parameters of the dense weight, mn; the bias stays and is not counted."""
        return self.m * self.n

    def cost(self, rank: Number) -> Number:
        """Parameters of rank k; see :meth:`ara.layouts.base.Layout.cost`."""
        return layout_named(self.layout).cost(self.m, self.n, rank)

    def stored_bytes(self, rank: int | None, grid: Grid | None = None) -> int:
        """Bytes of the layer in a checkpoint without its bias.

        Args:
            rank: k; ``None`` for the dense weight.
            grid: of its matrices; ``None``: they have the model's :attr:`bits`.
        """

        def matrix(m: int, n: int) -> int:
            return m * n * self.bits // 8 if grid is None else grid.bytes(m, n)

        if rank is None:
            return matrix(self.m, self.n)
        return layout_named(self.layout).stored_bytes(self.m, self.n, rank, matrix)

    @property
    def top_rank(self) -> int:
        """The largest rank that costs less than the dense weight and whose factors are stored; 0 if there is none."""
        return min(layout_named(self.layout).top_rank(self.m, self.n), self.stored_rank)

    @property
    def lacks_ranks(self) -> bool:
        """Whether a rank costs less than the dense weight and has no stored factors."""
        return layout_named(self.layout).top_rank(self.m, self.n) > self.stored_rank


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return path and module of the list of decoder blocks.

    Raises:
        UnsupportedModelError: the model has no such list.
    """
    modules = language_modules(model)
    candidates = [(name, module) for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    if not candidates:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of decoder blocks (no nn.ModuleList)",
            "ARA needs a decoder-only language model made of repeated blocks",
        )
    return max(candidates, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def by_block(specs: Iterable[LinearSpec]) -> list[list[LinearSpec]]:
    """Return the layers of every block that has some; blocks and layers keep their order."""
    blocks: dict[int, list[LinearSpec]] = {}
    for spec in specs:
        blocks.setdefault(spec.layer, []).append(spec)
    return list(blocks.values())


def find_linears(model: nn.Module, exclude: Sequence[str] = ()) -> list[LinearSpec]:
    """List the factorisable linear layers of all decoder blocks, in the order of the model.

    Those of :func:`shared_layers` are not among them: they stay dense.

    Args:
        model: a causal language model of transformers.
        exclude: shell patterns of module paths or of their ends (``*.down_proj``, ``model.layers.0.*``).

    Raises:
        UnsupportedModelError: no linear layer, fused expert weights, every weight shared by several layers, weights
            already quantised.
        UsageError: a pattern of ``exclude`` matches nothing.
    """
    prefix, blocks = find_blocks(model)
    linears: list[LinearSpec] = []
    for layer, block in enumerate(blocks):
        of_experts, routers = frozenset(expert_layers(block)), _routers(block)
        shared_by = shared_layers_of_experts(block)
        for kind, module in block.named_modules():
            if isinstance(module, CompressedLinear):
                raise UnsupportedModelError(
                    f"{prefix}.{layer}.{kind} is already factorised", "start from the original, dense model"
                )
            if _is_linear(module) and kind not in routers:
                ref = WeightRef(f"{prefix}.{layer}.{kind}")
                weight = ref.read(model)
                m, n = weight.shape
                of_all = kind.rpartition(".")[0] if kind in of_experts and kind not in shared_by else kind
                bits, experts = 8 * weight.element_size(), shared_by.get(kind, 1)
                linears.append(LinearSpec(ref.name, layer, of_all, m, n, bits=bits, experts=experts))
    _refuse_unsupported(model, prefix, blocks, linears)
    shared = set(shared_layers(model))
    own = [spec for spec in linears if spec.name not in shared]
    if not own:
        raise UnsupportedModelError(
            f"all {len(linears)} linear layers in the blocks of {type(model).__name__} share their weights with "
            f"others, such as {linears[0].name}",
            "ARA factorises layers that have a weight of their own",
        )
    return _without(own, exclude)


def shared_layers(model: nn.Module) -> list[str]:
    """Return the paths of linear layers of the decoder blocks that have one weight together, as some of Zamba's have.

    transformers ties such weights by their names, so a factorised layer in the place of one of them would not load.
    """
    prefix, blocks = find_blocks(model)
    names: dict[nn.Parameter, list[str]] = {}
    for name, weight in blocks.named_parameters(remove_duplicate=False):
        names.setdefault(weight, []).append(name)
    owners = [name.rpartition(".")[0] for same in names.values() if len(same) > 1 for name in same]
    linear = [name for name in owners if isinstance(blocks.get_submodule(name), (nn.Linear, Conv1D))]
    return [f"{prefix}.{name}" for name in dict.fromkeys(linear)]


def _routers(block: nn.Module) -> frozenset[str]:
    """Return the paths of linear layers that have one output per expert and stand beside separate experts."""
    found = set()
    for path, module in block.named_modules():
        if isinstance(module, SeparateExperts):
            beside = path.rpartition(".")[0]
            for name, layer in block.get_submodule(beside).named_modules():
                if isinstance(layer, nn.Linear) and layer.out_features == module.num_experts:
                    found.add(f"{beside}.{name}".removeprefix("."))
    return frozenset(found).difference(expert_layers(block))


def _is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer, and does nothing else."""
    plain = (nn.Linear.forward, Conv1D.forward, SharedLinear.forward)
    return isinstance(module, (nn.Linear, Conv1D)) and type(module).forward in plain


def bias_of(module: nn.Module) -> torch.Tensor | None:
    """Return the bias (m) of a linear module, or ``None``."""
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def _refuse_unsupported(model: nn.Module, prefix: str, blocks: nn.ModuleList, linears: list[LinearSpec]) -> None:
    fused = _fused_experts(blocks)
    if fused:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps fused expert weights ({len(fused)} of them, such as {prefix}.{fused[0]}), "
            "which are not linear layers",
            "of mixtures of experts, those with transformers' own interface for experts are supported",
        )
    if not linears:
        kinds = sorted({type(module).__name__ for module in blocks.modules() if not list(module.children())})
        found = ", ".join(kinds) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear layer in its {len(blocks)} blocks; found {found}",
            "ARA factorises nn.Linear (and GPT-2's Conv1D) of decoder blocks",
        )
    for spec in linears:
        weight = spec.weight.owner(model).weight
        assert isinstance(weight, torch.Tensor)
        if not weight.is_floating_point():
            raise UnsupportedModelError(
                f"{spec.name} holds {weight.dtype} weights", "start from the unquantised weights of the model"
            )


def left_dense(model: nn.Module, linears: Sequence[LinearSpec], ids: torch.Tensor) -> tuple[list[str], list[str]]:
    """Find weights of the decoder blocks that cannot be factorised, by one forward pass.

    Some families multiply by the weight of a linear layer themselves (Mamba's ``dt_proj``). Its inputs cannot be
    observed, and a module in its place would not be called.

    Args:
        model: a causal language model in eval mode.
        linears: from :func:`find_linears`.
        ids: token ids (b, t) int64; a few are enough.

    Returns:
        Paths of those ``linears`` that the forward pass does not call, except experts; and paths of matrices that
        belong to no linear layer.

    Raises:
        UnsupportedModelError: blocks run in another order than that of their list, or several times; or the model needs
            more than text.
    """
    called: set[str] = set()
    order: list[int] = []
    prefix, blocks = find_blocks(model)

    def note(name: str, x: torch.Tensor) -> None:
        called.add(name)

    with ExitStack() as hooks, torch.inference_mode():
        for spec in linears:
            hooks.enter_context(spec.weight.on_input(model, partial(note, spec.name)))
        for index, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_pre_hook(lambda *_, index=index: order.append(index)))
        hooks.enter_context(reading_text_alone(model))
        model(input_ids=ids, use_cache=False)
    if order != sorted(set(order)):
        shown = ", ".join(map(str, order[:_SHOWN_BLOCKS])) + ", …" * (len(order) > _SHOWN_BLOCKS)
        raise UnsupportedModelError(
            f"a forward pass of {type(model).__name__} runs the blocks of {prefix} in the order {shown}",
            "ARA compresses models whose blocks run once, one after the other",
        )
    others = [f"{prefix}.{name}" for name, _ in _weights_without_layer(blocks)]
    return [spec.name for spec in linears if spec.name not in called and spec.pool is None], others


def _weights_without_layer(blocks: nn.ModuleList) -> list[tuple[str, nn.Parameter]]:
    """Return the stacks of matrices in ``blocks``: parameters of three dimensions outside convolutions."""
    return [
        (name, weight)
        for name, weight in blocks.named_parameters()
        if weight.dim() >= 3 and min(weight.shape[-2:]) > 1 and "conv" not in name
    ]


def _fused_experts(blocks: nn.ModuleList) -> list[str]:
    """Return the parameters that hold a matrix of several experts.

    Most families stack them in three dimensions. DBRX has them below each other, in two.
    """

    def named(name: str) -> bool:
        parent = name.rpartition(".")[0]
        words = f"{name} {type(blocks.get_submodule(parent)).__name__}".lower()
        return "expert" in words or "moe" in words

    stacked = [name for name, _ in _weights_without_layer(blocks) if named(name)]
    return stacked or [
        name
        for name, weight in blocks.named_parameters()
        if weight.dim() == 2 and ".experts." in name and not name.endswith(("weight", "bias"))
    ]


def matching(linears: Sequence[LinearSpec], patterns: Sequence[str]) -> frozenset[str]:
    """Return the paths of the layers that match a pattern (``*.down_proj``, ``model.layers.0.*``).

    Raises:
        UsageError: a pattern matches nothing.
    """

    def matches(spec: LinearSpec, pattern: str) -> bool:
        return fnmatch.fnmatchcase(spec.name, pattern) or fnmatch.fnmatchcase(spec.kind, pattern)

    for pattern in patterns:
        if not any(matches(spec, pattern) for spec in linears):
            kinds = ", ".join(dict.fromkeys(spec.kind for spec in linears))
            raise UsageError(f"--exclude {pattern!r} matches no linear layer", f"module kinds are {kinds}")
    return frozenset(spec.name for spec in linears if any(matches(spec, pattern) for pattern in patterns))


def _without(linears: list[LinearSpec], exclude: Sequence[str]) -> list[LinearSpec]:
    gone = matching(linears, exclude)
    kept = [spec for spec in linears if spec.name not in gone]
    if not kept:
        raise UsageError("--exclude leaves no linear layer to factorise", "exclude less")
    return kept
