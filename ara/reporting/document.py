"""The report as data: ``report.json``, from which the HTML page and the model card are made.

Sizes are counts of parameters or bytes, times are in seconds, losses in nats per token, shares are fractions of 1.
A figure that was not measured is ``None`` or an empty tuple. Parts that hold just what a stage has written are the
dataclasses of :mod:`ara.artifacts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from ara.artifacts.base import Number
from ara.artifacts.benchmark import ModelCost
from ara.artifacts.checkpoint import RecoveryFigures, RoundingFigures
from ara.artifacts.evaluation import ContinuedPrompt, SpreadFigures
from ara.artifacts.factors import FactorisedLayer
from ara.artifacts.graph import ParityCase
from ara.artifacts.report import MissingPart
from ara.layout_names import LayoutName
from ara.workspace.tensors import Size

REPORT_FORMAT: Literal[3] = 3


class Part(BaseModel):
    """Base of all parts: immutable, without unknown names, without NaN; so are the dataclasses that it holds."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        defer_build=True,
        allow_inf_nan=False,
        from_attributes=True,
        revalidate_instances="always",
    )

    @classmethod
    def from_source(cls, source: object, **others: Any) -> Self:
        """Return the part with the fields ``others``; the remaining fields are attributes of ``source``.

        Raises:
            ValidationError: a field has another type.
        """
        same = {name: getattr(source, name) for name in cls.model_fields if name not in others}
        return cls.model_validate({**same, **others})


class Base(Part):
    """The dense model; ``requested`` is the name that the user typed, ``fingerprint`` identifies its weights."""

    name: str
    requested: str
    kind: str
    architecture: str | None
    revision: str | None
    fingerprint: str


class Decomposed(Part):
    """The factors; ``windows`` is (count, tokens) of the calibration text."""

    name: str
    method: str
    text: str | None
    origin: str | None
    windows: tuple[int, int] | None
    dtype: str | None
    seed: int | None


class Kind(Part):
    """Layers of one kind: (m, n), how many, how many of them dense, the ranks of the others, share kept."""

    kind: str
    shape: tuple[int, int]
    layers: int
    dense: int
    rank_min: int | None
    rank_mean: float | None
    rank_max: int | None
    keep: float


class Guard(Part):
    """Losses of the candidates on held-out calibration text, and the chosen one.

    ``behind`` is each candidate's loss less the winner's, ``stderr`` the standard error of this difference.
    """

    winner: str
    held_out: Mapping[str, float | None]
    behind: Mapping[str, float | None]
    stderr: Mapping[str, float | None]


class Allocated(Part):
    """The ranks; ``keep`` is the requested budget, the other figures are the result."""

    name: str
    method: str
    keep: float | None
    layout: LayoutName
    linear_parameters_dense: int
    linear_parameters: int
    linear_keep: float
    model_parameters_dense: int
    model_parameters: int
    model_keep: float
    kinds: tuple[Kind, ...]
    guard: Guard | None


class Stored(Part):
    """The checkpoint.

    Attributes:
        disk_keep: ``disk_bytes`` as a share of the dense model's weights.
        recovery: ``None`` if it was only truncated.
        rounding: ``None`` if it was not rounded to few bits.
        recovery_after_rounding: ``None`` if it was not repaired after that.
    """

    name: str
    dtype: str
    densified: bool
    low_rank_layers: int
    dense_layers: int
    dense_weight_bytes: int
    disk_bytes: int
    disk_keep: float
    recovery: RecoveryFigures | None = None
    rounding: RoundingFigures | None = None
    recovery_after_rounding: RecoveryFigures | None = None


@dataclass(frozen=True)
class Layer(FactorisedLayer):
    """One factorised layer.

    Attributes:
        rank: kept; ``None`` when it stays dense.
        keep: share of its parameters that stays.
        left: share of the sum of its spectrum that is cut off: its squared error, in the metric of the decomposition.
        components: indices of the components that ``spectrum`` lists, from 1 to r.
        spectrum: their values, as shares of the sum over all components.
    """

    rank: int | None
    keep: Number
    left: Number
    components: tuple[int, ...]
    spectrum: tuple[Number, ...]


class Step(Part):
    """One step of a training; ``loss`` is the objective, ``held_out`` the loss on held-out text, where measured."""

    step: int
    loss: float | None
    keep: float
    held_out: float | None


class Curve(Part):
    """The training at one budget; ``won`` is how far the held-out loss has fallen since the start."""

    keep: float
    steps: int
    best_step: int
    start_held_out: float
    held_out: float
    won: float
    seconds: float
    backward_passes: int
    log: tuple[Step, ...]


class Trained(Part):
    """The training that the ranks come from."""

    name: str
    objective: str
    loss: str
    curves: tuple[Curve, ...]


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
    """One result of ``ara eval``; the dense model comes first, ``chosen`` names the compressed one."""

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


class BenchRow(Part):
    """One model in one case.

    Attributes:
        ratio: how many times as fast as dense, where the models took turns.
        predicted: the ratio that arithmetic predicts.
        macs: multiply-accumulates of a pass; a FLOP count is twice that.
        bytes_read: weights and past keys and values that a pass reads.
    """

    seconds: SpreadFigures
    tokens_per_second: SpreadFigures
    ratio: SpreadFigures | None
    predicted: float
    macs: int
    bytes_read: float


class BenchCase(Part):
    """One case of a benchmark: ``new`` tokens after ``past`` tokens in the KV cache."""

    kind: str
    batch: int
    past: int
    new: int
    models: Mapping[str, BenchRow]


class Machine(TypedDict, total=False):
    """The machine of a benchmark, as far as it was recorded; a later version may add keys."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)  # type: ignore[misc]
    system: str | None
    processor: str | None
    cores: int | None
    memory_bytes: Size | None
    gpus: tuple[str, ...]


class Benched(Part):
    """One result of ``ara bench``.

    Attributes:
        precision: of the weights in use.
        machine: see :func:`ara.environment.machine`.
    """

    name: str
    chosen: str
    backend: str
    device: str
    precision: str
    threads: int
    machine: Machine
    interleaved: bool
    models: Mapping[str, ModelCost]
    cases: tuple[BenchCase, ...]


class AllocatorRow(Part):
    """One allocator of a comparison; ``error`` says why it failed."""

    held_out: float | None
    perplexity: Mapping[str, float]
    gap_closed: Mapping[str, float | None]
    dense_layers: int | None
    seconds: float | None
    backward_passes: int | None
    error: str | None


class Compared(Part):
    """One result of ``ara compare --keep``."""

    name: str
    keep: float
    layout: LayoutName
    tasks: tuple[str, ...]
    methods: Mapping[str, AllocatorRow]


class SizedPoint(Part):
    """One form of the model.

    ``size`` is what it was made for, as it was given; ``None`` for a dense model of one width. ``recovered`` has the
    levels that have repaired it; ``None`` if none was tried. A form that does not fit has only its ``error``.
    """

    title: str
    size: str | None
    bytes: int | None
    layers: Mapping[str, int] | None
    dense_layers: int | None
    held_out: float | None
    perplexity: float | None
    recovered: tuple[str, ...] | None = None
    error: str | None


class SizeFront(Part):
    """One result of ``ara compare --size``; ``verdict`` says which form is best for which size."""

    name: str
    layout: LayoutName
    verdict: str
    points: tuple[SizedPoint, ...]


class Exported(Part):
    """One result of ``ara export``; ``parity`` is empty when the graph was not compared.

    Of ``candidates`` matrices, an int8 graph multiplies ``exact`` exactly.
    """

    name: str
    precision: str
    provider: str | None
    graph_bytes: int | None
    exact: int
    candidates: int
    parity: tuple[ParityCase, ...]


class FrontPoint(Part):
    """One model on a perplexity-against-keep front; ``current`` marks the checkpoint of the report."""

    checkpoint: str
    series: str
    linear_keep: float
    model_keep: float
    perplexity: float
    current: bool


class Front(Part):
    """All checkpoints of the same factors on the same windows of one text."""

    task: str
    windows: int
    seq_len: int
    dtype: str | None
    dense: float
    points: tuple[FrontPoint, ...]


class SpeedPoint(Part):
    """One model on a quality-against-speed front; ``ratio`` is speed relative to the dense model of the same run."""

    checkpoint: str
    series: str
    ratio: SpreadFigures
    quality: float
    stderr: float | None
    current: bool


class SpeedFront(Part):
    """Quality against speed; ``measure`` says which quality, ``speed`` which speed."""

    measure: Literal["accuracy", "perplexity"]
    task: str
    speed: str
    points: tuple[SpeedPoint, ...]


class Work(Part):
    """One stage of the chain, and the command that repeats it."""

    key: str
    id: str
    created: str
    command: str
    device: str | None
    dtype: str | None
    seconds: float
    peak_memory_bytes: int


class Report(Part):
    """The whole document, made by :mod:`ara.reporting.gather`."""

    format_version: Literal[3] = REPORT_FORMAT
    title: str
    verdict: str
    base: Base
    decomposition: Decomposed
    allocation: Allocated
    checkpoint: Stored
    layers: tuple[Layer, ...] = ()
    training: Trained | None = None
    evaluations: tuple[Evaluated, ...] = ()
    benches: tuple[Benched, ...] = ()
    fronts: tuple[Front, ...] = ()
    speed_front: SpeedFront | None = None
    comparisons: tuple[Compared, ...] = ()
    size_fronts: tuple[SizeFront, ...] = ()
    exports: tuple[Exported, ...] = ()
    work: tuple[Work, ...]
    versions: Mapping[str, tuple[str, ...]]
    missing: tuple[MissingPart, ...] = ()
