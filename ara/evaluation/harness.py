"""Runs lm-eval's tasks on a model in memory and keeps every answer, so that two models can be compared in pairs.

Scoring is lm-eval's own (``HFLM``, ``evaluate``): the figures equal those of its command on the same questions.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ara.distributed.group import ALONE, Group
from ara.errors import NAN_HINT, AraError, DataError, NumericalError, first_line, is_out_of_memory
from ara.evaluation.generation import LogitsCheck, check_logits
from ara.evaluation.silence import silence_lm_eval
from ara.evaluation.tasks import Task, missing_module
from ara.models.context import context_length
from ara.models.silence import silence_transformers
from ara.models.vocabulary import check_tokens, padded_with_row, token_rows
from ara.progress import SILENT, Bar, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The headline of a task is the first of these metrics that it has, else its first metric.
_HEADLINES = ("acc", "exact_match", "f1", "word_perplexity", "perplexity")
_NO_ROW = "the tokenizer was extended and the model was not: omit this task, or use the tokenizer of the model"
# Random seed of lm-eval's command for few-shot examples.
_EXAMPLES_SEED = 1234


@dataclass(frozen=True)
class Answer:
    """One model's answer to one question.

    Attributes:
        document: number of the question.
        digest: lm-eval's hash of the question.
        responses: what lm-eval scored: pairs of log-likelihood (nats) and whether it is greedy, or texts.
        metrics: metric → value: a number, or other data that lm-eval aggregates.
    """

    document: int
    digest: str
    responses: Any
    metrics: dict[str, Any]


@dataclass(frozen=True)
class TaskScore:
    """One model's score on one task.

    Attributes:
        metrics: metric → lm-eval's aggregate over the questions, usually the mean.
        stderrs: metric → standard error of the mean; ``None`` if the aggregate is no mean.
        headline: name of the main metric.
        answers: one per question, by number.
    """

    metrics: dict[str, float]
    stderrs: dict[str, float | None]
    headline: str
    answers: tuple[Answer, ...]


def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    documents: list[int] | None,
    *,
    batch_size: int = 1,
    report: Reporter = SILENT,
    label: str = "Questions",
    group: Group = ALONE,
) -> TaskScore | None:
    """Ask a model the questions of a task, zero-shot unless the task says otherwise.

    Args:
        model: a causal language model in eval mode, or an object that can be called like one.
        tokenizer: of the model.
        task: from :func:`ara.evaluation.tasks.load_tasks`.
        documents: numbers of the questions, ascending; ``None`` for all.
        batch_size: texts per forward pass.
        report: receives progress.
        label: task and model, for the progress bar and for errors.
        group: processes that share the questions; each has the model.

    Returns:
        The score; ``None`` in other processes than the first.

    Raises:
        NumericalError: the model gives NaN; raised at the first such batch.
        DataError: lm-eval cannot ask or score the questions, or one holds a token that the model has no row for.
    """
    if (task.documents if documents is None else len(documents)) < group.size:
        # lm-eval fails in a process without questions.
        if not group.writes:
            return None
        group = ALONE
    return ask_through(lambda: _wrapped(model, tokenizer, batch_size, report, label, group), task, documents, label)


def ask_through(make: Callable[[], Any], task: Task, documents: list[int] | None, label: str) -> TaskScore | None:
    """Ask the questions of a task through a model of lm-eval; results and errors as of :func:`ask`.

    Args:
        make: returns lm-eval's model, which knows the processes.
        task: as for :func:`ask`.
        documents: as for :func:`ask`.
        label: task and model, for errors.
    """
    from lm_eval.evaluator import evaluate

    definition = task.definition
    with _as_before(), silence_transformers(), silence_lm_eval(), _errors(label):
        if definition.get_config("num_fewshot") is None:
            definition.set_config(key="num_fewshot", value=0)
        definition.set_fewshot_seed(seed=_EXAMPLES_SEED)
        found = evaluate(
            lm=make(),
            task_dict={"tasks": {task.name: definition}, "groups": {}, "group_map": {}},
            samples=None if documents is None else {task.name: documents},
            bootstrap_iters=0,
        )
    return None if found is None else _score(found["results"][task.name], found["samples"][task.name], label)


def check_likelihoods(values: Sequence[float], label: str) -> None:
    """Check that log-likelihoods (nats) are finite.

    Args:
        values: one for each text.
        label: task and model, for the error.

    Raises:
        NumericalError: one is not.
    """
    for number, value in enumerate(values):
        if not math.isfinite(value):
            raise NumericalError(
                f"the model gives a log-likelihood of {value} on text {number} of {label}, expected a finite number",
                NAN_HINT,
            )


def _score(results: Mapping[str, Any], samples: list[dict[str, Any]], label: str) -> TaskScore:
    """Convert lm-eval's results ("metric,filter" → figure) and samples; only the first filter of a metric counts.

    Raises:
        DataError: no metric is a number.
        NumericalError: the headline metric is not finite. Other metrics that are not finite are left out.
    """
    first = samples[0]["filter"]
    rows = sorted((row for row in samples if row["filter"] == first), key=lambda row: int(row["doc_id"]))
    found: dict[str, float] = {}
    for key, given in results.items():
        name, comma, _filter = key.partition(",")
        value = _plain(given, finite=False)
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            found.setdefault(name, float(value))
    if not found:
        raise DataError(f"lm-eval gives no number for {label}", "choose a task that has a metric")
    headline = next((name for name in _HEADLINES if name in found), next(iter(found)))
    if not math.isfinite(found[headline]):
        raise NumericalError(f"{headline} of {label} is {found[headline]}, expected a finite number", NAN_HINT)
    metrics = {name: value for name, value in found.items() if math.isfinite(value)}
    answers = tuple(
        Answer(
            int(row["doc_id"]),
            row["doc_hash"],
            _plain(row["filtered_resps"]),
            {name: _plain(row[name]) for name in row["metrics"]},
        )
        for row in rows
    )
    stderrs = {
        name: _stderr([answer.metrics.get(name) for answer in answers], value) for name, value in metrics.items()
    }
    return TaskScore(metrics, stderrs, headline, answers)


def _plain(value: Any, finite: bool = True) -> Any:
    """Convert lm-eval's data (numpy values, tuples, sets) to JSON types; all other types become text.

    Args:
        value: the data.
        finite: turn NaN and infinity into ``None``.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if not finite or math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, finite) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, finite) for item in value]
    return str(value)


def _stderr(values: list[Any], aggregate: float) -> float | None:
    """Return the standard error of the mean, or ``None`` if ``aggregate`` is not the mean of the values."""
    if len(values) < 2 or not all(isinstance(value, int | float) for value in values):
        return None
    mean = statistics.fmean(values)
    if not math.isclose(mean, aggregate, rel_tol=1e-9, abs_tol=1e-12):
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


class _InProcesses:
    """What lm-eval asks a model about its processes.

    Attributes:
        group: the processes that share the questions.
    """

    group: Group = ALONE

    @property
    def rank(self) -> int:
        """Number of this process, which asks every ``world_size``-th question."""
        return self.group.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.group.size

    def all_gather(self, tensor: Any) -> Any:
        """Return the same number of requests for all processes: none of them waits in a pass for another one."""
        return tensor.repeat(self.group.size)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all processes in process 0."""
        return self.group.collect(obj) or None

    def barrier(self) -> None:
        """Wait for nobody: :meth:`gather_object` does."""


def _wrapped(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    report: Reporter,
    label: str,
    group: Group,
) -> Any:
    """Return an lm-eval model around a model in memory, with a progress bar, checks for NaN, and its processes."""
    from lm_eval.models.huggingface import HFLM

    rows = token_rows(model.config)

    class Wrapped(_InProcesses, HFLM):
        """Adds progress and checks to lm-eval's scoring."""

        bar: Bar | None = None

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **options: Any) -> Any:
            with self._counting(len(requests)):
                found = super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)
            check_likelihoods([value for value, _greedy in found], label)
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with self._counting(len(requests)):
                return super().generate_until(requests, disable_tqdm=True)

        @contextmanager
        def _counting(self, texts: int) -> Iterator[None]:
            with report.bar(label, texts) as bar:
                self.bar = bar
                yield
                self.bar = None

        def _model_call(self, inps: Any, **options: Any) -> Any:
            check_tokens(inps, rows, tokenizer, label, _NO_ROW)
            found = super()._model_call(inps, **options)
            check_logits(found, label)
            if self.bar is not None:
                self.bar.advance(len(inps))
            return found

        def _model_generate(self, context: Any, *arguments: Any, **options: Any) -> Any:
            check_tokens(context, rows, tokenizer, label, _NO_ROW)
            checked = [*options.pop("logits_processor", []), LogitsCheck(label)]
            found = super()._model_generate(context, *arguments, logits_processor=checked, **options)
            if self.bar is not None:
                self.bar.advance(len(context))
            return found

        def get_model_info(self) -> dict[str, Any]:
            """Return nothing: a model in memory has no name."""
            return {}

    # By default lm-eval's softmax has the model's dtype: bfloat16 has errors of about 0.5 %, float32 of up to 2e-5 nats
    # per token on some processors (see ara.models.likelihood). Apple's GPUs have no float64.
    exact = "float32" if model.device.type == "mps" else "float64"
    wrapped: Any = Wrapped(
        pretrained=model,
        tokenizer=padded_with_row(tokenizer, rows),
        batch_size=batch_size,
        max_length=context_length(model.config),
        softmax_dtype=exact,
    )
    wrapped.group = group
    return wrapped


@contextmanager
def _errors(label: str) -> Iterator[None]:
    """Add task and model to the errors of lm-eval; errors of ARA and of the system pass unchanged."""
    try:
        yield
    except (AraError, MemoryError, OSError):
        raise
    except ImportError as error:
        raise missing_module(label, error) from error
    except (Exception, SystemExit) as error:  # a task's own code may raise anything
        if is_out_of_memory(error):
            raise
        raise DataError(
            f"lm-eval fails at {label}: {type(error).__name__}: {first_line(error)}",
            "omit this task (finished tasks are kept), or check whether `lm_eval run` fails too",
        ) from error


@contextmanager
def _as_before() -> Iterator[None]:
    """Restore the state of all random generators, which lm-eval seeds."""
    import torch

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
