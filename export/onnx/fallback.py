"""Gives the few matrices of an int8 graph that cost most exact products, until the graph is near enough to torch.

The inputs of such a matrix are not rounded. Its weights are in 16 bits, or have the few bits that the checkpoint
stores. Weights that the checkpoint does not round could stay in 8 bits too, but then their error would stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import nn
from transformers.pytorch_utils import Conv1D

from ara.errors import NumericalError
from ara.progress import Reporter
from export.onnx.export_report import ExportReport, Fallback, Provider
from export.onnx.proof import Reference, compare_graph
from export.onnx.quantize import BLOCK
from export.onnx.rounding_cost import Eight, rounding_costs
from export.onnx.stored_weights import Checkpoint
from export.onnx.tolerance import Parity, Tolerance, all_misses

# Windows of calibration text that costs are measured on, each as long as the windows of the comparison.
_WINDOWS = 4
# The first attempt is expected to reach this share of the allowed KL: costs are estimates, and texts differ.
_MARGIN = 0.8
_NOTHING = Eight(weights=False, inputs=None)


@dataclass(frozen=True)
class Candidate:
    """A matrix whose product could be in 8 bits.

    Attributes:
        path: of its module.
        weights: number of its weights.
        cost: of these 8 bits, nats per token.
    """

    path: str
    weights: int
    cost: float


def fall_back(
    write: Callable[[frozenset[str]], ExportReport],
    reference: Reference,
    before: ExportReport,
    cases: Sequence[Parity],
    tolerance: Tolerance,
    report: Reporter,
) -> tuple[ExportReport, list[Parity]]:
    """Write an int8 graph again with more and more exact products, until it is within the tolerance.

    The number of attempts is at most 2 + log₂ of the number of matrices. In the last one all products are exact.

    Args:
        write: writes the graph with exact products of the given matrices in place of the existing one.
        reference: what the graph is compared with.
        before: report on the graph that misses the tolerance.
        cases: its comparison.
        tolerance: of the precision.
        report: progress.

    Returns:
        The report on the last graph, and its comparison, which may still miss the tolerance.

    Raises:
        DataError: the calibration text is too short.
        NumericalError: a weight is beyond the range of float16.
    """
    kl = worst_kl(cases)
    report.fact(f"too far in 8 bits ({all_misses(cases, tolerance)[0]}): measuring what each matrix costs")
    order = candidates(reference, before.execution_provider)
    about, found = before, list(cases)
    for count in attempts([one.cost for one in order], kl, tolerance.kl):
        chosen = order[:count]
        about = write(frozenset(one.path for one in chosen))
        fallback = Fallback(
            matrices={one.path: one.cost for one in chosen},
            candidates=len(order),
            weights=sum(one.weights for one in chosen),
            extra_bytes=_size(about) - _size(before),
            kl=kl,
        )
        about = about.model_copy(update={"fallback": fallback})
        found = compare_graph(reference)
        report.fact(f"KL {worst_kl(found):.2g} nats with {count} of {len(order)} products exact")
        if not all_misses(found, tolerance):
            break
    return about, found


def candidates(reference: Reference, provider: Provider) -> list[Candidate]:
    """Return the matrices at which the graph rounds weights or inputs; the largest cost per weight comes first.

    In this order a KL is reached with the fewest bytes, in the file or in memory.

    Args:
        reference: the checkpoint.
        provider: where the graph runs.

    Raises:
        DataError: the calibration text is too short.
        NumericalError: a cost is NaN or infinite.
    """
    model = reference.load()
    linears = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    what = {path: _eight(reference.checkpoint, path, provider) for path in linears}
    what = {path: eight for path, eight in what.items() if eight != _NOTHING}
    costs = rounding_costs(model, reference.windows("calibration", _WINDOWS), what)
    found = [Candidate(path, model.get_submodule(path).weight.numel(), cost) for path, cost in costs.items()]
    if not all(0 <= one.cost < float("inf") for one in found):
        raise NumericalError(
            "what 8 bits cost cannot be measured: a gradient is NaN or infinite", "export with --precision fp32"
        )
    return sorted(found, key=lambda one: (-one.cost / one.weights, one.path))


def _eight(checkpoint: Checkpoint, path: str, provider: Provider) -> Eight:
    """Return what an int8 graph rounds at the linear module ``path``. On CUDA, MatMulNBits rounds no inputs."""
    rounding = checkpoint.rounded.get(checkpoint.owner(path))
    block = BLOCK if rounding is None else rounding.block
    return Eight(weights=rounding is None, inputs=block if provider == "cpu" else None)


def attempts(costs: Sequence[float], kl: float, allowed: float) -> Iterator[int]:
    """Yield how many of the first matrices to multiply exactly, until the caller stops.

    The first number is the smallest one after which the costs of the others, scaled so that all together are ``kl``,
    are well within what is allowed. Every further number is twice as large; the last one is all.

    Args:
        costs: of the matrices in their order, nats per token.
        kl: measured with all of them in 8 bits, nats per token.
        allowed: largest KL, nats per token.
    """
    total = sum(costs)
    spared = list(accumulate(costs))
    enough = (n for n, sum_ in enumerate(spared, 1) if kl * (total - sum_) <= _MARGIN * allowed * total)
    count = next(enough, len(costs))
    while count < len(costs):
        yield count
        count *= 2
    if costs:
        yield len(costs)


def worst_kl(cases: Sequence[Parity]) -> float:
    """Return the largest KL of a case, nats per token."""
    return max(case.kl for case in cases)


def _size(about: ExportReport) -> int:
    return sum(record.bytes for record in about.files.values())
