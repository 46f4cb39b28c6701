"""Next-token scores of a batch: logits that exist as a whole, or that the head makes for a few positions at a time.

With a vocabulary of 262,144 tokens the logits of 4 windows of 512 tokens take 2 GiB in float32, and so does their
gradient. So a pass ends where the decoder ends, and the rest of the model's own forward pass (the head, and in some
families a scale or a soft cap) runs on :data:`CHUNK_BYTES` of logits at a time. It sees every position alone, which
:meth:`Head.prepare` checks. Batches with few logits, and models that fail the check, have their logits as a whole.

    L = Σ_t L_t(z_t(h_t))        ∂L/∂h_t = g_t ∂L_t/∂h_t

The loss of a position depends on its own hidden state alone. So the gradient of the hidden states is computed with the
losses, chunk by chunk, and a backward pass only multiplies it by the gradients g_t that arrive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ara.errors import is_out_of_memory
from ara.models.forwards import ending_after, replacing_forward
from ara.models.weights import find_blocks

# Logits of a chunk, and how many tensors of this size a loss needs: logits, their gradient, those of a teacher, and one
# in passing. Smaller chunks are slower: each one reads the whole matrix of the head.
CHUNK_BYTES, LOSS_TENSORS = 64 * 2**20, 4
# Logits that are kept if they are read again and again.
KEPT_BYTES = 3 * CHUNK_BYTES
# Tokens of the pass that looks at the model.
_PROBED = 4
# Largest difference of equal logits, as a share of the largest logit: more than rounding in bfloat16.
_SAME = 0.02


@dataclass(frozen=True)
class Place:
    """Where a chunk of logits stands in its batch.

    Attributes:
        windows: of the batch.
        positions: of these windows; the last position of a window predicts no token and is in no chunk.
    """

    windows: slice
    positions: slice

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values at this place of ``values`` (b, t − 1, ...), which has one per predicted token."""
        return values[self.windows, self.positions]


# Logits (b, n, v) and their place → losses (b, p) of its p positions. There may be further logits after them.
ChunkLoss = Callable[[torch.Tensor, Place], torch.Tensor]


class Scores(ABC):
    """The next-token scores of one batch of windows."""

    def chunks(self) -> Iterator[tuple[torch.Tensor, Place]]:
        """Yield logits (b, n, v) with their place, until every predicted token has had its turn."""
        for place in self.places():
            yield self.at(place), place

    def kept(self, most: int) -> Scores:
        """Return the same scores, with their logits kept if these take at most ``most`` bytes; without gradients."""
        return self

    @abstractmethod
    def places(self) -> list[Place]:
        """Return the places of all chunks."""

    @abstractmethod
    def at(self, place: Place) -> torch.Tensor:
        """Return the logits (b, n, v) at a place, which may be of other scores of the same windows."""

    @abstractmethod
    def losses(self, loss: ChunkLoss) -> torch.Tensor:
        """Return the losses (b, t − 1) float32 of all predicted tokens; differentiable where the model is.

        Args:
            loss: its result for a position must depend on the logits of that position alone.
        """


class Whole(Scores):
    """Logits that exist as a whole.

    Attributes:
        logits: (b, t, v).
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def places(self) -> list[Place]:
        """Return the place of all predicted tokens."""
        batch, length = self.logits.shape[:2]
        return [Place(slice(0, batch), slice(0, length - 1))]

    def at(self, place: Place) -> torch.Tensor:
        """Return a view of the logits."""
        return place.of(self.logits)

    def losses(self, loss: ChunkLoss) -> torch.Tensor:
        """Return the losses of all predicted tokens."""
        return loss(self.logits, self.places()[0])


class Head:
    """What a causal language model computes after its decoder."""

    def __init__(self, model: nn.Module) -> None:
        """Remember the model; nothing runs yet.

        Args:
            model: a causal language model of transformers.
        """
        self.model = model
        # Stand-ins for models have no config.
        config = getattr(model, "config", None)
        self._bytes = 0 if config is None else config.get_text_config().vocab_size * _itemsize(model)
        # Before the look: unknown.
        self._decoder: nn.Module | None = None
        self._looked = False

    def prepare(self, ids: torch.Tensor) -> None:
        """Look at the model if the logits of a batch are large; by a pass over a few tokens.

        :meth:`scores` does it as well. Call it before, where hooks must not see that pass.

        Args:
            ids: (b, t) int64, the batch.
        """
        if not self._looked and ids.numel() * self._bytes > CHUNK_BYTES:
            self._decoder, self._looked = _decoder_of(self.model, ids[:1, :_PROBED]), True

    def scores(self, ids: torch.Tensor) -> Scores:
        """Run the model on token ids (b, t) int64 on its device, and return its scores."""
        self.prepare(ids)
        if ids.numel() * self._bytes <= CHUNK_BYTES or self._decoder is None or self._trains():
            return Whole(self.model(input_ids=ids, use_cache=False).logits)
        return _Chunked(self.model, self._decoder, ids, self._bytes)

    def _trains(self) -> bool:
        """Tell whether the head itself is trained: its gradient is not computed in chunks."""
        if not torch.is_grad_enabled():
            return False
        assert self._decoder is not None
        inside = {id(parameter) for parameter in self._decoder.parameters()}
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        own = list(head.parameters()) if isinstance(head, nn.Module) else []
        outside = [parameter for parameter in self.model.parameters() if id(parameter) not in inside]
        return any(parameter.requires_grad for parameter in (*own, *outside))


class _Chunked(Scores):
    """Hidden states after the decoder, and what makes logits of them."""

    def __init__(self, model: nn.Module, decoder: nn.Module, ids: torch.Tensor, row: int) -> None:
        """Run the decoder.

        Args:
            model: a causal language model.
            decoder: its part before the head.
            ids: (b, t) int64.
            row: bytes of the logits of a token.
        """
        self._model, self._decoder, self._ids = model, decoder, ids
        with ending_after(decoder) as outputs:
            model(input_ids=ids, use_cache=False)
        self._output = outputs[0]
        self._hidden: torch.Tensor = self._output.last_hidden_state
        self._most, self._size = max(1, CHUNK_BYTES // row), row * ids.numel()

    def kept(self, most: int) -> Scores:
        """Return the same scores, with their logits kept if these take at most ``most`` bytes; without gradients."""
        if self._size > most:
            return self
        logits: torch.Tensor | None = None
        for chunk, place in self.chunks():
            if logits is None:
                # The last position is in no chunk.
                logits = chunk.new_zeros(*self._ids.shape, chunk.shape[-1])
            place.of(logits).copy_(chunk)
        assert logits is not None
        return Whole(logits)

    def places(self) -> list[Place]:
        """Return places of about the same length, of one window each: so they do not depend on the batch."""
        batch, length = self._ids.shape
        pieces = -(-(length - 1) // self._most)
        ends = [round((length - 1) * piece / pieces) for piece in range(pieces + 1)]
        return [
            Place(slice(window, window + 1), slice(start, end))
            for window in range(batch)
            for start, end in pairwise(ends)
        ]

    def at(self, place: Place) -> torch.Tensor:
        """Run the head on the hidden states at a place."""
        return self.of(place.of(self._hidden), place.windows)

    def of(self, hidden: torch.Tensor, windows: slice) -> torch.Tensor:
        """Return the logits (b, n, v) of hidden states (b, n, d) of some windows."""
        return _finish(self._model, self._decoder, self._ids[windows], self._output, hidden)

    def losses(self, loss: ChunkLoss) -> torch.Tensor:
        """Return the losses of all predicted tokens."""
        result: torch.Tensor = _HeadLosses.apply(self._hidden, self, loss)
        return result


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, scores: _Chunked, loss: ChunkLoss) -> torch.Tensor:
        """Return losses (b, t − 1), and keep the gradient of the hidden states."""
        batch, length = hidden.shape[:2]
        losses = torch.empty(batch, length - 1, dtype=torch.float32, device=hidden.device)
        gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        for place in scores.places():
            part = place.of(hidden).detach()
            with torch.set_grad_enabled(gradient is not None):
                if gradient is not None:
                    part.requires_grad_()
                values = loss(scores.of(part, place.windows), place)
                if gradient is not None:
                    place.of(gradient).copy_(torch.autograd.grad(values.sum(), part)[0])
            place.of(losses).copy_(values.detach())
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # In place: the graph is used once.
        gradient[:, :-1] *= grads[0].unsqueeze(-1).to(gradient.dtype)
        return gradient, None, None


def _itemsize(model: nn.Module) -> int:
    return next((parameter.element_size() for parameter in model.parameters()), 4)


def _finish(model: nn.Module, decoder: nn.Module, ids: torch.Tensor, output: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits (b, n, v) that the model makes of hidden states (b, n, d).

    Args:
        model: a causal language model.
        decoder: its part before the head.
        ids: (b, t) int64, of the same windows.
        output: of the decoder; all but its hidden states are handed on.
        hidden: (b, n, d).
    """
    given = type(output)(**{**output, "last_hidden_state": hidden})
    with replacing_forward([decoder], lambda forward: lambda *args, **kwargs: given):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@torch.no_grad()
def _decoder_of(model: nn.Module, ids: torch.Tensor) -> nn.Module | None:
    """Return the part before the head, or ``None`` if logits cannot be made for some positions alone.

    Args:
        model: a causal language model.
        ids: (1, t) int64, a few tokens.
    """
    path = find_blocks(model)[0].split(".")
    around = [model.get_submodule(".".join(path[:end])) for end in range(1, len(path))]
    seen: dict[nn.Module, list[Any]] = {module: [] for module in around}
    with ExitStack() as hooks:
        for module in around:
            hooks.enter_context(module.register_forward_hook(partial(_note, seen[module])))
        whole = model(input_ids=ids, use_cache=False).logits
    for module in around:
        hidden = [getattr(output, "last_hidden_state", None) for output in seen[module]]
        if len(hidden) != 1 or not isinstance(hidden[0], torch.Tensor) or hidden[0].shape[:2] != ids.shape:
            continue
        try:
            halves = hidden[0].split(max(1, ids.shape[1] // 2), 1)
            parts = [_finish(model, module, ids, seen[module][0], half) for half in halves]
        except Exception as error:  # a model that reads more than hidden states may raise anything
            if is_out_of_memory(error):
                raise
            return None
        found = torch.cat(parts, 1)
        same = found.shape == whole.shape and (found - whole).abs().max() <= _SAME * whole.abs().max()
        return module if same else None
    return None


def _note(outputs: list[Any], module: nn.Module, args: object, output: Any) -> None:
    outputs.append(output)
