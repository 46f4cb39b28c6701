"""The kind ``evaluation``: dense, uniform and compressed model on texts and on tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool

from ara.artifacts.base import LEFT_OUT, Count, Number, Part, Results, Settings

DENSE, UNIFORM = "dense", "uniform"
# Shown in place of a continuation that has no visible character.
EMPTY_TEXT = "(empty)"


@dataclass(frozen=True)
class EvaluationSettings(Settings):
    """The settings that the report reads."""

    device: str | None = None
    dtype: str | None = None
    text_sha256: Mapping[str, str] | None = None


@dataclass(frozen=True)
class ModelFigures(Part):
    """Sizes of one model; ``disk_bytes`` is known for the compressed checkpoint only."""

    parameters: Count
    weight_bytes: Count
    linear_keep: Number
    model_keep: Number
    disk_bytes: Count | None = field(default=None, metadata=LEFT_OUT)


@dataclass(frozen=True)
class SpreadFigures(Part):
    """Median, 10th and 90th percentile."""

    median: Number
    low: Number
    high: Number


@dataclass(frozen=True)
class DivergenceFigures(Part):
    """Distance from the dense model; see :class:`ara.evaluation.divergence.Divergence`."""

    kl: Number
    kl_stderr: Number | None
    agreement: Number


@dataclass(frozen=True)
class TextFigures(Part):
    """One model on one text; see :class:`ara.evaluation.perplexity.VariantRun`."""

    nll: Number
    perplexity: Number
    windows: Count
    tokens: Count
    seq_len: Count
    nll_stderr: Number | None
    window_nlls: tuple[Number, ...]
    tokens_per_second: SpreadFigures
    divergence: DivergenceFigures | None


@dataclass(frozen=True)
class TextResults(Part):
    """All models on one text; ``text`` names its source."""

    kind: Literal["text"]
    text: str
    windows: Count
    seq_len: Count
    models: Mapping[str, TextFigures]


@dataclass(frozen=True)
class TaskFigures(Part):
    """One model on one task.

    Attributes:
        value, stderr: the task's own metric; no standard error if the metric is not a mean.
        retained: ``value`` as a share of the dense model's.
        metrics, stderrs: all metrics.
    """

    value: Number
    stderr: Number | None
    retained: Number | None
    metrics: Mapping[str, Number]
    stderrs: Mapping[str, Number | None]


@dataclass(frozen=True)
class PairedDifference(Part):
    """The compressed model less another one on the same questions; see :class:`ara.evaluation.paired.Difference`."""

    difference: Number
    p: Number
    test: str


@dataclass(frozen=True)
class TaskResults(Part):
    """All models on one task of lm-eval: ``examples`` of ``of`` questions, drawn with ``seed``."""

    kind: Literal["harness"]
    text: str
    metric: str
    examples: Count
    of: Count
    seed: Count
    models: Mapping[str, TaskFigures]
    compared: Mapping[str, PairedDifference]


@dataclass(frozen=True)
class ChatFigures(Part):
    """One model on conversations; see :mod:`ara.evaluation.chat`.

    Attributes:
        divergence: on the tokens of the answers; ``None`` for the dense model, or if it was not in memory.
        empty: number of empty answers.
    """

    divergence: DivergenceFigures | None
    empty: Count


@dataclass(frozen=True)
class ChatResults(Part):
    """All models on held-out conversations.

    Attributes:
        text: the source of the conversations.
        conversations: number of conversations measured, drawn with ``seed``.
        of: number of conversations in the source.
        seed: random seed.
        too_long: number of drawn conversations that were left out, because they are longer than ``seq_len``.
        seq_len: most tokens of a conversation.
        dense_answers: number of conversations without an answer; the dense model's greedy answer stands in.
        answer_tokens: tokens of all answers that the models have read.
        max_new_tokens: largest length of a generated answer.
    """

    kind: Literal["chat"]
    text: str
    conversations: Count
    of: Count
    seed: Count
    too_long: Count
    seq_len: Count
    dense_answers: Count
    answer_tokens: Count
    max_new_tokens: Count
    models: Mapping[str, ChatFigures]

    @property
    def sample(self) -> str:
        """What was measured, in words."""
        words = f"{self.conversations:,} of {self.of:,} conversations, {self.answer_tokens:,} tokens of answers"
        if self.dense_answers == self.conversations:
            words += ", all of them the dense model's own"
        elif self.dense_answers:
            words += f", {self.dense_answers:,} answers are the dense model's own"
        return f"{words}; {self.too_long:,} longer ones left out" if self.too_long else words


@dataclass(frozen=True)
class MeanFigures(Part):
    """One model's mean accuracy over several tasks of equal weight."""

    mean: Number
    stderr: Number
    retained: Number | None


@dataclass(frozen=True)
class MeanResults(Part):
    """Mean accuracy over ``tasks``."""

    tasks: tuple[str, ...]
    models: Mapping[str, MeanFigures]
    compared: Mapping[str, PairedDifference]


@dataclass(frozen=True)
class ContinuedPrompt(Part):
    """Every model's continuation of a prompt."""

    prompt: str
    models: Mapping[str, str]


@dataclass(frozen=True)
class EvaluationResults(Results):
    """Results of ``ara eval``.

    Attributes:
        chosen: name of the compressed model.
        variants: sizes of all models, the dense one first.
        tasks: texts, tasks and conversations, by name.
        continuations: one per prompt.
        zero_shot: mean accuracy; ``None`` if fewer than two tasks have one.
        interleaved: whether the models took turns.
        runtime: title of the runtime that all models ran in; ``None`` for torch.
    """

    Settings = EvaluationSettings
    vital = False
    chosen: str
    variants: Mapping[str, ModelFigures]
    tasks: Mapping[str, Annotated[TextResults | TaskResults | ChatResults, Field(discriminator="kind")]]
    continuations: tuple[ContinuedPrompt, ...]
    zero_shot: MeanResults | None
    interleaved: StrictBool
    runtime: str | None = field(default=None, metadata=LEFT_OUT)

    @property
    def texts(self) -> dict[str, TextResults]:
        """The texts alone."""
        return {name: task for name, task in self.tasks.items() if isinstance(task, TextResults)}

    @property
    def harness(self) -> dict[str, TaskResults]:
        """The tasks of lm-eval alone."""
        return {name: task for name, task in self.tasks.items() if isinstance(task, TaskResults)}

    @property
    def chats(self) -> dict[str, ChatResults]:
        """The conversations alone."""
        return {name: task for name, task in self.tasks.items() if isinstance(task, ChatResults)}


# Intermediate results of one model, stored while other models are not measured yet.


@dataclass(frozen=True)
class ModelPiece(Part):
    """Sizes and continuations of one model."""

    parameters: Count
    weight_bytes: Count
    linear_keep: Number
    continuations: tuple[str, ...]


@dataclass(frozen=True)
class AnswerPiece(Part):
    """One answer to a question; see :class:`ara.evaluation.harness.Answer`."""

    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class TaskPiece(Part):
    """One model's answers to all questions of a task; see :class:`ara.evaluation.harness.TaskScore`."""

    metrics: Mapping[str, Number]
    stderrs: Mapping[str, Number | None]
    headline: str
    answers: tuple[AnswerPiece, ...]

    def fits(self, metric: str, questions: int) -> bool:
        """Tell whether all ``questions`` have an answer with this metric, a number if the metric is a mean."""
        if metric not in self.metrics or metric not in self.stderrs or len(self.answers) != questions:
            return False
        values = [answer.metrics.get(metric) for answer in self.answers]
        return self.stderrs[metric] is None or all(isinstance(value, int | float) for value in values)

    def values(self, metric: str) -> list[float]:
        """Return the metric of every question, in order."""
        return [float(answer.metrics[metric]) for answer in self.answers]


@dataclass(frozen=True)
class OpeningsPiece(Part):
    """One model's answers to the prompts of conversations.

    Attributes:
        empty: whether the answer is empty, per conversation.
        answers: of the dense model: token ids of its answer where the conversation has none, else ``None``.
    """

    empty: tuple[StrictBool, ...]
    answers: tuple[tuple[Count, ...] | None, ...]


@dataclass(frozen=True)
class DistancesPiece(Part):
    """One model's KL and agreement per conversation; ``None`` for the dense model, or if it was not in memory."""

    distances: tuple[tuple[Number, Number], ...] | None
