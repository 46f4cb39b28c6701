"""Speed of several models in one interleaved run: seconds per pass, tokens per second, and ratios to the first model.

All models do one pass of a case after the other, in rotating order, round after round, so that a slow spell of the
machine hits all of them. The first round warms up and does not count.

Shapes: b batch, p past tokens, s new tokens.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from ara.errors import UnsupportedModelError
from ara.evaluation.cost import Case, Cost, count_model
from ara.models.accounting import parameter_count, weight_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of the bootstrap: resamples, and the share of their medians that the interval covers.
_RESAMPLES = 10_000
_COVERAGE = 0.95


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one model is as another: median over the rounds, and its 95 % interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Prepared:
    """A case made ready.

    Attributes:
        run: does one pass and returns when it is done.
        rewind: puts the caches back to where they were before the pass; not timed.
    """

    run: Callable[[], object]
    rewind: Callable[[], object] = lambda: None


class Runner(Protocol):
    """A model in a runtime."""

    @property
    def parameters(self) -> int:
        """Number of parameters."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory."""

    @property
    def cost(self) -> Cost:
        """What a pass costs by the arithmetic."""

    def prepare(self, case: Case) -> Prepared:
        """Fill caches with ``case.past`` positions."""


class TorchRunner:
    """A model of transformers in torch.

    Args:
        model: in evaluation mode, on its device.
        last_logits: ask for the logits of the last position only, as generation does, where the model can.
        call: what is called instead of ``model``, such as its compiled form.
    """

    def __init__(
        self, model: PreTrainedModel, *, last_logits: bool = True, call: Callable[..., Any] | None = None
    ) -> None:
        self._model, self._call = model, model if call is None else call
        can = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if last_logits and can else {}
        self.parameters, self.weight_bytes = parameter_count(model), weight_bytes(model)
        self.cost = count_model(model, last_logits=bool(self._options))

    def prepare(self, case: Case) -> Prepared:
        """Read ``case.past`` tokens into the model's own kind of cache.

        Raises:
            UnsupportedModelError: the model keeps no caches that can be put back.
        """
        generator = torch.Generator().manual_seed(0)
        vocabulary = self._model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (case.batch, case.past + case.new), generator=generator)
        prompt, new = ids.to(self._model.device).split([case.past, case.new], 1)
        if not case.past:
            return Prepared(lambda: self._pass(new, None))
        cache = self._pass(prompt, None)
        layers = getattr(cache, "layers", None)
        if layers is None:
            raise UnsupportedModelError(
                f"{type(self._model).__name__} has no caches of keys and values to decode behind",
                "measure prefill alone: --decode ''",
            )
        # A pass appends to a layer by making new tensors. Cropping would not do: windowed layers drop what they leave.
        before = [copy.copy(layer) for layer in layers]

        def rewind() -> None:
            cache.layers[:] = [copy.copy(layer) for layer in before]

        return Prepared(lambda: self._pass(new, cache), rewind)

    @torch.inference_mode()
    def _pass(self, ids: torch.Tensor, cache: Any) -> Any:
        """Read ids (b, s) behind ``cache``; return the cache, once the device has finished."""
        result = self._call(input_ids=ids, past_key_values=cache, use_cache=True, **self._options)
        synchronize(ids.device)
        return getattr(result, "past_key_values", None)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU: its kernels run on after the call that started them has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def interleaved_seconds(
    runners: Mapping[str, Runner],
    case: Case,
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Return seconds per model and round, the models in turn within a round; each is prepared once.

    Args:
        runners: by name.
        case: what they do.
        rounds: that count; one more goes before.
        clock: seconds.
        advance: told after every pass.
    """
    prepared = {name: runner.prepare(case) for name, runner in runners.items()}
    names = list(runners)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            begun = clock()
            prepared[name].run()
            passed = clock() - begun
            prepared[name].rewind()
            if number:
                # A clock may be too coarse for a tiny model.
                seconds[name].append(max(passed, 1e-9))
            advance()
    return seconds


def ratio(base: Sequence[float], other: Sequence[float]) -> Ratio:
    """Return how many times as fast as ``base`` the ``other`` model was.

    The interval is that of the median by the percentile bootstrap (Efron & Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13), with a fixed seed.

    Args:
        base: seconds per round of the model that is compared with.
        other: seconds of the other one in the same rounds.
    """
    ratios = np.array(base) / np.array(other)
    draws = np.random.default_rng(0).integers(len(ratios), size=(_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2])
    return Ratio(float(np.median(ratios)), float(low), float(high))
