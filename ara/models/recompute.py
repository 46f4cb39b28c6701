"""Memory of a backward pass against its time: activations inside blocks are kept, or computed again.

transformers' ``gradient_checkpointing_enable`` only works in training mode, in which dropout is active as well. Here
the blocks of a model in evaluation mode are wrapped by torch's own checkpointing, which transformers uses too. The
gradients are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ara.models.blocks import replacing_forward


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context a forward pass keeps only the inputs of ``blocks``, and a backward pass runs them again."""
    with replacing_forward(blocks, lambda forward: partial(_checkpointed, forward)):
        yield


def graph_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without parameters and without the loss.

    Args:
        model: a causal language model, some of whose parameters require gradients.
        ids: token ids (b, t) int64, on the device of the model.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    # Held, so that no freed storage gives its address to another one.
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> None:
        saved.append(tensor.detach())

    def unpack(packed: None) -> torch.Tensor:
        raise AssertionError("the graph is only measured")

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        logits = model(input_ids=ids, use_cache=False).logits
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in (*saved, logits)}
    return sum(size for address, size in storages.items() if address not in own)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
