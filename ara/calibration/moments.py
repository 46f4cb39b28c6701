"""Second moments of the inputs of linear layers, streamed over calibration text.

Layers that receive the same tensor (q, k and v; gate and up) share one accumulator. A first forward pass finds them.
Sums are float32, whatever the dtype of the activations.

An expert sees only the tokens that the router sends to it, t of them. Few tokens say little about a second moment of
width n, so it is shrunk towards the one of all experts of the block together, as if these had sent it n tokens more:

    G = (Σ x xᵀ + n Ḡ) / (t + n)

An expert that saw no token gets Ḡ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ara.distributed.group import Group
from ara.errors import NumericalError, UnsupportedModelError
from ara.models.blocks import BlockRunner
from ara.models.forwards import ending_before_head
from ara.models.loading import forward_errors
from ara.models.weights import LinearSpec, WeightRef
from ara.progress import SILENT, Reporter

# Columns per block of the symmetric product. Blocks below the diagonal are mirrored, not computed.
_BLOCK = 256


@dataclass(frozen=True)
class InputStats:
    """Statistics of the inputs x of a layer.

    Attributes:
        second_moment: G = (1/t) Σ x xᵀ, (n, n) float32.
        abs_mean: (1/t) Σ |x|, (n) float32.
        tokens: t, the number of inputs.
    """

    second_moment: torch.Tensor
    abs_mean: torch.Tensor
    tokens: int


class InputAccumulator:
    """Sums x xᵀ and |x| over batches, for a group of layers with the same input of width n."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.abs_sum = torch.zeros(width, dtype=torch.float32, device=device)
        self.tokens = 0

    @staticmethod
    def bytes_for(width: int) -> int:
        """Return the bytes that one accumulator takes."""
        return 4 * (width * width + width)

    def add(self, x: torch.Tensor) -> None:
        """Add the inputs ``x`` (..., n) of one batch; only the upper blocks of the Gram matrix are computed."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        add_gram(self.gram, x)
        self.abs_sum += x.abs().sum(0)
        self.tokens += x.shape[0]

    def add_sums(self, other: InputAccumulator) -> None:
        """Add what another accumulator of this width has summed."""
        self.gram += other.gram
        self.abs_sum += other.abs_sum
        self.tokens += other.tokens

    def sum_over(self, group: Group, ranks: Collection[int]) -> None:
        """Add up the sums of all processes; only the processes ``ranks`` get them."""
        count = torch.tensor(self.tokens)
        for part in (self.gram, self.abs_sum, count):
            group.sum(part, ranks)
        self.tokens = int(count)

    @property
    def is_finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        return bool(torch.isfinite(self.abs_sum).all() and torch.isfinite(self.gram.diagonal()).all())

    def result(self, prior: InputAccumulator | None = None) -> InputStats:
        """Return the averages; consumes the sums, as the Gram matrix is mirrored in place.

        Args:
            prior: sums of all experts, towards which the averages are shrunk; see this module.
        """
        count = max(self.tokens, 1)
        if prior is not None and prior.tokens:
            width = len(self.gram)
            self.gram += prior.gram * (width / prior.tokens)
            self.abs_sum += prior.abs_sum * (width / prior.tokens)
            count = self.tokens + width
        gram = mirrored(self.gram)
        gram /= count
        return InputStats(gram, self.abs_sum / count, self.tokens)


# Adds up the sums of several processes, and drops those that this process does not need.
Total = Callable[[dict[str, InputAccumulator]], None]


def of_one_process(sums: dict[str, InputAccumulator]) -> None:
    """Leave the sums as they are."""


def add_gram(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add x xᵀ of the rows of ``x`` (t, n) to ``total`` (n, n); only its upper blocks are computed."""
    n = x.shape[1]
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        total[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def gram_flops(n: int) -> int:
    """Return the floating-point operations per row of :func:`add_gram`."""
    return sum(2 * min(_BLOCK, n - start) * (n - start) for start in range(0, n, _BLOCK))


def mirrored(total: torch.Tensor) -> torch.Tensor:
    """Return the symmetric matrix of a sum by :func:`add_gram`, in place."""
    total.triu_()
    total += total.triu(1).T
    return total


def packed_triangle(moment: torch.Tensor) -> torch.Tensor:
    """Return the upper triangle of a symmetric matrix (n, n), row after row: (n (n + 1) / 2), its dtype."""
    return torch.cat([row[at:] for at, row in enumerate(moment)])


def packed_bytes(n: int) -> int:
    """Return the bytes of the packed triangle of a float32 matrix (n, n)."""
    return 4 * (n * (n + 1) // 2)


def from_triangle(packed: torch.Tensor, n: int) -> torch.Tensor:
    """Return the symmetric matrix (n, n) of :func:`packed_triangle`."""
    found = packed.new_zeros(n, n)
    for at, part in enumerate(packed.split(list(range(n, 0, -1)))):
        found[at, at:] = part
    return mirrored(found)


@contextmanager
def watching_inputs(model: nn.Module, linears: Sequence[LinearSpec]) -> Iterator[dict[str, str]]:
    """Yield a table that the next forward pass of ``model`` fills: layer → first layer with the same input tensor.

    Layers that the pass does not call are missing in it.
    """
    owners: dict[str, str] = {}
    seen: list[tuple[str, torch.Tensor]] = []

    def watch(name: str, x: torch.Tensor) -> None:
        # ``seen`` keeps the tensors alive until the end of the pass, so that no id is used twice.
        leader = next((other for other, tensor in reversed(seen) if tensor is x), name)
        owners[name] = leader
        if leader == name:
            seen.append((name, x))

    with ExitStack() as hooks:
        for spec in linears:
            hooks.enter_context(spec.weight.on_input(model, partial(watch, spec.name)))
        yield owners


def shared_inputs(model: nn.Module, linears: Sequence[LinearSpec], ids: torch.Tensor) -> dict[str, str]:
    """Map every layer to the first layer that receives the same input tensor, found by one forward pass.

    An expert that the pass does not call has an input of its own.

    Args:
        model: a causal language model.
        linears: the layers.
        ids: token ids (b, t) int64.

    Raises:
        UnsupportedModelError: the forward pass does not call a layer.
        ModelError: the model's own code fails.
    """
    with (
        watching_inputs(model, linears) as owners,
        torch.inference_mode(),
        forward_errors(model),
        ending_before_head(model),
    ):
        model(input_ids=ids, use_cache=False)
    owners |= {spec.name: spec.name for spec in linears if spec.pool is not None and spec.name not in owners}
    missing = [spec.name for spec in linears if spec.name not in owners]
    if missing:
        raise UnsupportedModelError(
            f"{missing[0]} and {len(missing) - 1} more linear layers were not called by a forward pass",
            "leave them out with --exclude",
        )
    return owners


def input_groups(
    model: nn.Module, linears: Sequence[LinearSpec], ids: torch.Tensor
) -> dict[int, list[list[LinearSpec]]]:
    """Return block → groups of its layers with the same input, in the order of the forward pass.

    Args, Raises: as of :func:`shared_inputs`.
    """
    specs = {spec.name: spec for spec in linears}
    groups: dict[int, dict[str, list[LinearSpec]]] = {}
    for name, leader in shared_inputs(model, linears, ids).items():
        groups.setdefault(specs[name].layer, {}).setdefault(leader, []).append(specs[name])
    return {layer: list(found.values()) for layer, found in groups.items()}


def steps_of(groups: Sequence[Sequence[LinearSpec]]) -> list[list[LinearSpec]]:
    """Return which layers of a block are observed together, in the order of the forward pass.

    Args:
        groups: of layers with the same input, from :func:`input_groups`.

    Returns:
        The groups; those of all experts are one, as one pass shows their inputs.
    """
    steps: dict[str, list[LinearSpec]] = {}
    for specs in groups:
        steps.setdefault(specs[0].pool or specs[0].name, []).extend(specs)
    return list(steps.values())


def collect_moments(
    runner: BlockRunner,
    linears: Sequence[LinearSpec],
    owners: Mapping[str, str],
    report: Reporter = SILENT,
    total: Total = of_one_process,
) -> dict[str, InputStats]:
    """Run calibration text through some blocks and return the input statistics of ``linears``.

    A pass ends after the last block that contains one of the layers, so it never reaches the head.

    Args:
        runner: holds the model and the windows.
        linears: the layers.
        owners: from :func:`shared_inputs`.
        report: progress.
        total: completes the sums if other processes read further windows.

    Returns:
        Statistics by name of the leading layer (see ``owners``), of those that ``total`` leaves.

    Raises:
        NumericalError: an activation is NaN or infinite.
    """
    sums = {owners[spec.name]: InputAccumulator(spec.n, runner.device) for spec in linears}
    first, last = min(spec.layer for spec in linears), max(spec.layer for spec in linears)
    with ExitStack() as hooks:
        for name, accumulator in sums.items():
            hooks.enter_context(WeightRef(name).on_input(runner.model, accumulator.add))
        with report.bar(f"Reading inputs of blocks {first + 1} to {last + 1}", runner.windows) as bar:
            if runner.windows:
                runner.forward(first, last, bar.advance)
    pools = pooled(sums, linears)
    for found in (sums, pools):
        total(found)
    return averages(sums, "inputs of", priors(pools, linears))


def pooled(sums: Mapping[str, InputAccumulator], linears: Sequence[LinearSpec]) -> dict[str, InputAccumulator]:
    """Return the sums over all experts of each pool.

    Args:
        sums: by layer; those of several experts may be one, and count once.
        linears: the layers.
    """
    pools: dict[str, InputAccumulator] = {}
    for spec in linears:
        if spec.pool is not None and spec.name in sums:
            found = sums[spec.name]
            pool = pools.setdefault(spec.pool, InputAccumulator(len(found.gram), found.gram.device))
            pool.add_sums(found)
    return pools


def priors(pools: Mapping[str, InputAccumulator], linears: Sequence[LinearSpec]) -> dict[str, InputAccumulator]:
    """Return layer → sums of its pool, of the experts among ``linears``."""
    return {spec.name: pools[spec.pool] for spec in linears if spec.pool is not None and spec.pool in pools}


def averages(
    sums: dict[str, InputAccumulator], what: str, prior: Mapping[str, InputAccumulator] | None = None
) -> dict[str, InputStats]:
    """Return the results of all accumulators; empties ``sums`` to free memory.

    Args:
        sums: by layer.
        what: was summed, for the error, such as ``inputs of``.
        prior: layer → sums towards which its averages are shrunk.

    Raises:
        NumericalError: a sum is NaN or infinite.
    """
    for name, accumulator in sums.items():
        if not accumulator.is_finite:
            raise NumericalError(
                f"the {what} {name} hold NaN or infinity",
                "try --dtype float32; if that fails too, the model is broken",
            )
    return {name: sums.pop(name).result((prior or {}).get(name)) for name in list(sums)}
