"""Speed of several models in one interleaved run: seconds per pass, tokens per second, and ratios to the first model.

In every round all models do one pass of a case, in rotating order. So a temporary slowdown of the machine affects all
models. The first round is a warm-up and does not count.

Shapes: b batch, p past tokens, s new tokens.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from ara.errors import UnsupportedModelError
from ara.evaluation.cost import Case, Cost, count_model
from ara.evaluation.timing import Spread, synchronize, turns
from ara.models.accounting import parameter_count, weight_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

K = TypeVar("K", bound=Hashable)
# Bootstrap samples, and coverage of the interval.
_RESAMPLES, _COVERAGE = 10_000, 0.95


@dataclass(frozen=True)
class Prepared:
    """A case that is ready to run.

    Attributes:
        run: does one pass and returns when it has finished.
        rewind: restores the caches to their state before the pass; not timed.
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
        """Arithmetic cost of a pass."""

    def prepare(self, case: Case) -> Prepared:
        """Fill the caches with ``case.past`` positions."""


class TorchRunner:
    """A model of transformers in torch.

    Args:
        model: in evaluation mode, on its device.
        last_logits: compute only the logits of the last position, as generation does, if the model supports it.
        call: callable to use instead of ``model``, such as its compiled form.
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
            UnsupportedModelError: the model has no caches that can be restored.
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
                f"{type(self._model).__name__} has no key-value cache, so decoding cannot be measured",
                "measure only prefill: --decode ''",
            )
        # A pass makes new tensors, so shallow copies suffice. Cropping cannot restore what windowed layers dropped.
        before = [copy.copy(layer) for layer in layers]

        def rewind() -> None:
            cache.layers[:] = [copy.copy(layer) for layer in before]

        return Prepared(lambda: self._pass(new, cache), rewind)

    @torch.inference_mode()
    def _pass(self, ids: torch.Tensor, cache: Any) -> Any:
        """Read ids (b, s) after the positions in ``cache``; return the cache when the device has finished."""
        result = self._call(input_ids=ids, past_key_values=cache, use_cache=True, **self._options)
        synchronize(ids.device)
        return getattr(result, "past_key_values", None)


def interleaved_seconds(
    runners: Mapping[str, Runner],
    case: Case,
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Return the seconds of every model in every round; each model is prepared once.

    Args:
        runners: by name.
        case: what to measure.
        rounds: number of rounds, without the warm-up round.
        clock: returns the time in seconds.
        advance: called after every pass.
    """
    prepared = {name: runner.prepare(case) for name, runner in runners.items()}
    return seconds_in_turn(prepared, rounds, clock=clock, advance=advance)


def seconds_in_turn(
    prepared: Mapping[K, Prepared],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[[], object] = lambda: None,
) -> dict[K, list[float]]:
    """Return the seconds of every pass in every round; see :func:`interleaved_seconds` for the arguments."""
    seconds: dict[K, list[float]] = {name: [] for name in prepared}
    for number, names in turns(prepared, rounds):
        for name in names:
            begun = clock()
            prepared[name].run()
            passed = clock() - begun
            prepared[name].rewind()
            if number:
                # The clock may be too coarse for a tiny model.
                seconds[name].append(max(passed, 1e-9))
            advance()
    return seconds


def ratio(base: Sequence[float], other: Sequence[float]) -> Spread:
    """Return the speed-up of ``other`` over ``base``: median over the rounds, and its 95 % interval.

    The interval is a percentile bootstrap of the median (Efron & Tibshirani, An Introduction to the Bootstrap, 1993,
    chapter 13), with a fixed seed.

    Args:
        base: seconds per round of the reference model.
        other: seconds of the other model in the same rounds.
    """
    ratios = np.array(base) / np.array(other)
    draws = np.random.default_rng(0).integers(len(ratios), size=(_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2])
    return Spread(float(np.median(ratios)), float(low), float(high))
