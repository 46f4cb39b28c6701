"""Memory of a backward pass against its time: activations inside blocks are kept, or computed again.

transformers' ``gradient_checkpointing_enable`` only works in training mode, in which dropout is active as well. Here
the blocks of a model in evaluation mode are wrapped by torch's own checkpointing, which transformers uses too. The
gradients are the same, bit for bit.

What is computed again starts from the inputs of the blocks. On a CPU they wait in files, so that the memory of a pass
grows little with the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ara.environment import trim_heap
from ara.models.forwards import replacing_forward
from ara.models.kept import Keep, Keeper
from ara.models.memory import available_bytes
from ara.models.scores import CHUNK_BYTES, LOSS_TENSORS
from ara.models.weights import find_blocks
from ara.progress import Reporter

# Activations are kept if they, and what else a step needs, take at most this share of the free memory.
_SHARE = 0.5
# Keyword of a block's input, where it is not the first argument.
_INPUT = "hidden_states"
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Recomputation:
    """What the backward passes of a model compute again.

    Attributes:
        blocks: all decoder blocks, or none.
        keep: of their inputs; ``None``: they stay as they are.
    """

    blocks: tuple[nn.Module, ...]
    keep: Keep | None = None

    def active(self, first: int = 0) -> AbstractContextManager[None]:
        """Return the context of a pass with a graph from block ``first`` on."""
        return recomputed(self.blocks[first:], self.keep)


@contextmanager
def recomputed(blocks: Sequence[nn.Module], keep: Keep | None = None) -> Iterator[None]:
    """Within this context a forward pass keeps only the inputs of ``blocks``, and a backward pass runs them again."""
    with replacing_forward(blocks, lambda forward: partial(_checkpointed, forward, keep)):
        yield


def choose_recomputation(
    model: nn.Module, ids: torch.Tensor, windows: int, report: Reporter, folder: Path | None = None, extra: int = 0
) -> Recomputation:
    """Return what to compute again: nothing if the activations of a backward pass fit into memory.

    Args:
        model: a causal language model, in the state in which it will run.
        ids: token ids (1, t) int64 of a window, on the device of the model.
        windows: of a pass.
        report: says that activations are computed again.
        folder: for the inputs of the blocks, which stay in memory without it, on a GPU, or if the disk is too full.
        extra: bytes that the pass needs besides.
    """
    graph = measure_graph(model, ids)
    needed, inputs = (
        windows * graph.kept + LOSS_TENSORS * min(windows * graph.logits, CHUNK_BYTES),
        windows * graph.inputs,
    )
    if needed + extra <= _SHARE * available_bytes(ids.device):
        return Recomputation(())
    keeper = Keeper(folder if ids.device.type == "cpu" else None)
    in_files = keeper.use_files(inputs)
    report.fact(
        f"activations of {windows} windows take {needed / 2**20:,.0f} MiB: they are computed again in the backward "
        f"pass, from {inputs / 2**20:,.0f} MiB of block inputs{f' in {folder}' if in_files else ''}; "
        "a smaller --batch-size is faster if it fits"
    )
    return Recomputation(tuple(find_blocks(model)[1]), keeper.keep if in_files else None)


@dataclass(frozen=True)
class GraphBytes:
    """Bytes that a forward pass leaves to the backward pass.

    Attributes:
        kept: of all tensors, without parameters, logits and the loss.
        inputs: of the inputs of the blocks alone.
        logits: of the logits.
    """

    kept: int
    inputs: int
    logits: int


def measure_graph(model: nn.Module, ids: torch.Tensor) -> GraphBytes:
    """Return about how much a forward pass keeps.

    Only the largest block runs with a graph, and counts for all.

    Args:
        model: a causal language model of transformers.
        ids: token ids (b, t) int64, on the device of the model.
    """
    blocks = find_blocks(model)[1]
    largest = max(blocks, key=lambda block: sum(parameter.numel() for parameter in block.parameters()))
    saved: list[torch.Tensor] = []
    inputs: list[int] = []

    def observed(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            inputs.append(_split(args, kwargs)[0].nbytes)
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
    return GraphBytes(len(blocks) * block, len(blocks) * sum(inputs), logits)


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


def beginning_graph(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
    """Return the arguments of a block with its input as the beginning of a graph."""
    hidden, arguments = _split(args, kwargs)
    return arguments(hidden.detach().requires_grad_())


class _BlockRun(Exception):
    """Ends a forward pass after the observed block."""


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Callable[[torch.Tensor], _Arguments]]:
    """Return the input of a block, and what makes its arguments from an input and the others, which it holds."""
    if args:
        others = args[1:]
        return args[0], lambda hidden: ((hidden, *others), kwargs)
    named = {name: value for name, value in kwargs.items() if name != _INPUT}
    return kwargs[_INPUT], lambda hidden: ((), {**named, _INPUT: hidden})


def _checkpointed(forward: Callable[..., Any], keep: Keep | None, *args: Any, **kwargs: Any) -> Any:
    hidden, arguments = _split(args, kwargs)

    def run(hidden: torch.Tensor) -> Any:
        positional, named = arguments(hidden)
        return forward(*positional, **named)

    # Inside, checkpoint has hooks of its own. These see only what it saves itself, the input.
    with nullcontext() if keep is None else saved_tensors_hooks(partial(_packed, keep), _unpacked):
        return checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)


# Small objects of the graph are put where activations were freed. The activations of the next block then do not fit
# there, so the heap grows with every block, by about the activations of one layer that nothing holds. Before a block
# runs, in the forward and in the backward pass, all free memory between the objects goes back to the system.


def _packed(keep: Keep, tensor: torch.Tensor) -> torch.Tensor:
    trim_heap()
    return keep(tensor)


def _unpacked(kept: torch.Tensor) -> torch.Tensor:
    trim_heap()
    return kept
