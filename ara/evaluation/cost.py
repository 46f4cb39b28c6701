"""Arithmetic cost of a forward pass of a decoder: multiplications and bytes, counted from shapes.

Measured ratios are compared with those predicted here. Multiplications limit prefill. Memory reads (all weights and the
caches) limit decoding. Norms, activations, rotary embeddings and the input embedding are not counted: they grow with
the width of the model, not with its square. A router is taken to choose all experts equally often.

Shapes: b batch, p past tokens, s new tokens, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ara.errors import UnsupportedModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Fields of configs: the number of experts, and how many of them a token gets.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts")


@dataclass(frozen=True)
class Case:
    """One measurement: ``new`` tokens (s) after ``past`` ones (p), for ``batch`` rows (b)."""

    batch: int
    past: int
    new: int

    @property
    def kind(self) -> Literal["prefill", "decode"]:
        """Prefill has no past tokens, decode has some."""
        return "decode" if self.past else "prefill"

    @property
    def tokens(self) -> int:
        """New tokens of a pass, b · s."""
        return self.batch * self.new


@dataclass(frozen=True)
class Cost:
    """Counts of one model in one runtime.

    Attributes:
        linear: weights of all linear layers except the head and those of experts.
        head: weights of the head, v · hidden.
        query_width: query heads · head width.
        cache_width: key-value heads · head width; smaller than ``query_width`` with grouped queries.
        windows: attention window of each block in positions; ``None``: no limit.
        weight_bytes: bytes per weight of linear layers and head.
        cache_bytes: bytes per number in the caches.
        last_logits: whether the head computes only the last position of each row.
        experts: weights of all experts among which routers choose.
        expert_share: share of these experts that a token gets.
    """

    linear: int
    head: int
    query_width: int
    cache_width: int
    windows: tuple[int | None, ...]
    weight_bytes: float
    cache_bytes: int
    last_logits: bool
    experts: int = 0
    expert_share: float = 1.0

    def macs(self, case: Case) -> int:
        """Return the multiply-accumulates of a pass; FLOPs are twice that.

        Every token multiplies with every weight once, of experts with those of its own. Every pair of a new token and a
        visible position (itself included) takes ``query_width`` for query · key and as many for score · value.
        """
        rows = case.batch if self.last_logits else case.tokens
        pairs = sum(
            min(case.past + new + 1, window or case.past + case.new)
            for window in self.windows
            for new in range(case.new)
        )
        experts = round(case.tokens * self.experts * self.expert_share)
        return case.tokens * self.linear + experts + rows * self.head + 2 * case.batch * self.query_width * pairs

    def bytes_read(self, case: Case) -> float:
        """Return the bytes read in a pass: every weight once, and past keys and values of every row.

        An expert is read if at least one token gets it: 1 − (1 − share)^tokens of them.
        """
        # The new token itself takes one position of a window.
        cached = sum(case.past if window is None else min(case.past, window - 1) for window in self.windows)
        caches = 2 * case.batch * cached * self.cache_width * self.cache_bytes
        experts = self.experts * (1 - (1 - self.expert_share) ** case.tokens)
        return (self.linear + experts + self.head) * self.weight_bytes + caches

    def predicted_ratio(self, dense: Cost, case: Case) -> float:
        """Return the predicted speed-up over ``dense``, from multiplications, or from bytes for single tokens."""
        if case.new > 1:
            return dense.macs(case) / self.macs(case)
        return dense.bytes_read(case) / self.bytes_read(case)


def count_model(model: PreTrainedModel, *, last_logits: bool) -> Cost:
    """Count a model in torch, dense or with low-rank layers (whose factors are linear layers).

    Args:
        model: a causal language model of transformers, all weights in one dtype; experts are separate layers. Of a
            model that reads more than text, the language model is counted.
        last_logits: whether it computes only the logits of the last position.
    """
    # Imported here: a process that measures another runtime does not need them.
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from ara.layouts.modeling_ara import SeparateExperts, shared_layers_of_experts
    from ara.models.multimodal import language_modules

    head = model.get_output_embeddings()
    chosen = {
        module for experts in model.modules() if isinstance(experts, SeparateExperts) for module in experts.modules()
    }
    # A factor that experts share multiplies with every token once.
    chosen -= {layer.A for path in shared_layers_of_experts(model) if hasattr(layer := model.get_submodule(path), "A")}
    linear = experts = 0
    language: list[Any] = list(language_modules(model).values())
    for module in language:
        if module is head:
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            linear += 0 if module in chosen else module.weight.numel()
            experts += module.weight.numel() if module in chosen else 0
        elif chosen and not isinstance(module, nn.Embedding):
            # A router is no linear layer in transformers, but has a matrix.
            matrix = getattr(module, "weight", None)
            linear += matrix.numel() if isinstance(matrix, nn.Parameter) and matrix.ndim == 2 else 0
    return cost_of(
        model.config,
        linear=linear,
        experts=experts,
        head=head.weight.numel(),
        weight_bytes=model.dtype.itemsize,
        cache_bytes=model.dtype.itemsize,
        last_logits=last_logits,
    )


def cost_of(
    model_config: Any,
    *,
    linear: int,
    head: int,
    weight_bytes: float,
    cache_bytes: int,
    last_logits: bool,
    experts: int = 0,
) -> Cost:
    """Return the counts of a model from its transformers config; other arguments as in :class:`Cost`.

    Raises:
        UnsupportedModelError: its blocks have no attention heads, or heads that differ from block to block; or the
            config does not say how many experts a token gets.
    """
    text = model_config.get_text_config()
    try:
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
    except (AttributeError, TypeError, RuntimeError) as error:  # a RuntimeError where layers have values of their own
        raise UnsupportedModelError(
            f"the work of a {text.model_type} model cannot be counted from attention heads of one width: "
            f"{first_line(error)}",
            "ara bench measures models with the same attention in all blocks",
        ) from None
    return Cost(
        linear=linear,
        head=head,
        query_width=heads * width,
        cache_width=(getattr(text, "num_key_value_heads", None) or heads) * width,
        windows=_windows(text),
        weight_bytes=weight_bytes,
        cache_bytes=cache_bytes,
        last_logits=last_logits,
        experts=experts,
        expert_share=_expert_share(text) if experts else 1.0,
    )


def _expert_share(text: Any) -> float:
    """Return the share of the experts that a token gets."""
    chosen, number = (
        next((found for name in names if isinstance(found := getattr(text, name, None), int) and found), None)
        for names in (_CHOSEN, _EXPERTS)
    )
    if chosen is None or number is None:
        raise UnsupportedModelError(
            f"the work of a {text.model_type} model cannot be counted: its config does not say in a known field how "
            "many experts there are, or how many a token gets",
            f"known fields: {', '.join((*_EXPERTS, *_CHOSEN))}",
        )
    return float(chosen / number)


def cache_bytes(model_config: Any, tokens: int, itemsize: int) -> int:
    """Return the bytes of the keys and values of ``tokens`` positions, without regard to attention windows.

    Args:
        model_config: of transformers.
        tokens: positions of all rows together.
        itemsize: bytes per number.
    """
    cost = cost_of(model_config, linear=0, head=0, weight_bytes=0, cache_bytes=itemsize, last_logits=True)
    return 2 * len(cost.windows) * cost.cache_width * cost.cache_bytes * tokens


def _windows(text: Any) -> tuple[int | None, ...]:
    """Return the attention window of each block in positions, read from a config as transformers' caches do."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
