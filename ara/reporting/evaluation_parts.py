"""Parts of the report about ``ara eval``: losses on texts, answers in chat, zero-shot tasks, continuations."""

from __future__ import annotations

from collections.abc import Mapping

from ara.artifacts.evaluation import ContinuedPrompt, SpreadFigures
from ara.reporting.part import Part


class ModelSize(Part):
    """One model of an evaluation."""

    name: str
    parameters: int
    weight_bytes: int
    disk_bytes: int | None
    linear_keep: float
    model_keep: float


class Difference(Part):
    """Mean difference of two models over the same windows or questions, its standard error, or its p-value and test."""

    difference: float
    stderr: float | None = None
    p: float | None = None
    test: str | None = None


class TextRow(Part):
    """One model on one text.

    Attributes:
        stderr: of ``nll``, over windows.
        speed: tokens read per second.
        ratio: speed relative to the dense model, where the models took turns. The range is the widest that the two
            spreads allow: 10th percentile over 90th, and 90th over 10th.
        kl: divergence of its next-token distributions from the dense model's, nats per token.
        agreement: share of positions where both models predict the same most likely token.
    """

    nll: float
    stderr: float | None
    perplexity: float
    speed: SpreadFigures
    ratio: SpreadFigures | None
    kl: float | None
    kl_stderr: float | None
    agreement: float | None


class TextResult(Part):
    """All models on one text; ``over_uniform`` is the chosen model's NLL less that with uniform ranks."""

    task: str
    origin: str | None
    sha256: str | None
    windows: int
    seq_len: int
    models: Mapping[str, TextRow]
    over_uniform: Difference | None


class ChatRow(Part):
    """One model on conversations: distance from the dense model on their answers, and how many answers are empty."""

    kl: float | None
    kl_stderr: float | None
    agreement: float | None
    empty: int


class ChatResult(Part):
    """All models on held-out conversations; ``sample`` says what was measured.

    Other fields as in :class:`ara.artifacts.evaluation.ChatResults`.
    """

    task: str
    origin: str | None
    sha256: str | None
    sample: str
    conversations: int
    of: int
    seed: int
    too_long: int
    seq_len: int
    dense_answers: int
    answer_tokens: int
    max_new_tokens: int
    models: Mapping[str, ChatRow]


class HarnessRow(Part):
    """One model on one zero-shot task; ``retained`` is relative to the dense model."""

    value: float
    stderr: float | None
    retained: float | None


class HarnessResult(Part):
    """All models on one zero-shot task: ``examples`` of ``of`` questions.

    ``compared`` has the chosen model's value less that of each other model. ``sha256`` is over all questions.
    """

    task: str
    metric: str
    sha256: str | None
    examples: int
    of: int
    seed: int
    models: Mapping[str, HarnessRow]
    compared: Mapping[str, Difference]


class ZeroShot(Part):
    """Mean over several zero-shot tasks."""

    tasks: tuple[str, ...]
    models: Mapping[str, HarnessRow]
    compared: Mapping[str, Difference]


class Evaluated(Part):
    """One result of ``ara eval``; the dense model comes first, ``chosen`` names the compressed one.

    ``runtime`` is ``None`` if the models ran in torch.
    """

    name: str
    chosen: str
    device: str | None
    dtype: str | None
    interleaved: bool
    models: tuple[ModelSize, ...]
    texts: tuple[TextResult, ...]
    harness: tuple[HarnessResult, ...]
    zero_shot: ZeroShot | None
    continuations: tuple[ContinuedPrompt, ...]
    chats: tuple[ChatResult, ...] = ()
    runtime: str | None = None
