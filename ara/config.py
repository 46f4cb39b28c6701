"""One frozen config per stage: what can be set, its unit and its range, said once.

The same descriptions feed ``--help``, the manifests and the docs. Unknown keys are refused. Off is ``None``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ara import bounds
from ara.errors import ProblemsError
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.prompts import check_prompt

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Settings(BaseModel):
    """Base of all configs: immutable, strict about names; every number has bounds, every text can be stored."""

    # Validators are built on first use: `ara --help` reads only names and descriptions.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        bounds.check_text(value)
        return value


class StageConfig(Settings):
    """Base of the configs of stages."""


class MethodOptions(Settings):
    """Options of one method; unknown names are refused, every field says its meaning and range."""


class PlacementConfig(StageConfig):
    """Where and in which precision a model runs."""

    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps; auto takes CUDA when there is one")
    dtype: Dtype = Field(
        "auto", description="precision of the model; auto takes bfloat16 where the hardware multiplies it natively"
    )


class DecomposeConfig(PlacementConfig):
    """``ara decompose``: factor every linear layer once, for every later budget."""

    model: str = Field(description="hub id, local folder, GGUF file or alias (see ara models)")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    method: str = Field("two-sided", description="decomposition (see ara methods)")
    options: dict[str, str] = Field(default_factory=dict, description="options of the method, NAME=VALUE")
    text: str = Field(
        "c4",
        description="calibration text: c4, wikitext2, python-docs or file:PATH[#FIELD] (txt, jsonl, parquet)",
    )
    samples: int = Field(256, ge=1, le=bounds.MAX_WINDOWS, description="calibration windows")
    seq_len: int = Field(512, ge=2, le=bounds.MAX_TOKENS, description="tokens per calibration window")
    batch_size: int = Field(4, ge=1, le=bounds.MAX_BATCH, description="calibration windows per forward pass")
    seed: int = Field(0, ge=0, lt=bounds.SEED_LIMIT, description="seed of the choice of calibration windows")
    exclude: tuple[str, ...] = Field((), description="shell pattern of layers to leave dense, such as '*.down_proj'")
    moment_memory: float | None = Field(
        None,
        ge=bounds.MIN_GIB,
        le=bounds.MAX_GIB,
        description="GiB for second moments held at once; more means fewer passes [default: 1/4 of free]",
    )


class TuningConfig(PlacementConfig):
    """What every stage shares that looks at the model while it chooses ranks.

    The text is that of the decomposition, but other windows of it, so that factors are not judged on what they were
    fitted to.
    """

    samples: int = Field(128, ge=1, le=bounds.MAX_WINDOWS, description="calibration windows to learn ranks from")
    held_out: int = Field(
        32, ge=1, le=bounds.MAX_WINDOWS, description="further calibration windows that candidates are compared on"
    )
    batch_size: int = Field(4, ge=1, le=bounds.MAX_BATCH, description="windows per forward and backward pass")
    seed: int = Field(0, ge=0, lt=bounds.SEED_LIMIT, description="seed of everything random")


class BudgetConfig(StageConfig):
    """What limits the ranks of every layer, and what a rank costs, beside the budget itself."""

    layout: LayoutName = Field(
        DEFAULT_LAYOUT,
        description="storage of a layer of rank k: factors (A and B, k(m+n) parameters) or pivoted "
        "(k rows of BA, the others as combinations of them, k(m+n-k))",
    )
    rank_multiple: int = Field(
        1, ge=1, le=bounds.MAX_RANK, description="ranks are multiples of this (8, 16, 32 or 64 suit GPUs)"
    )
    min_rank: int = Field(1, ge=1, le=bounds.MAX_RANK, description="least rank of a layer")
    min_keep: float = Field(0.0, ge=0, le=1, description="least share of its parameters that each layer keeps")
    exclude: tuple[str, ...] = Field(
        (), description="shell pattern of layers that stay dense within the budget, such as '*.down_proj'"
    )


class AllocateConfig(TuningConfig, BudgetConfig):
    """``ara allocate``: choose a rank, or dense, for every layer under one budget."""

    keep: float | None = Field(
        0.8, gt=0, le=1, description="fraction of the factorised layers' parameters that stays, in (0, 1]"
    )
    method: str = Field(
        "auto",
        description="allocator (see ara methods); auto: ara where masks were trained on the factors, else sensitivity",
    )
    options: dict[str, str] = Field(default_factory=dict, description="options of the method, NAME=VALUE")
    guard: bool = Field(
        True,
        description="let no method that reads text hand out ranks worse on held-out text than uniform or its start",
    )
    ranks_sha256: str | None = Field(None, description="checksum of the ranks file that was read instead of a method")


class MaskTrainingOptions(MethodOptions):
    """How ARA's masks are trained; options of ``--method ara`` and of ``ara train-masks``."""

    objective: Literal["priced", "paper"] = Field(
        "priced", description="priced: hard budget in every step; paper: budget penalty, guidance, rescaling at the end"
    )
    loss: Literal["kl", "ce"] = Field(
        "kl", description="KL divergence to the dense model, or cross-entropy of the text"
    )
    start: Literal["sensitivity", "uniform"] = Field("sensitivity", description="allocation to start from")
    optimiser: Literal["newton", "adam"] = Field(
        "newton", description="of the priced form: newton re-linearises the loss of every rank, adam moves scores"
    )
    steps: int = Field(12, ge=0, le=bounds.MAX_STEPS, description="steps per budget")
    batch: int = Field(16, ge=1, le=bounds.MAX_WINDOWS, description="windows per step")
    rate: float = Field(0.3, gt=0, le=1, description="weight of a new step against the old ones (newton)")
    trust: float = Field(
        0.02,
        gt=0,
        le=1,
        description="largest share of all parameters that the first step may move; falls to a quarter (newton)",
    )
    damping: float = Field(
        1.0, ge=0, le=bounds.MAX_WEIGHT, description="multiple of the curvature; more moves fewer ranks (newton)"
    )
    learning_rate: float = Field(
        0.05,
        ge=bounds.MIN_RATE,
        le=bounds.MAX_RATE,
        description="step size of Adam at the start; falls to a tenth",
    )
    temperature: float = Field(
        1.0,
        ge=bounds.MIN_SLOPE,
        le=bounds.MAX_SLOPE,
        description="of the softmax over atoms; lower moves fewer ranks at once",
    )
    atoms: int = Field(64, ge=2, le=bounds.MAX_ATOMS, description="ranks per layer that a mask is made of")
    average: float = Field(
        0.9, ge=0, lt=1, description="decay of the moving average that is deployed; 0: the last step"
    )
    budget_weight: float = Field(
        100.0, ge=0, le=bounds.MAX_WEIGHT, description="weight of the budget penalty (objective paper)"
    )
    guidance_weight: float = Field(
        10.0, ge=0, le=bounds.MAX_WEIGHT, description="weight of the guidance loss (objective paper)"
    )
    check_every: int = Field(
        2, ge=1, le=bounds.MAX_STEPS, description="steps between checks on held-out text; the best one is kept"
    )


class TrainMasksConfig(TuningConfig, BudgetConfig, MaskTrainingOptions):
    """``ara train-masks``: learn what every rank of every layer is worth."""

    keep: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.8,),
        min_length=1,
        description="budget to train at, in (0, 1]; may be repeated: largest first, the others may go on from it",
    )
    save_every: int = Field(1, ge=1, le=bounds.MAX_STEPS, description="steps between checkpoints to go on from")
    tensorboard: bool = Field(False, description="also write TensorBoard events (needs the package tensorboard)")

    @field_validator("keep")
    @classmethod
    def _largest_first(cls, keep: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(keep), reverse=True))


class CompareConfig(TuningConfig, BudgetConfig):
    """``ara compare``: every allocator at one budget, on the same factors and text."""

    keep: float = Field(0.8, gt=0, le=1, description="fraction of the factorised layers' parameters that stays")
    methods: tuple[str, ...] = Field((), description="allocators to compare, several with commas [default: all]")
    tasks: tuple[str, ...] = Field(
        ("wikitext2", "c4"),
        min_length=1,
        description="wikitext2, c4, python-docs or file:PATH[#FIELD]; several with commas",
    )
    eval_seq_len: int | None = Field(
        None,
        ge=2,
        le=bounds.MAX_TOKENS,
        description="tokens per evaluation window [default: 2048, or the model's limit if that is less]",
    )
    max_windows: int | None = Field(
        None, ge=1, le=bounds.MAX_COUNT, description="evaluate only the first N windows of each text"
    )
    eval_batch_size: int = Field(1, ge=1, le=bounds.MAX_BATCH, description="evaluation windows per forward pass")


class TruncateConfig(StageConfig):
    """``ara truncate``: write the compressed checkpoint."""

    dtype: Dtype = Field("auto", description="precision of the checkpoint; auto takes that of the decomposition")
    densify: bool = Field(False, description="multiply the factors back, for tools that know only dense models")
    # Few digits, so that the number is exact and finite.
    max_shard_size: str = Field(
        "5GB",
        pattern=r"^[0-9]{1,6}(\.[0-9]{1,3})?[KMGT]B$",
        description="largest safetensors file of the checkpoint, such as 500MB",
    )

    @field_validator("max_shard_size")
    @classmethod
    def _some_bytes(cls, size: str) -> str:
        count = float(size[:-2]) * 1000 ** (1 + "KMGT".index(size[-2]))
        if not bounds.MIN_SHARD_BYTES <= count <= bounds.MAX_SHARD_BYTES:
            raise ValueError("expected a size from 1KB to 1000TB")
        return size


class GenerateConfig(PlacementConfig):
    """``ara generate``: continue a text, greedily."""

    backend: str = Field("torch", description="torch: the checkpoint; onnx: the exported graph")
    max_new_tokens: int = Field(200, ge=1, le=bounds.MAX_TOKENS, description="length of the answer, in tokens")
    chat: bool = Field(True, description="put the text into the model's chat template, where it has one")


class EvalConfig(PlacementConfig):
    """``ara eval``: dense, uniform and the chosen model side by side."""

    tasks: tuple[str, ...] = Field(
        ("wikitext2",),
        min_length=1,
        description="texts (wikitext2, c4, python-docs, file:PATH[#FIELD]), tasks of lm-eval, zero-shot for seven; "
        "with commas",
    )
    seq_len: int | None = Field(
        None,
        ge=2,
        le=bounds.MAX_TOKENS,
        description="tokens per window [default: 2048, or the model's limit if that is less]",
    )
    max_windows: int | None = Field(
        None, ge=1, le=bounds.MAX_COUNT, description="evaluate only the first N windows of each text"
    )
    limit: int | None = Field(
        None, ge=1, le=bounds.MAX_COUNT, description="ask only N questions of each task, drawn at random"
    )
    seed: int = Field(0, ge=0, lt=bounds.SEED_LIMIT, description="of that draw")
    batch_size: int = Field(1, ge=1, le=bounds.MAX_BATCH, description="windows, or texts of a task, per forward pass")
    include_path: tuple[str, ...] = Field(
        (),
        description="folder with tasks of your own (as lm_eval --include_path); may be repeated; runs the Python code "
        "that these tasks name",
    )
    backend: str = Field("torch", description="onnx: measure the exported graph in ONNX Runtime, too (see ara export)")
    continuations: int = Field(
        3,
        ge=0,
        le=bounds.MAX_CONTINUATIONS,
        description="beginnings of the first text's documents that every model continues greedily",
    )
    prompt: str | None = Field(None, description="continue this text instead")
    max_new_tokens: int = Field(40, ge=1, le=bounds.MAX_TOKENS, description="length of a continuation, in tokens")

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: str | None) -> str | None:
        return None if value is None else check_prompt(value)


class BenchConfig(PlacementConfig):
    """``ara bench``: speed, memory and size of the dense and the chosen model."""

    prefill: tuple[Annotated[int, Field(ge=1, le=bounds.MAX_TOKENS)], ...] = Field(
        (128, 512),
        max_length=bounds.MAX_CASES,
        description="tokens that are read at once; several with commas, '' for none",
    )
    decode: tuple[Annotated[int, Field(ge=1, le=bounds.MAX_TOKENS)], ...] = Field(
        (512,),
        max_length=bounds.MAX_CASES,
        description="tokens behind which one more is decoded; several with commas, '' for none",
    )
    batch: tuple[Annotated[int, Field(ge=1, le=bounds.MAX_BATCH)], ...] = Field(
        (1, 4), min_length=1, max_length=bounds.MAX_CASES, description="rows at once; several with commas"
    )
    # The range of five values covers a median with 94 % at most, that of six with 97 %.
    rounds: int = Field(
        9, ge=6, le=bounds.MAX_ROUNDS, description="measurements of every model in every case; one more warms up"
    )
    threads: int | None = Field(
        None, ge=1, le=bounds.MAX_THREADS, description="threads of the CPU [default: as many as torch takes]"
    )
    backend: str = Field(
        "torch", description="onnx: the exported graphs in ONNX Runtime, placed as the export says (see ara export)"
    )


def build(config: type[Any], /, **values: Any) -> Any:
    """Build ``config`` from ``values``; all problems are reported at once.

    Raises:
        ProblemsError: a value is out of range or has the wrong type, or a name is unknown.
    """
    try:
        return config(**values)
    except ValidationError as error:
        raise problems(config.__name__, error) from None


def problems(title: str, error: ValidationError) -> ProblemsError:
    """Put pydantic's findings into our words: field, what is wrong, what was got."""
    lines = []
    found = error.errors(include_url=False, include_context=False)
    refused_items = {item["loc"][0] for item in found if len(item["loc"]) > 1}
    for item in found:
        if item["type"] == "too_short" and item["loc"][0] in refused_items:
            continue  # nothing is left of it because its items were refused, which is said already
        name = ".".join(bounds.shown(str(part), quoted=False) for part in item["loc"]) or title
        said = item["msg"].removeprefix("Value error, ")
        lines.append(f"{name.replace('_', '-')}: {said[0].lower()}{said[1:]}, got {bounds.shown(item['input'])}")
    return ProblemsError("these settings cannot be used", lines)


def method_options(options_type: type[Any], values: dict[str, str]) -> Any:
    """Build a method's own options from ``NAME=VALUE`` strings.

    Raises:
        ProblemsError: unknown name, or a value out of range.
    """
    return build(options_type, **values)
