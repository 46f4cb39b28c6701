"""Perplexity as in the compression papers, and speed, of several models in one interleaved run.

    NLL of a window  = −1/(t−1) Σ_{i<t} ln p(x_{i+1} | x_1 … x_i)      nats per predicted token
    perplexity       = exp(mean of the windows' NLL)

This is GPTQ's evaluation (arXiv 2210.17323), also used by SVD-LLM (arXiv 2403.07378). All windows have one length, so
the mean of their means is the mean over all predicted tokens. Likelihoods are exact for every dtype and processor
(:mod:`ara.models.likelihood`): a log-softmax in bfloat16 has errors of about 0.5 %, too coarse to compare models.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from ara.distributed.group import ALONE, Group
from ara.errors import NAN_HINT, NumericalError
from ara.evaluation.divergence import Divergence, DivergenceSum, summarise_divergence
from ara.evaluation.timing import Spread, spread, synchronize
from ara.models.likelihood import summed_nll
from ara.models.loading import forward_errors
from ara.models.scores import Head, Scores
from ara.progress import SILENT, Reporter


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of one model on one text.

    Attributes:
        nll: mean negative log-likelihood, nats per predicted token.
        perplexity: exp(nll).
        windows: number of windows.
        tokens: predicted tokens, windows · (seq_len − 1).
        seq_len: tokens per window.
        nll_stderr: standard error of ``nll`` over windows, nats; ``None`` for a single window.
        window_nlls: NLL of each window, nats per predicted token.
    """

    nll: float
    perplexity: float
    windows: int
    tokens: int
    seq_len: int
    nll_stderr: float | None
    window_nlls: tuple[float, ...]


@dataclass(frozen=True)
class VariantRun:
    """Results of one model in an interleaved run.

    Attributes:
        result: its perplexity.
        tokens_per_second: tokens per second of forward pass: median, 10th and 90th percentile over batches.
        divergence: from the reference model; ``None`` for the reference itself.
    """

    result: PerplexityResult
    tokens_per_second: Spread
    divergence: Divergence | None = None


def summarise(window_nlls: Sequence[float], seq_len: int, who: str = "the model") -> PerplexityResult:
    """Turn the windows' mean NLLs into a perplexity.

    Args:
        window_nlls: nats per predicted token, one per window, at least one.
        seq_len: tokens per window.
        who: the model, for the error.

    Raises:
        NumericalError: a window's NLL is not finite, or the perplexity overflows.
    """
    _check_finite(window_nlls, range(len(window_nlls)), who)
    nll = math.fsum(window_nlls) / len(window_nlls)
    try:
        perplexity = math.exp(nll)
    except OverflowError:
        raise NumericalError(
            f"the perplexity overflows: the mean negative log-likelihood is {nll:,.1f} nats per token",
            "check the weights of the model, or use a larger --keep",
        ) from None
    windows = len(window_nlls)
    stderr = statistics.stdev(window_nlls) / math.sqrt(windows) if windows > 1 else None
    return PerplexityResult(nll, perplexity, windows, windows * (seq_len - 1), seq_len, stderr, tuple(window_nlls))


@dataclass
class _Reading:
    """What a process has measured of one model: of its windows in their order, and of its batches."""

    nlls: list[float] = field(default_factory=list)
    distances: list[tuple[float, float]] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)

    @property
    def warm_speeds(self) -> list[float]:
        """Speeds without the first batch, unless it is the only one."""
        return self.speeds[1:] or self.speeds


def interleaved_perplexity(
    models: Mapping[str, torch.nn.Module],
    windows: torch.Tensor,
    *,
    batch_size: int = 1,
    reference: str | None = None,
    report: Reporter = SILENT,
    label: str = "Perplexity",
    group: Group = ALONE,
) -> dict[str, VariantRun]:
    """Run several models over the same windows; every batch is run by all models before the next one.

    So a temporary slowdown of the machine affects all models. Their order rotates from batch to batch. The reference is
    alternately first and second. Of large logits only chunks exist (:mod:`ara.models.scores`). Only forward passes are
    timed. The first batch, which warms up caches and kernels, is left out of the speed unless it is the only one. Each
    model runs in eval mode on the device of its first parameter.

    Args:
        models: causal language models by name; called with ``input_ids`` and ``use_cache=False``, they return an
            object with ``logits`` (b, t, v).
        windows: (w, t) int64 token ids.
        batch_size: windows per forward pass.
        reference: name of the model from which the divergence of all others is measured; ``None``: no divergence.
        report: receives progress.
        label: of the progress bar.
        group: processes that share the windows; each has all models. Speeds are those of one process.

    Returns:
        The results by model; nothing in other processes than the first.

    Raises:
        NumericalError: a model gives a non-finite NLL or divergence; names the model and the window.
    """
    mine = group.share(len(windows), batch_size).tolist()
    readings = _read(models, windows, mine, batch_size, reference, report, label)
    found = group.collect((mine, readings))
    return {name: _joined([(own, rows[name]) for own, rows in found], windows) for name in models} if found else {}


def _joined(parts: Sequence[tuple[list[int], _Reading]], windows: torch.Tensor) -> VariantRun:
    """Return the results of one model from those of all processes, each with the indices of its windows."""
    nlls = [0.0] * len(windows)
    distances: list[tuple[float, float] | None] = [None] * len(windows)
    for mine, reading in parts:
        for place, index in enumerate(mine):
            nlls[index] = reading.nlls[place]
            distances[index] = reading.distances[place] if reading.distances else None
    apart = [distance for distance in distances if distance is not None]
    speeds = [speed for _, reading in parts for speed in reading.warm_speeds]
    return VariantRun(summarise(nlls, windows.shape[1]), spread(speeds), summarise_divergence(apart) if apart else None)


def _read(
    models: Mapping[str, torch.nn.Module],
    windows: torch.Tensor,
    mine: list[int],
    batch_size: int,
    reference: str | None,
    report: Reporter,
    label: str,
) -> dict[str, _Reading]:
    """Run the models over the windows ``mine``; other arguments as of :func:`interleaved_perplexity`."""
    names = [name for name in models if name != reference]
    readings = {name: _Reading() for name in models}
    batches = windows[mine].split(batch_size) if mine else ()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for model in models.values():
            stack.enter_context(_evaluating(model))
        bar = stack.enter_context(report.bar(label, len(mine) * len(models)))
        heads = {name: Head(model) for name, model in models.items()}
        for number, batch in enumerate(batches):
            found = _read_batch(heads, batch, _order(names, reference, number), reference, bar.advance)
            for name, (nlls, distances, seconds) in found.items():
                reading = readings[name]
                _check_finite(nlls, mine[len(reading.nlls) :], f"model {name!r}")
                what = f"KL divergence from {reference}"
                kls = [kl for kl, _ in distances]
                _check_finite(kls, mine[len(reading.distances) :], f"model {name!r}", what)
                reading.nlls += nlls
                reading.distances += distances
                reading.speeds.append(batch.numel() / seconds)
    return readings


def _order(names: Sequence[str], reference: str | None, number: int) -> list[str]:
    """Return the order of the models in batch ``number``; ``names`` are all except the reference."""
    # With a reference the rotation moves every two batches, so that every model precedes it equally often.
    turn = (number if reference is None else (number + 1) // 2) % max(1, len(names))
    order = [*names[turn:], *names[:turn]]
    if reference is not None:
        order.insert(number % 2 if order else 0, reference)
    return order


def _read_batch(
    heads: Mapping[str, Head],
    batch: torch.Tensor,
    order: Sequence[str],
    reference: str | None,
    advance: Callable[[int], None],
) -> dict[str, tuple[list[float], list[tuple[float, float]], float]]:
    """Run all models over one batch.

    Args:
        heads: of the models by name.
        batch: (b, t) int64.
        order: of the forward passes.
        reference: name of the model from which the divergence of all others is measured.
        advance: called with the number of windows after every pass.

    Returns:
        By model: NLL of every window in nats per predicted token; KL and agreement of every window (nothing for the
        reference, or without one); and the seconds of the forward pass.
    """
    clocks = {name: _Clock(heads[name].model) for name in order}
    scores: dict[str, Scores] = {}
    for name in order:
        ids = batch.to(clocks[name].device)
        with clocks[name].running():
            scores[name] = heads[name].scores(ids)
        advance(len(batch))
    nlls = {name: torch.zeros(len(batch), dtype=torch.float64) for name in order}
    sums = {name: [DivergenceSum() for _ in batch] for name in order if reference is not None and name != reference}
    # Large logits are made in chunks. Those of the reference are made once, before those that are compared with them.
    for place in max((one.places() for one in scores.values()), key=len):
        expected: torch.Tensor | None = None
        for name in sorted(order, key=lambda name: name != reference):
            with clocks[name].running():
                logits = scores[name].at(place)
            nlls[name][place.windows] += summed_nll(logits, place.of(batch[:, 1:]).to(logits.device))
            if name == reference:
                expected = logits
            elif expected is not None:
                for total, ours, theirs in zip(sums[name][place.windows], expected, logits, strict=True):
                    total.add(ours, theirs)
    return {
        name: (
            (nlls[name] / (batch.shape[1] - 1)).tolist(),
            [total.mean() for total in sums.get(name, [])],
            max(clocks[name].seconds, 1e-9),
        )
        for name in order
    }


class _Clock:
    """Adds up the seconds that a model computes.

    Attributes:
        device: of the model.
        seconds: so far.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self.device, self.seconds = model, next(model.parameters()).device, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what runs in this context; errors of the model are explained."""
        synchronize(self.device)
        start = time.perf_counter()
        with forward_errors(self._model):
            yield
            synchronize(self.device)
        self.seconds += time.perf_counter() - start


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in eval mode (no dropout) and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check_finite(
    values: Sequence[float], windows: Sequence[int], who: str, what: str = "negative log-likelihood"
) -> None:
    """Check the values of windows, of which ``windows`` has the indices, and perhaps further ones."""
    for index, value in zip(windows, values, strict=False):
        if not math.isfinite(value):
            raise NumericalError(
                f"{who} gives a {what} of {value} on window {index}; expected a finite number",
                NAN_HINT,
            )
