"""What a pass of a decoder costs by the arithmetic: multiplications and bytes, counted from shapes.

Measured ratios stand beside those that this predicts: reading a prompt is limited by multiplications, decoding one
token at a time by what must be read from memory for it, all weights and the caches. Norms, activations, rotations and
the embedding of the input are not counted: they grow with the width of the model, not with its square.

Shapes: b batch, p past tokens, s new tokens, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Case:
    """One measurement: ``new`` tokens (s) behind ``past`` ones (p), for ``batch`` rows (b)."""

    batch: int
    past: int
    new: int

    @property
    def kind(self) -> Literal["prefill", "decode"]:
        """Prefill reads a prompt behind nothing; decode goes on behind one."""
        return "decode" if self.past else "prefill"

    @property
    def tokens(self) -> int:
        """Tokens that a pass reads, b · s."""
        return self.batch * self.new


@dataclass(frozen=True)
class Cost:
    """Counts of one model in one runtime.

    Attributes:
        linear: weights of the linear layers but the head; a token multiplies by each once.
        head: weights of the head, v · hidden.
        query_width: query heads · width of a head.
        cache_width: key-value heads · width of a head; smaller than ``query_width`` with grouped queries.
        windows: per block, how many latest positions it sees; ``None``: all.
        weight_bytes: bytes per weight of linear layers and head.
        cache_bytes: bytes per number in the caches.
        last_logits: whether the head reads the last position of a row only.
    """

    linear: int
    head: int
    query_width: int
    cache_width: int
    windows: tuple[int | None, ...]
    weight_bytes: float
    cache_bytes: int
    last_logits: bool

    def macs(self, case: Case) -> int:
        """Return multiply-accumulates of a pass; a FLOP count is twice that.

        Weights once per token, and per pair of a new token and a position that it sees (itself included) one
        product of a query with a key and one of a score with a value, ``query_width`` each.
        """
        rows = case.batch if self.last_logits else case.tokens
        pairs = sum(
            min(case.past + new + 1, window or case.past + case.new)
            for window in self.windows
            for new in range(case.new)
        )
        return case.tokens * self.linear + rows * self.head + 2 * case.batch * self.query_width * pairs

    def bytes_read(self, case: Case) -> float:
        """Return bytes of a pass: every weight once, and keys and values of the past for every row."""
        # Of a window, the new token itself takes one position.
        cached = sum(case.past if window is None else min(case.past, window - 1) for window in self.windows)
        caches = 2 * case.batch * cached * self.cache_width * self.cache_bytes
        return (self.linear + self.head) * self.weight_bytes + caches

    def predicted_ratio(self, dense: Cost, case: Case) -> float:
        """Return how many times as fast as ``dense`` this should be: by multiplications, or bytes for single tokens."""
        if case.new > 1:
            return dense.macs(case) / self.macs(case)
        return dense.bytes_read(case) / self.bytes_read(case)


def count_model(model: PreTrainedModel, *, last_logits: bool) -> Cost:
    """Count a model in torch, dense or with low-rank layers, whose parts are linear layers themselves.

    Args:
        model: a causal language model of transformers, all weights in one dtype.
        last_logits: whether it is called for the logits of the last position only.
    """
    # Here: a process that runs a case in another runtime needs neither.
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]
    return cost_of(
        model.config,
        linear=sum(module.weight.numel() for module in linears),
        head=head.weight.numel(),
        weight_bytes=model.dtype.itemsize,
        cache_bytes=model.dtype.itemsize,
        last_logits=last_logits,
    )


def cost_of(
    model_config: Any, *, linear: int, head: int, weight_bytes: float, cache_bytes: int, last_logits: bool
) -> Cost:
    """Return the counts of a model by its config and its numbers of weights.

    Args:
        model_config: of transformers.
        linear: weights of the linear layers but the head.
        head: weights of the head.
        weight_bytes: bytes per weight.
        cache_bytes: bytes per number in the caches.
        last_logits: whether the head reads the last position only.
    """
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Cost(
        linear=linear,
        head=head,
        query_width=heads * width,
        cache_width=(getattr(text, "num_key_value_heads", None) or heads) * width,
        windows=_windows(text),
        weight_bytes=weight_bytes,
        cache_bytes=cache_bytes,
        last_logits=last_logits,
    )


def _windows(text: Any) -> tuple[int | None, ...]:
    """Return how many latest positions each block sees, as transformers' caches read it from a config."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
