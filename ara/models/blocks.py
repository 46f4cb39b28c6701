"""Runs some of the decoder blocks of a model over all windows, forward and backward.

A pass is the model's own forward pass, so that masks and positions are right for every family. To start at block
``start``, the earlier blocks return the kept output of block ``start`` − 1 and compute nothing. To end after block
``last``, a hook raises an exception. A backward pass recomputes its blocks with a graph, from the kept output of the
block before, and starts from the kept gradient at the output of its last block.

Both are exact if a block reads nothing of earlier blocks but the output of the last one. Gemma 3n and 4 reuse keys and
values of earlier blocks. :func:`independent_starts` checks this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ara.errors import is_out_of_memory
from ara.models.forwards import PassEnded, ending_after, ending_before_head, replacing_forward
from ara.models.kept import Keep, Keeper, in_memory
from ara.models.recompute import Recomputation, beginning_graph, choose_recomputation
from ara.models.scores import ChunkLoss, Head
from ara.models.weights import find_blocks
from ara.progress import SILENT, Reporter

Advance = Callable[[int], None]
# Token ids (b, t) of a batch → its loss by position.
BatchLoss = Callable[[torch.Tensor], ChunkLoss]


class BlockRunner:
    """Runs consecutive blocks over all windows; keeps the outputs that the next blocks start from, on the CPU.

    Attributes:
        model: a causal language model in eval mode.
        device: of the model.
        windows: number of windows.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: torch.Tensor,
        batch_size: int,
        starts: Mapping[int, int] | None = None,
        report: Reporter = SILENT,
        folder: Path | None = None,
    ) -> None:
        """Prepare passes; nothing runs yet.

        Args:
            model: a causal language model in eval mode.
            windows: token ids (w, t) int64.
            batch_size: windows per pass.
            starts: from :func:`independent_starts`: the blocks that later passes start at. Without it, every pass
                starts at the embeddings.
            report: progress; notes when not everything fits into memory.
            folder: for outputs and inputs of blocks that do not fit into memory; without it, blocks run more often.
        """
        self.model, self.device = model, next(model.parameters()).device
        self.windows = len(windows)
        self._blocks = list(find_blocks(model)[1])
        self._batches = windows.split(batch_size)
        self._bytes = {start: size * len(windows) for start, size in (starts or {}).items()}
        self._report, self._folder, self._keeper = report, folder, Keeper(folder, report)
        self._head = Head(model)
        # What backward passes compute again; decided in the first one.
        self._recomputation: Recomputation | None = None
        # Start → the output of the block before, per batch.
        self._outputs: dict[int, list[Any]] = {}
        # Start → the output of the block before and the gradient at it, per batch.
        self._cuts: dict[int, list[tuple[Any, torch.Tensor]]] = {}

    @torch.inference_mode()
    def forward(self, first: int, last: int, advance: Advance) -> None:
        """Run blocks ``first`` to ``last`` over all windows, from the latest kept output before ``first``.

        Args:
            first: index of the first block that must run.
            last: index of the last one.
            advance: called with the number of windows after every batch.
        """
        start = max((at for at in self._outputs if at <= first), default=0)
        outputs = self._outputs.pop(start, [None] * len(self._batches))
        self._outputs.clear()
        keep = bool(self._affordable([last + 1], 1))
        for index, ids in enumerate(self._batches):
            output = self._run(ids, start, outputs[index], last)
            outputs[index] = _mapped(output, self._keeper.keep) if keep else None
            advance(len(ids))
        if keep:
            self._outputs[last + 1] = outputs

    def backward(self, first: int, last: int, loss: BatchLoss, advance: Advance) -> None:
        """Run blocks ``first`` to ``last`` over all windows, forward and backward.

        The graph begins at the input of block ``first``. The first call runs the whole model and keeps the outputs of
        the blocks before later starts, and the gradients at them. Later calls then recompute only their own blocks.

        Args:
            first: index of the first block; it must not decrease between calls.
            last: index of the last one.
            loss: of a batch; the sum of all its positions is taken. Called for all batches in order, or for none.
            advance: called with the number of windows after every batch.
        """
        begin = max((at for at in self._cuts if at <= first), default=0)
        end = min((at for at in self._cuts if at > last), default=None)
        new = [] if self._cuts else self._affordable([at for at in sorted(self._bytes) if at > last], 2)
        made: dict[int, list[tuple[Any, torch.Tensor]]] = {at: [] for at in new}
        if self._recomputation is None:
            ids, most = self._batches[0][:1].to(self.device), len(self._batches[0])
            self._head.prepare(self._batches[0].to(self.device))
            self._recomputation = choose_recomputation(self.model, ids, most, self._report, self._folder)
        for index, ids in enumerate(self._batches):
            before = self._cuts[begin][index][0] if begin in self._cuts else None
            with torch.enable_grad(), ExitStack() as hooks:
                hooks.enter_context(self._recomputation.active(first))
                hooks.enter_context(self._blocks[first].register_forward_pre_hook(_begin_graph, with_kwargs=True))
                if end is not None:
                    output = self._run(ids, begin, before, end - 1)
                    torch.autograd.backward(_differentiable(output), [self._cuts[end][index][1].to(self.device)])
                else:
                    for at, pairs in made.items():
                        hooks.enter_context(
                            self._blocks[at - 1].register_forward_hook(partial(_cut, self._keeper, pairs))
                        )
                    with starting_at(self._blocks, begin, self._placed(before)):
                        ids = ids.to(self.device)
                        value = self._head.scores(ids).losses(loss(ids)).sum()
                    value.backward()
            advance(len(ids))
        self._cuts = {at: pairs for at, pairs in self._cuts.items() if at >= begin}
        self._cuts |= {at: pairs for at, pairs in made.items() if len(pairs) == len(self._batches)}

    def _run(self, ids: torch.Tensor, start: int, before: Any, last: int) -> Any:
        """Run blocks ``start`` to ``last`` on one batch and return the output of the last one."""
        with starting_at(self._blocks, start, self._placed(before)), ending_after(self._blocks[last]) as outputs:
            self.model(input_ids=ids.to(self.device), use_cache=False)
        return outputs[0] if outputs else None

    def _placed(self, output: Any) -> Any:
        return output_on(output, self.device)

    def _affordable(self, starts: Sequence[int], each: int) -> list[int]:
        """Return those of ``starts`` for which ``each`` outputs per start fit into memory, evenly spaced."""
        wanted = [at for at in starts if at in self._bytes]
        if not wanted:
            return []
        fitting = self._keeper.number_that_fits(len(wanted), each * max(self._bytes[at] for at in wanted))
        return wanted[:: -(-len(wanted) // fitting)] if fitting else []


@torch.inference_mode()
def independent_starts(model: nn.Module, ids: torch.Tensor, starts: Sequence[int]) -> dict[int, int]:
    """Check that passes may start at the blocks ``starts``, by comparison with a pass through all blocks.

    Args:
        model: a causal language model in eval mode.
        ids: token ids (1, t) int64; a whole window, because some models treat long windows differently.
        starts: indices of blocks, in order. Each pass is to end before the next start.

    Returns:
        Start → bytes per window of the output of the block before; empty if the outputs differ in any bit.
    """
    if not starts:
        return {}
    runner = BlockRunner(model, ids, 1)
    blocks = list(find_blocks(model)[1])
    stops = [*starts, len(blocks)]
    order: list[int] = []
    outputs: dict[int, Any] = {}

    def note(index: int, module: nn.Module, args: object, output: Any) -> None:
        order.append(index)
        if index + 1 in stops:
            outputs[index + 1] = _mapped(output, in_memory)

    ids = ids.to(runner.device)
    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_hook(partial(note, index)))
        with ending_before_head(model):
            model(input_ids=ids, use_cache=False)
    if order != list(range(len(blocks))):
        return {}
    # Some blocks keep state in their module. A pass over another text makes this state wrong, and the last blocks run
    # first, as no other block reads what they leave. So a block that needs such state is found.
    with ending_before_head(model):
        model(input_ids=ids.flip(1), use_cache=False)
    for start, stop in reversed(list(pairwise(stops))):
        try:
            output = runner._run(ids, start, outputs[start], stop - 1)
        except Exception as error:  # a block that misses the state of earlier blocks may raise anything
            if is_out_of_memory(error):
                raise
            return {}
        if not _equal(_mapped(output, in_memory), outputs[stop]):
            return {}
    return {start: sum(tensor.nbytes for tensor in _tensors(outputs[start])) for start in starts}


class Stream:
    """The output of one block for all windows, advanced from block to block.

    Two streams follow a dense and a compressed model side by side. Each step reads the model's present weights, so a
    block may be changed before its step.

    Attributes:
        model: a causal language model in eval mode.
        blocks: its decoder blocks.
        at: index of the next block to run.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: torch.Tensor,
        batch_size: int | list[int],
        independent: bool,
        keep: Keep = in_memory,
    ) -> None:
        """Start at the embeddings; nothing runs yet.

        Args:
            model: a causal language model in eval mode.
            windows: token ids (w, t) int64.
            batch_size: windows per pass, or of each pass.
            independent: whether passes may start at every block, see :func:`independent_starts`. Without it every
                pass starts at the embeddings.
            keep: of the tensors in outputs of blocks.
        """
        self.model, self.blocks, self.at = model, list(find_blocks(model)[1]), 0
        self.batches = windows.split(batch_size)
        self._device = next(model.parameters()).device
        self._independent, self._keep = independent, keep
        self._before: list[Any] = [None] * len(self.batches)

    def run(self, index: int) -> Any:
        """Run block :attr:`at` on batch ``index`` and return its output.

        Gradients flow if they are enabled and parameters of the block require them.
        """
        return self._run(index, self._starting(index))

    def run_on(self, index: int, output: Any) -> Any:
        """Run block :attr:`at` on batch ``index`` as if the block before had returned ``output``.

        Gradients flow back into ``output``. Passes must be able to start at every block.
        """
        assert self._independent and self.at > 0
        return self._run(index, starting_at(self.blocks, self.at, output))

    def _run(self, index: int, start: AbstractContextManager[None]) -> Any:
        with start, ending_after(self.blocks[self.at]) as outputs:
            self.model(input_ids=self.batches[index].to(self._device), use_cache=False)
        return outputs[0]

    @torch.inference_mode()
    def input_of(self, index: int, module: nn.Module) -> torch.Tensor:
        """Run block :attr:`at` on batch ``index`` until ``module`` is called, and return its input (..., n)."""
        inputs: list[torch.Tensor] = []

        def end(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.append(args[0])
            raise PassEnded

        with self._starting(index), module.register_forward_pre_hook(end), suppress(PassEnded):
            self.model(input_ids=self.batches[index].to(self._device), use_cache=False)
        return inputs[0]

    @torch.no_grad()
    def observe(
        self, index: int, modules: Sequence[nn.Module], added: torch.Tensor | None = None
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], Any]:
        """Run block :attr:`at` on batch ``index``.

        Args:
            index: of the batch.
            modules: linear layers inside the block.
            added: what is added to the output (..., m) of each.

        Returns:
            Input (..., n) and output (..., m) of each, without ``added``, and the output of the block.
        """
        seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

        def note(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            seen[module] = args[0], output
            return None if added is None else output + added

        with ExitStack() as hooks:
            for module in modules:
                hooks.enter_context(module.register_forward_hook(note))
            output = self.run(index)
        return [seen[module] for module in modules], output

    @torch.inference_mode()
    def inputs_of(self, index: int, modules: Sequence[nn.Module]) -> dict[nn.Module, torch.Tensor]:
        """Run block :attr:`at` on batch ``index`` and return the inputs (..., n) of those ``modules`` that it calls."""
        seen: dict[nn.Module, torch.Tensor] = {}

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[module] = args[0]

        with ExitStack() as hooks:
            for module in modules:
                hooks.enter_context(module.register_forward_pre_hook(note))
            self.run(index)
        return seen

    # Not inference mode: a later pass with gradients starts from these outputs.
    @torch.no_grad()
    def outputs(self) -> list[Any]:
        """Return the outputs of block :attr:`at` for all batches, on the CPU."""
        return [self.kept(self.run(index)) for index in range(len(self.batches))]

    def kept(self, output: Any) -> Any:
        """Return a copy of the output of a block on the CPU, without a graph, for :meth:`advance`."""
        return _mapped(output, self._keep)

    def advance(self, outputs: list[Any]) -> None:
        """Go to the next block, which starts from these :meth:`outputs`."""
        if self._independent:
            self._before = outputs
        self.at += 1

    def _starting(self, index: int) -> AbstractContextManager[None]:
        before = output_on(self._before[index], self._device)
        return starting_at(self.blocks, self.at if self._independent else 0, before)


def hidden_states(output: Any) -> torch.Tensor:
    """Return the hidden states (b, t, d) in the output of a block: it, or the first item of a tuple."""
    found = output if isinstance(output, torch.Tensor) else output[0]
    assert isinstance(found, torch.Tensor)
    return found


def output_bytes(output: Any) -> int:
    """Return the bytes of all tensors in the output of a block."""
    return sum(tensor.nbytes for tensor in _tensors(output))


def output_on(output: Any, device: torch.device | str) -> Any:
    """Return the output of a block with its tensors on ``device``."""
    return _mapped(output, lambda tensor: tensor.to(device))


@contextmanager
def starting_at(blocks: Sequence[nn.Module], start: int, output: Any) -> Iterator[None]:
    """Start passes at block ``start``: the blocks before it return ``output``, whatever their input is."""
    with replacing_forward(blocks[:start], lambda forward: lambda *args, **kwargs: output):
        yield


@contextmanager
def keeping_outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Collect the outputs of ``blocks``, in the order in which they run."""
    outputs: list[Any] = []
    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(lambda *call: outputs.append(call[-1])))
        yield outputs


def _begin_graph(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Start the graph at the input of a block (a forward pre-hook)."""
    return beginning_graph(args, kwargs)


def _cut(keeper: Keeper, pairs: list[tuple[Any, torch.Tensor]], module: nn.Module, args: object, output: Any) -> None:
    """Keep the output of a block, and the gradient at it when it is known (a forward hook)."""
    tensors = _differentiable(output)
    if len(tensors) == 1:
        kept = _mapped(output, keeper.keep)
        tensors[0].register_hook(lambda gradient: pairs.append((kept, keeper.keep(gradient))))


def _differentiable(output: Any) -> list[torch.Tensor]:
    return [tensor for tensor in _tensors(output) if tensor.requires_grad]


def _tensors(output: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _mapped(output, found.append)
    return found


def _mapped(output: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Apply ``function`` to the tensors in the output of a block."""
    if isinstance(output, torch.Tensor):
        return function(output)
    if type(output) in (tuple, list):
        return type(output)(_mapped(item, function) for item in output)
    return output


def _equal(one: Any, other: Any) -> bool:
    """Tell whether two outputs hold the same bits; objects other than tensors are never equal."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if type(one) in (tuple, list) and type(one) is type(other) and len(one) == len(other):
        return all(map(_equal, one, other))
    return one is None and other is None
