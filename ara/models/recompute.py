"""Memory of a backward pass against its time: activations inside blocks are kept, or computed again.

transformers' ``gradient_checkpointing_enable`` only works in training mode, in which dropout is active as well. Here
the blocks of a model in evaluation mode are wrapped by torch's own checkpointing, which transformers uses too. The
gradients are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ara.models.forwards import replacing_forward
from ara.models.memory import available_bytes
from ara.models.weights import find_blocks
from ara.progress import Reporter

# Activations are kept if they, and what else a step needs, take at most this share of the free memory.
_SHARE = 0.5


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context a forward pass keeps only the inputs of ``blocks``, and a backward pass runs them again."""
    with replacing_forward(blocks, lambda forward: partial(_checkpointed, forward)):
        yield


def blocks_to_recompute(
    model: nn.Module, ids: torch.Tensor, windows: int, report: Reporter, extra: int = 0
) -> list[nn.Module]:
    """Return the blocks to run in :func:`recomputed`: none if the activations of a backward pass fit into memory.

    Args:
        model: a causal language model, in the state in which it will run.
        ids: token ids (1, t) int64 of a window, on the device of the model.
        windows: of a pass.
        report: says that activations are computed again.
        extra: bytes that the pass needs besides.
    """
    needed = windows * graph_bytes(model, ids)
    if needed + extra <= _SHARE * available_bytes(ids.device):
        return []
    report.fact(
        f"activations of {windows} windows take {needed / 2**20:,.0f} MiB: they are computed again in the backward "
        "pass; a smaller --batch-size is faster if it fits"
    )
    return list(find_blocks(model)[1])


def graph_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """Return about how many bytes a forward pass keeps for the backward pass, without parameters and without the loss.

    Only the largest block runs with a graph, and counts for all.

    Args:
        model: a causal language model of transformers.
        ids: token ids (b, t) int64, on the device of the model.
    """
    blocks = find_blocks(model)[1]
    largest = max(blocks, key=lambda block: sum(parameter.numel() for parameter in block.parameters()))
    saved: list[torch.Tensor] = []

    def observed(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = beginning_graph(args, kwargs)
            with torch.enable_grad(), keeping_graph() as kept:
                forward(*args, **kwargs)
            saved.extend(kept)
            raise _BlockRun

        return run

    with torch.no_grad(), replacing_forward([largest], observed), suppress(_BlockRun):
        model(input_ids=ids, use_cache=False)
    block = distinct_bytes(saved, model)
    inside = {id(parameter) for parameter in blocks.parameters()}
    # The largest parameters outside of the blocks are those of embeddings and head, with a row per token.
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside and parameter.ndim > 1]
    logits = max((ids.numel() * weight.shape[0] * weight.element_size() for weight in outside), default=0)
    return len(blocks) * block + logits


@contextmanager
def keeping_graph() -> Iterator[list[torch.Tensor]]:
    """Yield the tensors that forward passes in the context keep for a backward pass, which cannot follow.

    They are held, so that no freed storage gives its address to another one.
    """
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> None:
        saved.append(tensor.detach())

    def unpack(packed: None) -> torch.Tensor:
        raise AssertionError("the graph is only measured")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield saved


def distinct_bytes(tensors: Iterable[torch.Tensor], model: nn.Module) -> int:
    """Return the bytes of the storages of ``tensors``, each once, without parameters and buffers of ``model``."""
    # The address of the storage itself: without numbers there is no other.
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for address, size in storages.items() if address not in own)


def beginning_graph(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block with its input as the beginning of a graph."""
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


class _BlockRun(Exception):
    """Ends a forward pass after the observed block."""


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
