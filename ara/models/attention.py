"""Which kernel computes attention while gradients are taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bytes of attention probabilities that one pass may keep for its backward pass.
_KEPT_BYTES = 2 * 2**30
# Kept per probability: float32 for the softmax's backward pass, bfloat16 for the product's.
_BYTES_EACH = 6


@contextmanager
def quick_attention(model: torch.nn.Module, batch: int, length: int) -> Iterator[None]:
    """Compute attention by matrix products inside the block, where that is faster and its memory allows it.

    In bfloat16 on a CPU they take less time than torch's fused kernel and its backward pass, for windows of some
    hundred tokens (``make bench-masks`` prints by how much). Scores are rounded to bfloat16, so this is for gradients,
    not for losses that are reported.

    Args:
        model: left as it was.
        batch: windows per pass.
        length: tokens per window.
    """
    if not _is_quicker(model, batch, length):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def _is_quicker(model: torch.nn.Module, batch: int, length: int) -> TypeGuard[PreTrainedModel]:
    """Say whether products win on this model's device and type, and fit; False for modules that offer no choice."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return False
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) * getattr(config, "num_hidden_layers", 0)
    fits = 0 < heads * batch * length**2 * _BYTES_EACH <= _KEPT_BYTES
    return fits and getattr(config, "_attn_implementation", None) == "sdpa"
