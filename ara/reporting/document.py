"""The report as data: ``report.json``, and all that the HTML page and the model card say.

Sizes are counts of parameters or bytes, times seconds, losses nats per token, shares fractions of 1. What was not
measured is ``None`` or an empty tuple, never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from ara.layout_names import LayoutName
from ara.workspace.tensors import Size

REPORT_FORMAT: Literal[3] = 3


class Part(BaseModel):
    """Base of all parts: immutable, strict about names, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)


class Base(Part):
    """The dense model; ``requested`` is what it was asked for as, ``fingerprint`` says which one it is."""

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
    text: str
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
    """Losses of the candidates on held-out calibration text, and which one was handed out.

    ``behind`` is how much worse than the winner each candidate is, ``stderr`` the standard error of that over windows.
    """

    winner: str
    held_out: Mapping[str, float | None]
    behind: Mapping[str, float | None]
    stderr: Mapping[str, float | None]


class Allocated(Part):
    """The ranks; ``keep`` is the budget that was asked for, the other figures are what came out."""

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
    """The checkpoint; ``dense_weight_bytes`` are those of the dense model, ``disk_keep`` the share that is left."""

    name: str
    dtype: str
    densified: bool
    low_rank_layers: int
    dense_layers: int
    dense_weight_bytes: int
    disk_bytes: int
    disk_keep: float


class Layer(Part):
    """One factorised layer.

    Attributes:
        rank: kept; ``None`` when it stays dense.
        keep: share of its parameters that stays.
        left: share of the sum of its spectrum that is cut off: its squared error, in the metric of the decomposition.
        components: which components ``spectrum`` lists, from 1 to r.
        spectrum: their values, as shares of the sum over all components.
    """

    name: str
    layer: int
    kind: str
    m: int
    n: int
    rank: int | None
    keep: float
    left: float
    components: tuple[int, ...]
    spectrum: tuple[float, ...]


class Step(Part):
    """One step of a training; ``loss`` is the objective, ``held_out`` the loss on held-out text, where it was read."""

    step: int
    loss: float | None
    keep: float
    held_out: float | None


class Curve(Part):
    """The training at one budget; ``won`` is how much the held-out loss has fallen since the start."""

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


class Spread(Part):
    """Median of repeated measurements, and their range: 10th to 90th percentile unless said otherwise."""

    median: float
    low: float
    high: float


class ModelSize(Part):
    """One model of an evaluation."""

    name: str
    parameters: int
    weight_bytes: int
    disk_bytes: int | None
    linear_keep: float
    model_keep: float


class Difference(Part):
    """Mean difference of two models over the same windows or questions, and how sure it is."""

    difference: float
    stderr: float | None = None
    p: float | None = None
    test: str | None = None


class TextRow(Part):
    """One model on one text.

    Attributes:
        stderr: of ``nll``, over windows.
        speed: tokens read per second.
        ratio: speed relative to the dense model where they were run in turn, with the widest range that the two
            spreads allow: the slowest tenth against the fastest, and the other way round.
        kl: divergence of its next-token distributions from the dense model's, nats per token.
        agreement: share of tokens where both find the same next one most likely.
    """

    nll: float
    stderr: float | None
    perplexity: float
    speed: Spread | None
    ratio: Spread | None
    kl: float | None
    kl_stderr: float | None
    agreement: float | None


class TextResult(Part):
    """All models on one text; ``over_uniform`` is the chosen model's NLL less that of uniform ranks."""

    task: str
    origin: str | None
    sha256: str | None
    windows: int
    seq_len: int
    models: Mapping[str, TextRow]
    over_uniform: Difference | None


class HarnessRow(Part):
    """One model on one zero-shot task; ``retained`` is relative to the dense model."""

    value: float
    stderr: float | None
    retained: float | None


class HarnessResult(Part):
    """All models on one zero-shot task: ``examples`` of ``of`` questions; ``compared`` is chosen less another.

    ``sha256`` is over all questions of the task.
    """

    task: str
    metric: str
    sha256: str | None
    examples: int | None
    of: int | None
    seed: int | None
    models: Mapping[str, HarnessRow]
    compared: Mapping[str, Difference]


class ZeroShot(Part):
    """Mean over several zero-shot tasks."""

    tasks: tuple[str, ...]
    models: Mapping[str, HarnessRow]
    compared: Mapping[str, Difference]


class Continuation(Part):
    """What every model made of a prompt."""

    prompt: str
    models: Mapping[str, str]


class Evaluated(Part):
    """One result of ``ara eval``; the dense model comes first, ``chosen`` names the compressed one."""

    name: str
    chosen: str
    device: str | None
    dtype: str | None
    interleaved: bool | None
    models: tuple[ModelSize, ...]
    texts: tuple[TextResult, ...]
    harness: tuple[HarnessResult, ...]
    zero_shot: ZeroShot | None
    continuations: tuple[Continuation, ...]


class BenchModel(Part):
    """One model of a benchmark."""

    parameters: int | None
    weight_bytes: int | None
    disk_bytes: int | None
    peak_memory_bytes: int | None


class BenchRow(Part):
    """One model in one case.

    Attributes:
        ratio: how many times as fast as dense, where they were run in turn.
        predicted: what arithmetic says of it.
        macs: multiply-accumulates of a pass; a FLOP count is twice that.
        bytes_read: weights and past keys and values that a pass reads.
    """

    seconds: Spread | None
    tokens_per_second: Spread | None
    ratio: Spread | None
    predicted: float | None
    macs: int | None
    bytes_read: float | None


class BenchCase(Part):
    """One case of a benchmark: ``new`` tokens behind ``past`` ones."""

    kind: str
    batch: int
    past: int
    new: int
    models: Mapping[str, BenchRow]


class Machine(TypedDict, total=False):
    """Where a benchmark was run, as far as it says; a later version may say more."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False)  # type: ignore[misc]
    system: str | None
    processor: str | None
    cores: int | None
    memory_bytes: Size | None
    gpus: tuple[str, ...]


class Benched(Part):
    """One result of ``ara bench``.

    Attributes:
        precision: of the weights that were run.
        machine: on which it ran, see :func:`ara.environment.machine`; earlier versions did not record it.
    """

    name: str
    chosen: str
    backend: str | None
    device: str | None
    precision: str | None
    threads: int | None
    machine: Machine | None
    interleaved: bool | None
    models: Mapping[str, BenchModel]
    cases: tuple[BenchCase, ...]


class AllocatorRow(Part):
    """One allocator of a comparison; ``error`` when it failed."""

    held_out: float | None
    perplexity: Mapping[str, float]
    gap_closed: Mapping[str, float | None]
    dense_layers: int | None
    seconds: float | None
    backward_passes: int | None
    error: str | None


class Compared(Part):
    """One result of ``ara compare``."""

    name: str
    keep: float
    layout: LayoutName
    tasks: tuple[str, ...]
    methods: Mapping[str, AllocatorRow]


class ParityRow(Part):
    """An exported graph beside torch, run in one way."""

    case: str
    tokens: int
    difference: float
    agreement: float
    kl: float
    nll_torch: float
    nll_onnx: float


class Exported(Part):
    """One result of ``ara export``; ``parity`` is empty when the graph was not compared."""

    name: str
    precision: str
    provider: str | None
    graph_bytes: int | None
    parity: tuple[ParityRow, ...]


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
    ratio: Spread
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
    """One stage of the chain, to be repeated by its command."""

    key: str
    id: str
    created: str
    command: str
    device: str | None
    dtype: str | None
    seconds: float
    peak_memory_bytes: int


class Missing(Part):
    """What the report lacks, and the command that adds it."""

    what: str
    command: str


class Report(Part):
    """The whole document; :mod:`ara.reporting.gather` makes it."""

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
    exports: tuple[Exported, ...] = ()
    work: tuple[Work, ...]
    versions: Mapping[str, tuple[str, ...]]
    missing: tuple[Missing, ...] = ()
