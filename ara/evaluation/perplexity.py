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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from ara.distributed.group import ALONE, Group
from ara.errors import NAN_HINT, NumericalError
from ara.evaluation.divergence import Divergence, summarise_divergence, window_divergence
from ara.evaluation.timing import Spread, spread, synchronize
from ara.models.likelihood import window_nll
from ara.models.loading import forward_errors
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
    alternately first and second, so that only one other model's logits are kept. Only forward passes are timed. The
    first batch, which warms up caches and kernels, is left out of the speed unless it is the only one. Each model runs
    in eval mode on the device of its first parameter.

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
        for number, batch in enumerate(batches):
            # Logits kept for the divergence: the reference's, or those of the one model that ran before it.
            waiting: dict[str, torch.Tensor] = {}
            for name in _order(names, reference, number):
                logits, values, seconds = _forward(models[name], batch)
                reading = readings[name]
                _check_finite(values, mine[len(reading.nlls) :], f"model {name!r}")
                reading.nlls += values
                reading.speeds.append(batch.numel() / seconds)
                if reference is not None:
                    waiting[name] = logits
                del logits
                for ready in [other for other in waiting if other != reference and reference in waiting]:
                    assert reference is not None
                    found = window_divergence(waiting[reference], waiting.pop(ready))
                    kls, distances = [kl for kl, _ in found], readings[ready].distances
                    what = f"KL divergence from {reference}"
                    _check_finite(kls, mine[len(distances) :], f"model {ready!r}", what)
                    distances += found
                bar.advance(len(batch))
    return readings


def _order(names: Sequence[str], reference: str | None, number: int) -> list[str]:
    """Return the order of the models in batch ``number``; ``names`` are all except the reference."""
    # With a reference the rotation moves every two batches, so that every model precedes it equally often.
    turn = (number if reference is None else (number + 1) // 2) % max(1, len(names))
    order = [*names[turn:], *names[:turn]]
    if reference is not None:
        order.insert(number % 2 if order else 0, reference)
    return order


def _forward(model: torch.nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, list[float], float]:
    """Return logits (b, t, v), NLLs (nats per predicted token) of a batch (b, t), and the forward pass's seconds."""
    ids = batch.to(next(model.parameters()).device)
    synchronize(ids.device)
    start = time.perf_counter()
    with forward_errors(model):
        logits = model(input_ids=ids, use_cache=False).logits
        synchronize(logits.device)
    seconds = time.perf_counter() - start
    return logits, window_nll(logits, ids.to(logits.device)).tolist(), max(seconds, 1e-9)


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
