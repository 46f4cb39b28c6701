"""Puts the few matrices of an int8 graph that cost most into 16 bits, until the graph is near enough to torch.

Such a matrix has neither rounded weights nor rounded inputs. Keeping its weights in 8 bits and computing with exact
inputs would save bytes, but the error of the weights stays, and on a CPU ONNX Runtime then expands the whole matrix in
every pass, which takes longer than multiplying by a float32 one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from ara.errors import NumericalError
from ara.progress import Reporter
from export.onnx.export_report import ExportReport, Fallback
from export.onnx.graph import EMBEDDING
from export.onnx.proof import Reference, compare_graph
from export.onnx.rounding_cost import rounding_costs
from export.onnx.stored_weights import Checkpoint
from export.onnx.tolerance import Parity, Tolerance, all_misses

# Windows of calibration text that costs are measured on, each as long as the windows of the comparison.
_WINDOWS = 4
# The first attempt is expected to reach this share of the allowed KL: costs are estimates, and texts differ.
_MARGIN = 0.8


@dataclass(frozen=True)
class Candidate:
    """A matrix that could be in 8 bits.

    Attributes:
        path: of its module.
        weights: number of its weights.
        cost: of rounding it, nats per token.
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
    """Write an int8 graph again with more and more matrices in 16 bits, until it is within the tolerance.

    The number of attempts is at most 2 + log₂ of the number of matrices. The last one has all of them in 16 bits.

    Args:
        write: writes the graph with the given matrices in 16 bits in place of the existing one.
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
    order = candidates(reference, inputs=before.execution_provider == "cpu")
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
        report.fact(f"KL {worst_kl(found):.2g} nats with {count} of {len(order)} matrices in 16 bits")
        if not all_misses(found, tolerance):
            break
    return about, found


def candidates(reference: Reference, *, inputs: bool) -> list[Candidate]:
    """Return the matrices of a checkpoint that are not stored in few bits; the largest cost per weight comes first.

    In this order a KL is reached with the fewest bytes.

    Args:
        reference: the checkpoint.
        inputs: whether the runtime rounds the inputs of a matrix as well.

    Raises:
        DataError: the calibration text is too short.
        NumericalError: a cost is NaN or infinite.
    """
    model = reference.load()
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    paths = [path for path in paths if _owner(reference.checkpoint, path) not in reference.checkpoint.rounded]
    costs = rounding_costs(model, reference.windows("calibration", _WINDOWS), paths, inputs=inputs)
    found = [Candidate(path, model.get_submodule(path).weight.numel(), cost) for path, cost in costs.items()]
    if not all(0 <= one.cost < float("inf") for one in found):
        raise NumericalError(
            "what 8 bits cost cannot be measured: a gradient is NaN or infinite", "export with --precision fp32"
        )
    return sorted(found, key=lambda one: (-one.cost / one.weights, one.path))


def attempts(costs: Sequence[float], kl: float, allowed: float) -> Iterator[int]:
    """Yield how many of the first matrices to put into 16 bits, until the caller stops.

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


def _owner(checkpoint: Checkpoint, path: str) -> str:
    """Return the path that the checkpoint stores the matrix of a module under; a tied head has none of its own."""
    return path if checkpoint.has(f"{path}.weight") else EMBEDDING


def _size(about: ExportReport) -> int:
    return sum(record.bytes for record in about.files.values())
