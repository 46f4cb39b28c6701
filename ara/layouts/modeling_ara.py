"""Low-rank linear layers for Hugging Face transformers: the only code file that an ARA checkpoint needs.

This file depends only on torch and transformers. The package ``ara`` imports it, and ``ara truncate`` copies it
unchanged into every compressed checkpoint, so that a checkpoint also loads without ``ara``::

    import ara; AutoModelForCausalLM.from_pretrained(folder)                   # no remote code
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)       # runs the copy of this file

A checkpoint is an ordinary one of its architecture. ``quantization_config`` in its ``config.json`` names the low-rank
layers, their ranks and their layout, and the matrices that are rounded to few bits. Experts that transformers keeps in
one fused parameter are separate layers in a checkpoint, so every expert has its own rank; or what maps up is one layer
of all experts of a block, so that they share a factor A. Shapes: ``m`` out features, ``n`` in features, ``k`` rank,
``E`` experts, ``t`` tokens, ``s`` pairs of a token and one of its experts.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "ara"
# Rows of a matrix of few bits that are computed at once; it limits memory.
_ROWS = 4096


class CompressedLinear(nn.Module):
    """A linear layer of rank k: it computes ``h = A x`` of width k, and a subclass computes the output from h.

    All weights are in plain ``nn.Linear`` parts, so quantisers, adapters and exporters work on the parts.

    Attributes:
        since: first version of the checkpoint format that has such layers.
        A: projects the input down; weight (k, n), no bias.
        transposed: whether it replaces a ``Conv1D``, GPT-2's linear layer with a weight of (n, m).
    """

    since: ClassVar[int]
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.A = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self._grow(out_features, rank, bias, device, dtype)

    def _grow(self, out_features: int, rank: int, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        """Create the parts that map h to the output, and the bias (m) if ``bias``."""
        raise NotImplementedError

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense weight (m, n), computed in ``dtype``."""
        raise NotImplementedError

    def problem(self) -> str | None:
        """Return what is wrong with the loaded tensors, starting with a tensor's name; ``None`` if nothing is."""
        return None

    @property
    def in_features(self) -> int:
        """Width n of the input."""
        return self.A.in_features

    @property
    def out_features(self) -> int:
        """Width m of the output."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Kept rank k."""
        return self.A.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight (m, n), computed at each access, for model code that reads it."""
        return self.product(self.A.weight.dtype)

    def extra_repr(self) -> str:
        """Show the rank."""
        return f"rank={self.rank}"


class LowRankLinear(CompressedLinear):
    """A linear layer of rank k: ``y = B (A x) + bias``, in place of ``y = W x + bias``.

    Attributes:
        B: projects up to the output; weight (m, k), and the bias (m) if the original layer had one.
    """

    since = 1

    def _grow(self, out_features: int, rank: int, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        self.B = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def out_features(self) -> int:
        """Width m of the output."""
        return self.B.out_features

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """Bias (m) of the layer."""
        return self.B.bias

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """Return ``B A`` (m, n), computed in ``dtype``."""
        return self.B.weight.to(dtype) @ self.A.weight.to(dtype)

    def forward(self, x: torch.Tensor, sent: Sent | None = None) -> torch.Tensor:
        """Map ``x`` (..., n) to (..., m) through k dimensions; ``sent`` as in :class:`SharedLinear`."""
        h = self.A(x)
        return self.B(h) if sent is None else by_expert(self.B, h, sent)


class PivotedLinear(CompressedLinear):
    """A linear layer of rank k in k(m + n − k) parameters: ``y = P [h; C h] + bias`` with ``h = A x``.

    The rows of A are k rows of the layer's weight, the pivots. Every other row is a combination of the pivots.

    Attributes:
        C: coefficients of the other rows; weight (m − k, k), no bias.
        order: (m) int32; output i is element ``order[i]`` of [h; C h].
        bias: (m), or ``None``.
    """

    since = 2
    order: torch.Tensor

    def _grow(self, out_features: int, rank: int, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        self.C = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @property
    def out_features(self) -> int:
        """Width m of the output."""
        return len(self.order)

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense weight (m, n), computed in ``dtype``."""
        a, c = self.A.weight.to(dtype), self.C.weight.to(dtype)
        return torch.cat([a, c @ a]).index_select(0, self.order)

    def problem(self) -> str | None:
        """Check that the order is a permutation; on the meta device it has no values to check."""
        if self.order.is_meta:
            return None
        expected = torch.arange(len(self.order), dtype=self.order.dtype, device=self.order.device)
        wrong = not torch.equal(self.order.sort().values, expected)
        return f"order is not a permutation of 0 … {len(self.order) - 1}" if wrong else None

    def forward(self, x: torch.Tensor, sent: Sent | None = None) -> torch.Tensor:
        """Map ``x`` (..., n) to (..., m) through k of its own outputs; ``sent`` as in :class:`SharedLinear`."""
        h = self.A(x)
        if sent is not None and _is_plain(self.C):
            return self._by_expert(h, sent)
        rows = torch.cat([h, self.C(h)], -1)
        # On CPUs several times as fast as index_select, which copies one number at a time.
        y = rows.gather(-1, self.order.long().expand_as(rows))
        y = y if self.bias is None else y + self.bias
        return y if sent is None else sent.own(y)

    def _by_expert(self, h: torch.Tensor, sent: Sent) -> torch.Tensor:
        """Return the outputs (s, m / E) for h (t, k); only the rows of an expert are computed for its tokens."""
        coefficients = _matrix(self.C, h.dtype)
        biases = None if self.bias is None else self.bias.chunk(len(sent.counts))
        parts = []
        for expert, (own, order) in enumerate(
            zip(sent.split(h), self.order.long().chunk(len(sent.counts)), strict=True)
        ):
            if len(own):
                row = order - self.rank
                y = own @ coefficients[row.clamp_min(0)].T
                y = torch.where(row < 0, own[:, order.clamp_max(self.rank - 1)], y)
                parts.append(y if biases is None else y + biases[expert])
        return torch.cat(parts) if parts else h.new_zeros(0, self.out_features // len(sent.counts))


# Tensors of a matrix of few bits.
NUMBERS = ("steps", "scales", "zeros")


class Sent:
    """Which experts get which tokens of a pass.

    Args:
        tokens: (s) int64, of the first expert, then of the second, ….
        counts: how many of them each of the E experts gets.
    """

    def __init__(self, tokens: torch.Tensor, counts: Sequence[int]) -> None:
        self.tokens, self.counts = tokens, list(counts)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the rows of ``x`` (t, …) that each expert gets."""
        return x[self.tokens].split(self.counts)

    def own(self, y: torch.Tensor) -> torch.Tensor:
        """Return (s, m): of the outputs ``y`` (t, E m) of all experts those of the expert that gets the token."""
        experts = torch.arange(len(self.counts), device=y.device)
        experts = experts.repeat_interleave(torch.tensor(self.counts, device=y.device))
        return y.unflatten(-1, (len(self.counts), -1))[self.tokens, experts]


class SharedLinear(nn.Linear):
    """One layer of all E experts: their weights (m, n) are on top of each other, (E m, n), and it is called once.

    So is every layer in its place. Their ``forward`` gets the inputs (t, n) of all tokens, and which experts get them.
    It returns (s, m): the outputs of the first expert for its tokens, then those of the second, ….
    """

    def forward(self, x: torch.Tensor, sent: Sent | None = None) -> torch.Tensor:
        """Map ``x`` (t, n) to (s, m), or (..., n) to the outputs (..., E m) of all experts."""
        if sent is None:
            return super().forward(x)
        return sent_product(x, self.weight, self.bias, sent)


def sent_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sent: Sent) -> torch.Tensor:
    """Return the products (s, m) of inputs (t, n) with the weights of their experts, (E m, n) and a bias (E m)."""
    count = len(sent.counts)
    biases = [None] * count if bias is None else bias.chunk(count)
    parts = [
        nn.functional.linear(own, rows, more)
        for own, rows, more in zip(sent.split(x), weight.chunk(count), biases, strict=True)
        if len(own)
    ]
    return torch.cat(parts) if parts else x.new_zeros(0, len(weight) // count)


def by_expert(layer: Any, x: torch.Tensor, sent: Sent) -> torch.Tensor:
    """Return the outputs (s, m) of a linear part of a layer of all experts, for inputs ``x`` (t, n)."""
    if _is_plain(layer):
        return sent_product(x, _matrix(layer, x.dtype), layer.bias, sent)
    # Whatever else it does, such as what PEFT adds, is done for all experts.
    return sent.own(layer(x))


def _is_plain(layer: Any) -> bool:
    """Tell whether a linear layer is nothing but a matrix and a bias, and nobody observes it."""
    known = type(layer) is nn.Linear or isinstance(layer, RoundedLinear)
    return known and not (layer._forward_hooks or layer._forward_pre_hooks)


def _matrix(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    found: torch.Tensor = layer.matrix(dtype) if isinstance(layer, RoundedLinear) else layer.weight
    return found


class SeparateExperts(nn.Module):
    """The experts of a block as separate linear layers; mixed into the class of transformers that fuses them.

    Where that class has a parameter (E, m, n), such as ``gate_up_proj``, this one has a list of E linear layers of the
    same name. Router, activation and shared experts are those of the family.

    Attributes:
        since: first version of the checkpoint format that has separate experts.
        shared_since: first version in which what maps up may be one layer of all experts, a :class:`SharedLinear`.
        fused_class: the class of transformers.
        every_token: run every expert on all tokens, so that whoever observes its layers sees all of them. The result
            is the same.
    """

    since: ClassVar[int] = 5
    shared_since: ClassVar[int] = 6
    fused_class: ClassVar[type[nn.Module]]
    config: Any
    num_experts: int
    has_gate: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]
    every_token: bool = False

    @property
    def shares_up(self) -> bool:
        """Whether what maps up is one layer of all experts."""
        return not isinstance(getattr(self, expert_parameters(self)[0]), nn.ModuleList)

    def run_expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs (t, d) of one expert for the inputs ``x`` (t, d)."""
        up, down = (getattr(self, name) for name in expert_parameters(self))
        if self.shares_up:
            sent = Sent(torch.arange(len(x), device=x.device), [len(x) * (one == expert) for one in range(len(down))])
            return self._after(down[expert](self._between(up(x, sent))))
        return self._after(down[expert](self._between(up[expert](x))))

    def run_all(self, x: torch.Tensor, sent: Sent) -> torch.Tensor:
        """Return the outputs (s, d) of experts that share what maps up, for the inputs ``x`` (t, d) of all tokens."""
        up, down = (getattr(self, name) for name in expert_parameters(self))
        inner = self._between(up(x, sent)).split(sent.counts)
        parts = [self._after(layer(own)) for layer, own in zip(down, inner, strict=True) if len(own)]
        return torch.cat(parts) if parts else x.new_zeros(0, x.shape[-1])

    def _between(self, x: torch.Tensor) -> torch.Tensor:
        return self._apply_gate(x) if self.has_gate else self.act_fn(x)

    def _after(self, x: torch.Tensor) -> torch.Tensor:
        norm = getattr(self, "post_expert_norm", None)
        return x if norm is None else norm(x)


class RoutedExperts(SeparateExperts):
    """Separate experts that get every token once, with the experts that the router chose for it."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the experts of every token, (t, d).

        Args:
            hidden_states: (t, d).
            top_k_index: experts of every token, (t, c) int64. E or a larger number means no expert.
            top_k_weights: (t, c).
        """
        if self.shares_up:
            return self._shared(hidden_states, top_k_index, top_k_weights)
        how = getattr(self.config, "_experts_implementation", None)
        if how in ("grouped_mm", "batched_mm") and (stacks := self._stacks()):
            return self._together(stacks, hidden_states, top_k_index, top_k_weights, how == "batched_mm")
        total = torch.zeros_like(hidden_states)
        experts = range(self.num_experts) if self.every_token else top_k_index.unique().tolist()
        for expert in experts:
            if expert >= self.num_experts:
                continue
            rows, places = torch.where(top_k_index == expert)
            if self.every_token:
                made = self.run_expert(expert, hidden_states)[rows]
            else:
                made = self.run_expert(expert, hidden_states[rows])
            weighted = made * top_k_weights[rows, places, None]
            total.index_add_(0, rows, weighted.to(total.dtype))
        return total

    def _shared(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return what :meth:`forward` does, if the experts share what maps up."""
        # (E + 1, t); the last row is of no expert.
        share = weights.new_zeros(self.num_experts + 1, len(x))
        share.index_put_((experts.clamp_max(self.num_experts).T, torch.arange(len(x), device=x.device)), weights.T)
        chosen = torch.zeros_like(share, dtype=torch.bool)
        chosen.scatter_(0, experts.clamp_max(self.num_experts).T, True)
        share, chosen = share[:-1], chosen[:-1] | self.every_token
        tokens = chosen.nonzero()[:, 1]
        made = self.run_all(x, Sent(tokens, chosen.sum(1).tolist())) * share[chosen][:, None]
        return torch.zeros_like(x).index_add_(0, tokens, made.to(x.dtype))

    def _together(
        self,
        stacks: tuple[StackedExperts, ...],
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        batched: bool,
    ) -> torch.Tensor:
        """Return what :meth:`forward` does, with one product for all experts in place of one for each."""
        none = experts >= self.num_experts
        weights = weights.masked_fill(none, 0)
        flat = experts.masked_fill(none, 0).flatten()
        up, down = stacks
        inner = self._between(up.apply(x.repeat_interleave(experts.shape[1], 0), flat, batched))
        made = self._after(down.apply(inner, flat, batched)) * weights.flatten()[:, None]
        return made.view(*experts.shape, -1).sum(1).to(x.dtype)

    def _stacks(self) -> tuple[StackedExperts, ...]:
        """Return the stacks of both lists; none where a loop over experts has to do.

        That is the case if gradients are wanted, if somebody observes the layers, if layers are of another kind than
        dense or of two factors, if all are dense, or if the kernels cannot read their width or dtype.
        """
        if torch.is_grad_enabled() or self.every_token:
            return ()
        pools = [list(getattr(self, name)) for name in expert_parameters(self)]
        modules = [module for pool in pools for layer in pool for module in (layer, *_linears(layer))]
        # Other kinds may compute more than the product, such as the adapter that PEFT puts around a factor.
        if {type(module) for module in modules} != {LowRankLinear, nn.Linear}:
            return ()
        if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
            return ()
        found: tuple[StackedExperts, ...] = self.__dict__.pop("_stacked", ())
        if not found or not all(stack.holds(pool) for stack, pool in zip(found, pools, strict=True)):
            if not all(StackedExperts.can_hold(layer) for pool in pools for layer in pool):
                return ()
            # Weights become views of the stacks, so these must be ordinary tensors.
            with torch.inference_mode(False), torch.no_grad():
                found = tuple(map(StackedExperts, pools))
        self.__dict__["_stacked"] = found
        return found


class SortedExperts(SeparateExperts):
    """Separate experts of Llama 4: the block sends every token to every expert, most of them as zeros.

    Its experts have no bias, so the output for zeros is zero.
    """

    has_gate, has_bias, is_transposed = True, False, True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the outputs (E t, d) for the inputs (E t, d): t rows for the first expert, t for the second, …."""
        rows = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        outputs = torch.zeros_like(rows)
        if self.shares_up:
            chosen = rows.any(-1) | self.every_token
            own = rows[chosen]
            sent = Sent(torch.arange(len(own), device=own.device), chosen.sum(1).tolist())
            outputs[chosen] = self.run_all(own, sent)
            return outputs.view_as(hidden_states)
        for expert, x in enumerate(rows):
            sent = x.any(-1) | self.every_token
            if sent.any():
                outputs[expert, sent] = self.run_expert(expert, x[sent])
        return outputs.view_as(hidden_states)

    def _between(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        inner: torch.Tensor = up * self.act_fn(gate)
        return inner


# Classes of transformers whose experts get sorted tokens.
_SORTED = ("Llama4TextExperts",)


class StackedExperts:
    """One layer of all experts as stacks, for a product of all experts at once.

    Dense layers come first. Factors are padded with zeros to one rank. The weights of the layers become views of the
    stacks, so they need no second memory, and stay exact in a file.

    Args:
        layers: of all experts, dense ones or of two factors.
    """

    # Kernels read rows of a multiple of 16 bytes. A rank that is a multiple of 16 gives such rows in every dtype.
    BYTES = 16

    def __init__(self, layers: Sequence[Any]) -> None:
        order = sorted(range(len(layers)), key=lambda expert: isinstance(layers[expert], LowRankLinear))
        ordered = [layers[expert] for expert in order]
        self._weights = [weight for layer in ordered for weight in _matrices(layer)]
        device = self._weights[0].device
        self._place = torch.tensor(order, device=device).argsort()
        dense = [layer for layer in ordered if not isinstance(layer, LowRankLinear)]
        low_rank = ordered[len(dense) :]
        self._dense = len(dense)
        rank = -(-max((layer.rank for layer in low_rank), default=0) // self.BYTES) * self.BYTES
        m, n = ordered[0].out_features, ordered[0].in_features
        # (D, m, n), (L, rank, n) and (L, m, rank).
        self._w = _stacked([layer.weight for layer in dense], m, n)
        self._a = _stacked([layer.A.weight for layer in low_rank], rank, n)
        self._b = _stacked([layer.B.weight for layer in low_rank], m, rank)
        self._pointers = [weight.data_ptr() for weight in self._weights]
        self._biases = [layer.bias for layer in layers if layer.bias is not None]

    @classmethod
    def can_hold(cls, layer: Any) -> bool:
        """Tell whether kernels can read the width and the dtype of a layer."""
        size = _matrices(layer)[0].itemsize
        return size <= 4 and layer.in_features * size % cls.BYTES == 0

    def holds(self, layers: Sequence[Any]) -> bool:
        """Tell whether these are the stacks of ``layers``, whose weights still are views of them."""
        own = {id(part) for part in (*self._weights, *self._biases)}
        if own != {id(part) for layer in layers for part in layer.parameters()}:
            return False
        return [weight.data_ptr() for weight in self._weights] == self._pointers

    def apply(self, x: torch.Tensor, experts: torch.Tensor, batched: bool) -> torch.Tensor:
        """Return the outputs (s, m) of the experts (s) for the inputs ``x`` (s, n)."""
        places = self._place[experts]
        order = places.argsort()
        x, counts = x[order], places.bincount(minlength=len(self._place))
        split = int(counts[: self._dense].sum())
        parts = []
        if split:
            parts.append(_product(x[:split], self._w, counts[: self._dense], batched))
        if split < len(x):
            h = _product(x[split:], self._a, counts[self._dense :], batched)
            parts.append(_product(h, self._b, counts[self._dense :], batched))
        made = torch.cat(parts)
        outputs = torch.empty_like(made)
        outputs[order] = made
        return outputs + torch.stack(self._biases)[experts] if self._biases else outputs


def _linears(layer: Any) -> list[Any]:
    """Return the factors of a low-rank layer, or the dense layer itself."""
    return [layer.A, layer.B] if isinstance(layer, LowRankLinear) else [layer]


def _matrices(layer: Any) -> list[Any]:
    return [linear.weight for linear in _linears(layer)]


def _stacked(weights: Sequence[nn.Parameter], rows: int, columns: int) -> torch.Tensor:
    """Return matrices as (count, rows, columns), padded with zeros; the matrices become views of it."""
    if not weights:
        return torch.empty(0, rows, columns)
    stack = weights[0].new_zeros(len(weights), rows, columns)
    for place, weight in zip(stack, weights, strict=True):
        view = place[: weight.shape[0], : weight.shape[1]]
        weight.data = view.copy_(weight)
    return stack


def _product(x: torch.Tensor, stack: torch.Tensor, counts: torch.Tensor, batched: bool) -> torch.Tensor:
    """Return the products (s, m) of ``x`` (s, n) with matrices (E, m, n); ``counts`` (E) has the rows of each."""
    if batched:
        return torch.bmm(stack.repeat_interleave(counts, 0), x[:, :, None])[:, :, 0]
    return nn.functional.grouped_mm(x, stack.mT, offs=counts.cumsum(0, dtype=torch.int32))


def expert_parameters(experts: nn.Module) -> tuple[str, str]:
    """Return the names of the parameters that map inputs of experts up, and down again."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def is_fused(module: nn.Module) -> bool:
    """Tell whether a module is a class of transformers for fused experts that :func:`separate_experts` knows."""
    if isinstance(module, SeparateExperts):
        return False
    if type(module).__name__ in _SORTED:
        return True
    if not all(isinstance(getattr(module, name, None), bool) for name in ("has_gate", "has_bias", "is_transposed")):
        return False
    return all(isinstance(getattr(module, name, None), nn.Parameter) for name in expert_parameters(module))


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return path → module of the fused experts in ``model``."""
    return {name: module for name, module in model.named_modules() if is_fused(module)}


def expert_layers(model: nn.Module) -> list[str]:
    """Return the paths of the layers of separate experts in ``model``, and of layers of all experts of a block."""
    own = [
        f"{path}.{name}.{expert}".removeprefix(".")
        for path, module in model.named_modules()
        if isinstance(module, SeparateExperts)
        for name in expert_parameters(module)[module.shares_up :]
        for expert in range(module.num_experts)
    ]
    return [*own, *shared_layers_of_experts(model)]


def shared_layers_of_experts(model: nn.Module) -> dict[str, int]:
    """Return path → E of the layers of all experts of a block in ``model``."""
    return {
        f"{path}.{expert_parameters(module)[0]}".removeprefix("."): module.num_experts
        for path, module in model.named_modules()
        if isinstance(module, SeparateExperts) and module.shares_up
    }


def separate_experts(model: nn.Module, shared: bool = False) -> nn.Module:
    """Turn fused experts into separate linear layers, in place; the layers share the memory of the fused parameter.

    Args:
        model: with fused experts or without.
        shared: make what maps up one layer of all experts. Weights that are stored as (E, n, m) are copied for it.
    """
    for module in fused_experts(model).values():
        module.__class__ = _separate_class(type(module))  # type: ignore[arg-type]
        for name in expert_parameters(module):
            weights, biases = getattr(module, name), getattr(module, f"{name}_bias", None)
            delattr(module, name)
            if biases is not None:
                delattr(module, f"{name}_bias")
            if shared and name == expert_parameters(module)[0]:
                weight = (weights.detach().mT if module.is_transposed else weights.detach()).flatten(0, 1)
                one = linear_with(weight, None if biases is None else biases.detach().flatten(), False, shared=True)
                setattr(module, name, one.requires_grad_(weights.requires_grad))
                continue
            layers = nn.ModuleList()
            for expert, weight in enumerate(weights.detach()):
                bias = None if biases is None else biases.detach()[expert]
                layer = linear_with(weight.T if module.is_transposed else weight, bias, False)
                layers.append(layer.requires_grad_(weights.requires_grad))
            setattr(module, name, layers)
    return model


def fuse_experts(model: nn.Module) -> nn.Module:
    """Undo :func:`separate_experts` for experts without a low-rank layer, in place."""
    for module in model.modules():
        if not isinstance(module, SeparateExperts):
            continue
        for name in expert_parameters(module):
            layers: Any = getattr(module, name)
            layers = [layers] if isinstance(layers, SharedLinear) else list(layers)
            delattr(module, name)
            weights = torch.cat([layer.weight.detach() for layer in layers]).unflatten(0, (module.num_experts, -1))
            weights = weights.mT.contiguous() if module.is_transposed else weights
            setattr(module, name, nn.Parameter(weights, layers[0].weight.requires_grad))
            if module.has_bias:
                biases = torch.cat([layer.bias.detach() for layer in layers]).unflatten(0, (module.num_experts, -1))
                setattr(module, f"{name}_bias", nn.Parameter(biases, layers[0].bias.requires_grad))
        module.__class__ = module.fused_class  # type: ignore[assignment]
    return model


@functools.cache
def _separate_class(fused: type[nn.Module]) -> type[nn.Module]:
    kind = SortedExperts if fused.__name__ in _SORTED else RoutedExperts
    return type(f"Separate{fused.__name__}", (kind, fused), {"fused_class": fused})


class RoundedMatrix(nn.Module):
    """A matrix of few bits, ``W = (q − z) s``, stored as whole numbers.

    Every ``block`` weights of a row share a scale s and perhaps a zero point z. Numbers and their packing are those of
    ONNX Runtime's MatMulNBits: two 4-bit numbers in a byte, the first one in the lower half.

    Attributes:
        since: first version of the checkpoint format that has such matrices.
        m: rows.
        n: columns.
        bits: of a weight, 4 or 8.
        block: weights per scale.
        steps: q, packed, (m, blocks · block · bits / 8) uint8; the last block of a row is filled up.
        scales: s, (m, blocks) float16, whatever the dtype of the model.
        zeros: z, packed, (m, ⌈blocks · bits / 8⌉) uint8; ``None``: z is the middle of the range, 2^(bits − 1).
    """

    since: ClassVar[int] = 3
    steps: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __init__(
        self, m: int, n: int, bits: int, block: int, zero_points: bool, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.m, self.n, self.bits, self.block = m, n, bits, block
        blocks = -(-n // block)
        widths = {"steps": blocks * block * bits // 8, "zeros": -(-blocks * bits // 8) if zero_points else None}
        for name, width in widths.items():
            packed = None if width is None else torch.zeros(m, width, dtype=torch.uint8, device=device)
            self.register_buffer(name, packed)
        self.register_buffer("scales", torch.zeros(m, blocks, dtype=torch.float16, device=device))

    @property
    def weight(self) -> torch.Tensor:
        """The weight (m, n) float32, computed at each access."""
        return self.dense(torch.float32)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (m, n) in ``dtype``; only some rows at a time are in float32."""
        found = torch.empty(self.m, self.n, dtype=dtype, device=self.steps.device)
        for at in range(0, self.m, _ROWS):
            rows = slice(at, at + _ROWS)
            zeros = None if self.zeros is None else self.zeros[rows]
            found[rows] = self._computed(self.steps[rows], self.scales[rows], zeros)
        return found

    def _computed(self, steps: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        """Return rows (..., n) float32 from their numbers."""
        q = unpacked(steps, self.bits).unflatten(-1, (-1, self.block)).float()
        if zeros is None:
            q -= 1 << (self.bits - 1)
        else:
            q -= unpacked(zeros, self.bits)[..., : scales.shape[-1], None]
        q *= scales.float()[..., None]
        return q.flatten(-2)[..., : self.n]

    def extra_repr(self) -> str:
        """Show shape and bits."""
        zero_points = "" if self.zeros is None else ", zero points"
        return f"m={self.m}, n={self.n}, bits={self.bits}, block={self.block}{zero_points}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # A cast of the model must not round the scales once more.
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self


class RoundedLinear(RoundedMatrix):
    """A linear layer of few bits: ``y = W x + bias``; W is computed at each pass.

    Attributes:
        transposed: whether it replaces a ``Conv1D``.
        bias: (m), or ``None``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        block: int,
        zero_points: bool,
        bias: bool,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, bits, block, zero_points, device)
        self.transposed = transposed
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @property
    def in_features(self) -> int:
        """Width n of the input."""
        return self.n

    @property
    def out_features(self) -> int:
        """Width m of the output."""
        return self.m

    def forward(self, x: torch.Tensor, sent: Sent | None = None) -> torch.Tensor:
        """Map ``x`` (..., n) to (..., m); ``sent`` as in :class:`SharedLinear`."""
        weight = self.matrix(x.dtype)
        return nn.functional.linear(x, weight, self.bias) if sent is None else sent_product(x, weight, self.bias, sent)

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (m, n) in ``dtype``, as a pass uses it."""
        return self.dense(dtype)


class RoundedEmbedding(RoundedMatrix):
    """An embedding of few bits: m tokens, n wide. A pass computes the rows of its tokens only.

    Attributes:
        scale: factor on the rows, as some families have it in their embedding.
        marker: no number; it has the dtype of the model, in which rows are returned.
    """

    since = 4
    marker: torch.Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        block: int,
        zero_points: bool,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, bits, block, zero_points, device)
        self.scale = scale
        self.register_buffer("marker", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @property
    def num_embeddings(self) -> int:
        """Number m of tokens."""
        return self.m

    @property
    def embedding_dim(self) -> int:
        """Width n of a row."""
        return self.n

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map token ids (...) to their rows (..., n), in the dtype of the model."""
        steps, scales = (nn.functional.embedding(ids, numbers) for numbers in (self.steps, self.scales))
        zeros = None if self.zeros is None else nn.functional.embedding(ids, self.zeros)
        return _scaled(self._computed(steps, scales, zeros).to(self.marker.dtype), self.scale)


class ScaledEmbedding(nn.Embedding):
    """An ordinary embedding with a factor on its rows, in place of the one that some families have."""

    scale: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map token ids (...) to their rows (..., n)."""
        return _scaled(super().forward(input), self.scale)


class TiedHead(nn.Module):
    """The head of a model whose embedding has few bits and is the head's weight too: it has no numbers of its own.

    Attributes:
        embedding: of the model; not a part of the head, so that its numbers are stored, moved and counted once.
        bias: (m), or ``None``.
    """

    embedding: RoundedEmbedding

    def __init__(self, embedding: RoundedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        vars(self)["embedding"] = embedding
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """The weight (m, n) float32, computed at each access."""
        return self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map hidden states (..., n) to logits (..., m)."""
        return nn.functional.linear(x, self.embedding.dense(x.dtype), self.bias)


def _scaled(rows: torch.Tensor, scale: float) -> torch.Tensor:
    # The factor is rounded to the dtype of the rows first, as those families do.
    return rows if scale == 1 else rows * torch.tensor(scale, dtype=rows.dtype, device=rows.device)


def packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Return whole numbers (m, c) uint8 below 2^bits as bytes (m, ⌈c · bits / 8⌉); bits is 4 or 8."""
    if bits == 8:
        return numbers
    pairs = nn.functional.pad(numbers, (0, numbers.shape[1] % 2)).view(len(numbers), -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpacked(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the whole numbers of bytes (..., c): (..., c · 8 / bits) uint8; the inverse of :func:`packed`."""
    if bits == 8:
        return stored
    return torch.stack([stored & 15, stored >> 4], -1).flatten(-2)


# Name of a layout → the module of its layers.
LAYERS: dict[str, type[CompressedLinear]] = {"factors": LowRankLinear, "pivoted": PivotedLinear}
# A checkpoint of a newer format is refused.
CHECKPOINT_FORMAT = max(
    SeparateExperts.shared_since, RoundedEmbedding.since, *(layer.since for layer in LAYERS.values())
)
# Bits and lengths of blocks that a rounded matrix may have.
BITS, BLOCKS = (4, 8), (16, 32, 64, 128, 256)


class AraConfig(QuantizationConfigMixin):
    """``quantization_config`` of an ARA checkpoint.

    Args:
        ranks: module path → rank k of the low-rank layers; all other layers are dense.
        format_version: of the checkpoint; ``since`` of a layer class is the first version with its layout.
        provenance: how the checkpoint was made; stored, never interpreted.
        layout: how the low-rank layers are stored, a key of ``LAYERS``.
        rounded: path of a linear layer, of a part of a low-rank one such as ``….q_proj.A``, or of the embedding →
            bits, length of blocks, whether there are zero points. A head that is tied to the embedding has no entry.
            All other matrices are floating-point numbers.
        shared_experts: whether what maps up in experts is one layer of all experts of a block.
    """

    rounded: dict[str, list[Any]] = {}  # noqa: RUF012 - never changed; the config names it only where there are any
    shared_experts: bool = False  # the config names it only where it is true

    def __init__(
        self,
        ranks: dict[str, int] | None = None,
        format_version: int = 1,
        provenance: dict[str, Any] | None = None,
        layout: str = "factors",
        rounded: dict[str, list[Any]] | None = None,
        shared_experts: bool = False,
        **_: Any,
    ) -> None:
        for key, value in (("ranks", ranks), ("provenance", provenance), ("rounded", rounded)):
            if not isinstance(value, (dict, type(None))):
                raise ValueError(f"quantization_config.{key} must be an object, got {value!r:.60}")
        self.quant_method = QUANT_METHOD
        self.ranks = dict(ranks or {})
        if rounded:
            self.rounded = dict(rounded)
        if shared_experts is not False:
            self.shared_experts = shared_experts
        self.layout = layout
        self.format_version = format_version
        self.provenance = dict(provenance or {})
        if type(format_version) is not int or not 1 <= format_version <= CHECKPOINT_FORMAT:
            raise ValueError(
                f"this checkpoint has ARA format {format_version!r}; this code reads up to {CHECKPOINT_FORMAT}: "
                "update ara-svd"
            )
        layouts = [name for name, layer in LAYERS.items() if layer.since <= format_version]
        if layout not in layouts:
            raise ValueError(
                f"quantization_config.layout must be one of those of ARA format {format_version} "
                f"({', '.join(layouts)}), got {layout!r}"
            )
        for name, rank in self.ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(
                    f"quantization_config.ranks[{name!r}] must be a whole number of at least 1, got {rank!r}"
                )
        if type(shared_experts) is not bool or (shared_experts and format_version < SeparateExperts.shared_since):
            raise ValueError(
                f"quantization_config.shared_experts must be true or false, and needs ARA format "
                f"{SeparateExperts.shared_since}, got {shared_experts!r:.60} in format {format_version}"
            )
        if self.rounded and format_version < RoundedLinear.since:
            raise ValueError(
                f"quantization_config.rounded needs ARA format {RoundedLinear.since}, got {format_version}"
            )
        for name, found in self.rounded.items():
            if not _is_rounding(found):
                raise ValueError(
                    f"quantization_config.rounded[{name!r}] must be bits {BITS}, a length of blocks {BLOCKS} and "
                    f"whether there are zero points, got {found!r:.60}"
                )


class AraQuantizer(HfQuantizer):
    """Puts compressed layers into the empty model before transformers loads the weights, and checks them afterwards."""

    requires_calibration = True
    # Whether the checkpoint has separate experts.
    _separate = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        inside = tuple(f"{path}." for path in fused_experts(model))
        self._separate = any(name.startswith(inside) for name in (*config.ranks, *config.rounded))
        if self._separate:
            separate_experts(model, config.shared_experts)
            for module in (part for part in model.modules() if isinstance(part, SeparateExperts)):
                vars(module)["_is_hf_initialized"] = True
        ignored = {rf"^{re.escape(key)}$" for key in self._guards(model)}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
        for name, rank in config.ranks.items():
            layer = _empty_like(_found(model, name, nn.Linear, Conv1D), LAYERS[config.layout], rank)
            for part in layer.modules():
                # Some families initialise new layers with code that expects a dense layer, for instance its bias.
                vars(part)["_is_hf_initialized"] = True
            replace_linear(model, name, layer)
        kinds = (nn.Linear, Conv1D, nn.Embedding)
        rounded = {name: rounded_like(_found(model, name, *kinds), *how) for name, how in config.rounded.items()}
        for empty in rounded.values():
            vars(empty)["_is_hf_initialized"] = True
        replace_rounded(model, rounded)
        self._shapes = _stored_shapes(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _check_shapes(_stored_shapes(model), self._shapes)
        for name, module in model.named_modules():
            if isinstance(module, CompressedLinear) and (problem := module.problem()):
                raise ValueError(f"{name}.{problem}")
        # A later save_pretrained does not copy the code file, so the config must not name it.
        if getattr(model.config, "auto_map", None):
            del model.config.auto_map
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return what ``save_pretrained`` writes: the weights and the tensors of :meth:`_guards`.

        A separate expert may be a transposed view, which a file cannot hold.
        """
        guards = {key: torch.empty(0, dtype=model.dtype) for key in self._guards(model)}
        return {**{name: tensor.contiguous() for name, tensor in model.state_dict().items()}, **guards}, {}

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Return what transformers does with the names in a checkpoint: nothing if experts are separate.

        Such a checkpoint has the names that the model has in memory.
        """
        if self._separate:
            return []
        updated: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        return updated

    def _guards(self, model: nn.Module) -> list[str]:
        """Return the name of an empty tensor that makes readers without ARA support fail.

        It has the name of a dense weight and the wrong shape, so loading fails. Without it such a reader would only
        warn and fill the missing weights with random numbers.
        """
        for path, module in model.named_modules():
            if isinstance(module, SeparateExperts):
                return [f"{path}.{expert_parameters(module)[0]}"]
        config = self.quantization_config
        return [f"{name}.weight" for name in (sorted(config.ranks) or sorted(config.rounded))[:1]]

    def forget_rounding(self, model: Any) -> None:
        """Let a later ``save_pretrained`` write the model as it is: matrices of few bits are ordinary ones now."""
        config = self.quantization_config
        if not config.ranks:
            self.remove_quantization_config(model)
        elif config.rounded:
            del config.rounded

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return densify(dequantise(model, dtype))

    def is_serializable(self) -> bool:
        """Tell that a loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell that layers can be trained: their weights are ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Tell that ``torch.compile`` works: layers consist of ordinary matrix products."""
        return True


class AraForCausalLM:
    """A class that ``auto_map`` names: its import registers ARA; the architecture's class loads the checkpoint.

    Attributes:
        table: name of the table of transformers that has the architecture's class.
    """

    table = "MODEL_FOR_CAUSAL_LM_MAPPING"

    @classmethod
    def loads(cls, model: Any) -> bool:
        """Tell whether the table has the class of ``model``."""
        return cls._native_class(model.config) is type(model)

    @classmethod
    def _native_class(cls, config: Any) -> Any:
        return getattr(modeling_auto, cls.table).get(type(config), None)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing; the remote code protocol requires this method."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any, **kwargs: Any) -> Any:
        """Load ``path`` with the class of transformers for ``config``."""
        kwargs.pop("trust_remote_code", None)
        return cls._native_class(config).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls._native_class(config)._from_config(config, **kwargs)


class AraForImageTextToText(AraForCausalLM):
    """The same for models that read pictures as well as text."""

    table = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"


class AraForMultimodalLM(AraForCausalLM):
    """The same for models that read anything as well as text."""

    table = "MODEL_FOR_MULTIMODAL_LM_MAPPING"


# Class of transformers → the one that ``auto_map`` names for it.
AUTO_CLASSES: dict[str, type[AraForCausalLM]] = {
    "AutoModelForCausalLM": AraForCausalLM,
    "AutoModelForImageTextToText": AraForImageTextToText,
    "AutoModelForMultimodalLM": AraForMultimodalLM,
}


def replace_linear(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the module called ``name`` in ``model`` by ``layer``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def replace_rounded(model: Any, rounded: Mapping[str, RoundedMatrix]) -> None:
    """Replace matrices of a model of transformers by such of few bits.

    A head without an entry that is tied to a rounded embedding becomes a :class:`TiedHead`. transformers no longer ties
    the two: it would look for weights.

    Args:
        model: in which matrices are replaced.
        rounded: path → module in its place.
    """
    for name, module in rounded.items():
        replace_linear(model, name, module)
    ties = {}
    for target, source in model.all_tied_weights_keys.items():
        head, embedding = (key.removesuffix(".weight") for key in (target, source))
        if head not in rounded and isinstance(shared := rounded.get(embedding), RoundedEmbedding):
            replace_linear(model, head, TiedHead(shared, model.get_submodule(head).bias))
        elif not {head, embedding} & rounded.keys():
            ties[target] = source
    if len(ties) < len(model.all_tied_weights_keys):
        model._tied_weights_keys, model.all_tied_weights_keys = ties, dict(ties)


def densify(model: nn.Module) -> nn.Module:
    """Replace every compressed layer of ``model`` by an ordinary linear layer with the same weight, in place.

    The weight is computed in float32 and rounded once, to the dtype of the factors.
    """
    shared = shared_layers_of_experts(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            weight = module.product(torch.float32).detach().to(module.A.weight.dtype)
            replace_linear(model, name, linear_with(weight, module.bias, module.transposed, name in shared))
    return model


def dequantise(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every rounded matrix of ``model`` by an ordinary one with the same numbers, in place.

    Args:
        model: with rounded matrices or without.
        dtype: of the new ones; that of the model's parameters by default.
    """
    dtype = dtype or next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    embeddings: dict[RoundedEmbedding, nn.Embedding] = {}
    heads: dict[str, TiedHead] = {}
    shared = shared_layers_of_experts(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, RoundedLinear):
            layer = linear_with(module.dense(dtype), module.bias, module.transposed, name in shared)
            replace_linear(model, name, layer)
        elif isinstance(module, RoundedEmbedding):
            embeddings[module] = embedding_with(module.dense(dtype), module.scale)
            replace_linear(model, name, embeddings[module])
        elif isinstance(module, TiedHead):
            heads[name] = module
    for name, head in heads.items():
        replace_linear(model, name, linear_with(embeddings[head.embedding].weight, head.bias, False))
    if heads:
        _tie_again(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, AraQuantizer):
        quantizer.forget_rounding(model)
    return model


def _tie_again(model: Any) -> None:
    """Let transformers tie the weights that the model's class names; :func:`replace_rounded` has taken some out."""
    del model._tied_weights_keys
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


def register() -> None:
    """Register ``quant_method: ara`` with transformers; a second call changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, AraConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, AraQuantizer)


def _stored_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of the tensors that a checkpoint of ``model`` holds, by name; tied ones appear once."""
    stored = model.state_dict(keep_vars=True)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.shape for name, tensor in tensors.items() if name in stored}


def _check_shapes(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    """Refuse tensors of another shape than those of the empty model.

    transformers before 5.20 puts whatever a file holds into a model that has a quantizer. Newer ones report the shapes.

    Raises:
        ValueError: a tensor has another shape.
    """
    differ = [name for name, shape in sorted(found.items()) if shape != expected.get(name, shape)]
    if differ:
        name, more = differ[0], f" ({len(differ)} tensors differ)" if len(differ) > 1 else ""
        raise ValueError(
            f"the checkpoint has {name} of shape {list(found[name])}, its config asks for {list(expected[name])}{more}"
        )


def _found(model: nn.Module, name: str, *kinds: type[nn.Module]) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, kinds):
        found = "nothing" if module is None else type(module).__name__
        raise ValueError(f"the checkpoint compresses {name!r}, but {type(model).__name__} has {found} there")
    return module


def linear_with(weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool, shared: bool = False) -> nn.Module:
    """Return an ordinary linear layer with a weight (m, n) and a bias (m).

    Args:
        weight: W.
        bias: or ``None``.
        transposed: return a ``Conv1D``.
        shared: return a :class:`SharedLinear`.
    """
    m, n = weight.shape
    layer: nn.Module
    if transposed:
        with torch.device("meta"):
            layer = Conv1D(m, n)
        weight = weight.T.contiguous()
    else:
        layer = (SharedLinear if shared else nn.Linear)(n, m, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def embedding_with(weight: torch.Tensor, scale: float) -> nn.Embedding:
    """Return an ordinary embedding with a weight (m, n) and a factor on its rows."""
    kind = nn.Embedding if scale == 1 else ScaledEmbedding
    m, n = weight.shape
    layer = kind(m, n, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(layer, ScaledEmbedding):
        layer.scale = scale
    return layer


def scale_of(embedding: nn.Embedding) -> float | None:
    """Return the factor that an embedding applies to its rows; ``None`` if it does something unknown with them."""
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    found = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return float(found) if isinstance(found, (int, float)) else None


def rounded_like(module: Any, bits: int, block: int, zero_points: bool) -> RoundedMatrix:
    """Return an empty module of few bits for a linear layer or an embedding, on its device and in its dtype.

    Raises:
        ValueError: an embedding that does something unknown with its rows.
    """
    weight = module.weight
    if isinstance(module, nn.Embedding):
        scale = scale_of(module)
        if scale is None:
            raise ValueError(f"{type(module).__name__} does more than look up rows and scale them")
        m, n = weight.shape
        return RoundedEmbedding(m, n, bits, block, zero_points, scale, weight.device, weight.dtype)
    bias, transposed = module.bias is not None, isinstance(module, Conv1D)
    n, m = weight.shape if transposed else reversed(weight.shape)
    return RoundedLinear(n, m, bits, block, zero_points, bias, transposed, weight.device, weight.dtype)


def _is_rounding(found: Any) -> bool:
    """Tell whether an entry of ``rounded`` is bits, length of blocks and a truth value."""
    if not isinstance(found, list) or len(found) != 3 or any(type(number) is not int for number in found[:2]):
        return False
    return found[0] in BITS and found[1] in BLOCKS and type(found[2]) is bool


def _empty_like(linear: Any, kind: type[CompressedLinear], rank: int) -> CompressedLinear:
    weight, bias = linear.weight, linear.bias
    transposed = isinstance(linear, Conv1D)
    n, m = weight.shape if transposed else reversed(weight.shape)
    if rank > min(m, n):
        raise ValueError(f"the checkpoint has rank {rank} for a layer of {m} × {n}")
    return kind(n, m, rank, bias is not None, transposed, device=weight.device, dtype=weight.dtype)


register()
