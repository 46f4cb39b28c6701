"""Second moments of the inputs of linear layers, streamed over calibration text.

Layers that receive the very same tensor (q, k and v; gate and up) share one accumulator: which do is seen from a
first forward pass, not listed per architecture. Accumulation is in float32 from activations of whatever dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn

from ara.errors import NumericalError, UnsupportedModelError
from ara.models.loading import forward_errors
from ara.models.weights import LinearSpec, find_blocks
from ara.progress import SILENT, Reporter

# Columns of one block of the symmetric product; blocks below the diagonal are mirrored, not computed.
_BLOCK = 256


@dataclass(frozen=True)
class InputStats:
    """What a decomposition may know of the inputs x of a layer.

    Attributes:
        second_moment: G = (1/t) Σ x xᵀ, (n, n) float32.
        abs_mean: (1/t) Σ |x|, (n) float32.
        tokens: t, the number of inputs seen.
    """

    second_moment: torch.Tensor
    abs_mean: torch.Tensor
    tokens: int


class InputAccumulator:
    """Sums x xᵀ and |x| over batches, for one group of layers with the same input of width n."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.abs_sum = torch.zeros(width, dtype=torch.float32, device=device)
        self.tokens = 0

    @staticmethod
    def bytes_for(width: int) -> int:
        """Memory of one accumulator, in bytes."""
        return 4 * (width * width + width)

    def add(self, x: torch.Tensor) -> None:
        """Add the inputs ``x`` (..., n) of one batch; only the upper blocks of the Gram matrix are computed."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        n = x.shape[1]
        for start in range(0, n, _BLOCK):
            stop = min(start + _BLOCK, n)
            self.gram[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
        self.abs_sum += x.abs().sum(0)
        self.tokens += x.shape[0]

    @property
    def is_finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return bool(torch.isfinite(self.abs_sum).all() and torch.isfinite(self.gram.diagonal()).all())

    def result(self) -> InputStats:
        """Return the averages and give up the sums; the Gram matrix is mirrored along its diagonal in place."""
        gram = self.gram.triu_()
        gram += gram.triu(1).T
        gram /= max(self.tokens, 1)
        return InputStats(gram, self.abs_sum / max(self.tokens, 1), self.tokens)


class _LastBlockDone(Exception):
    """Ends a forward pass after the last decoder block that is wanted."""


def shared_inputs(model: nn.Module, linears: Sequence[LinearSpec], ids: torch.Tensor) -> dict[str, str]:
    """Map every layer to the first layer that receives the same input tensor, seen in one forward pass.

    Args:
        model: a causal language model.
        linears: the layers to watch.
        ids: token ids (b, t) int64.

    Raises:
        UnsupportedModelError: a layer was not called by the forward pass.
        ModelError: the model's own code fails.
    """
    owners: dict[str, str] = {}
    seen: list[tuple[str, torch.Tensor]] = []

    def watch(name: str, x: torch.Tensor) -> None:
        # Tensors are kept alive until the end of the pass, so that identity is not reused.
        leader = next((other for other, tensor in reversed(seen) if tensor is x), name)
        owners[name] = leader
        if leader == name:
            seen.append((name, x))

    with _hooks(model, [spec.name for spec in linears], watch), torch.inference_mode(), forward_errors(model):
        model(input_ids=ids, use_cache=False)
    missing = [spec.name for spec in linears if spec.name not in owners]
    if missing:
        raise UnsupportedModelError(
            f"{missing[0]} and {len(missing) - 1} more linear layers were not called by a forward pass",
            "leave them out with --exclude",
        )
    return owners


def collect_moments(
    model: nn.Module,
    linears: Sequence[LinearSpec],
    owners: dict[str, str],
    windows: torch.Tensor,
    batch_size: int,
    report: Reporter = SILENT,
) -> dict[str, InputStats]:
    """Stream calibration text through ``model`` and return the input statistics of the ``linears``.

    The forward pass ends after the last block that holds one of them, and never reaches the head.

    Args:
        model: a causal language model in eval mode.
        linears: the layers wanted.
        owners: result of :func:`shared_inputs`.
        windows: token ids (samples, seq_len) int64.
        batch_size: windows per forward pass.
        report: progress.

    Returns:
        Statistics by name of the leading layer (see ``owners``).

    Raises:
        NumericalError: an activation is NaN or infinite.
    """
    device = next(model.parameters()).device
    widths = {owners[spec.name]: spec.n for spec in linears}
    sums = {name: InputAccumulator(width, device) for name, width in widths.items()}
    last = max(spec.layer for spec in linears)
    blocks = find_blocks(model)[1]

    def stop(module: nn.Module, args: object, output: object) -> None:
        raise _LastBlockDone

    end = blocks[last].register_forward_hook(stop)
    try:
        with (
            _hooks(model, list(sums), lambda name, x: sums[name].add(x)),
            torch.inference_mode(),
            report.bar(f"Reading inputs of blocks {linears[0].layer + 1} to {last + 1}", windows.shape[0]) as bar,
        ):
            for batch in windows.split(batch_size):
                with suppress(_LastBlockDone):
                    model(input_ids=batch.to(device), use_cache=False)
                bar.advance(batch.shape[0])
    finally:
        end.remove()
    for name, accumulator in sums.items():
        if not accumulator.is_finite:
            raise NumericalError(
                f"the inputs of {name} hold NaN or infinity",
                "try --dtype float32; if it stays, the model itself is broken",
            )
    return {name: sums.pop(name).result() for name in list(sums)}


@contextmanager
def _hooks(model: nn.Module, names: Iterable[str], call: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Call ``call(name, input)`` whenever one of the named modules is about to run."""

    def hook_for(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda module, args: call(name, args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
