"""What later stages read of a result's settings and figures, with types: held to it once, when a manifest is read.

A checksum says that a manifest is what somebody wrote, not that it was us. Everything here is asked of a result before
any stage looks at it; what only a table or a report shows is checked where it is shown.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ara.jsonfile import first_problem
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.workspace.manifest import Manifest

Count = Annotated[int, Field(ge=0, lt=2**63)]
Least1 = Annotated[int, Field(ge=1, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
StoredDtype = Literal["float32", "bfloat16", "float16"]


def _keep(budget: str) -> str:
    """Refuse a budget that is no number in (0, 1], as the names of files and tables have it."""
    TypeAdapter(Share).validate_python(float(budget), strict=True)
    return budget


Keep = Annotated[str, AfterValidator(_keep)]
Rank = Least1 | Literal["dense"]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, defer_build=True)


class _Layer(_Part):
    """One factorised layer; see :class:`ara.models.weights.LinearSpec`."""

    model_config = ConfigDict(extra="forbid")
    name: str
    layer: Count
    kind: str
    m: Least1
    n: Least1


class _DecomposeSettings(_Part):
    method: str
    text: str
    samples: Least1
    seq_len: Annotated[int, Field(ge=2, lt=2**63)]
    seed: Count
    dtype: StoredDtype


class _DecomposeFigures(_Part):
    modules: list[_Layer]
    linear_parameters: Count
    model_parameters: Count


class _TrainingSettings(_Part):
    objective: Literal["priced", "paper"]
    layout: LayoutName = DEFAULT_LAYOUT
    samples: Least1
    held_out: Least1
    keep: list[Share]


class _TrainedBudget(_Part):
    ranks: dict[str, Rank]
    start: str = ""
    start_held_out: Number
    held_out: Number
    best_step: Count
    steps: Count
    seconds: Number
    backward_passes: Count


class _TrainingFigures(_Part):
    budgets: dict[Keep, _TrainedBudget] = Field(min_length=1)
    log: dict[Keep, list[dict[str, float | None]]]
    table_seconds: Number
    table_windows: Count
    stopped: str | None = None


class _AllocationSettings(_Part):
    method: str
    layout: LayoutName = DEFAULT_LAYOUT
    keep: Share | None = None
    rank_multiple: Least1
    min_rank: Least1
    min_keep: Annotated[float, Field(ge=0, le=1)]
    exclude: list[str]
    ranks_sha256: str | None = None


class _AllocationFigures(_Part):
    linear_parameters: Count
    linear_keep: Number
    model_parameters: Count
    model_keep: Number
    dense_layers: Count


class _TruncationSettings(_Part):
    dtype: StoredDtype


class _TruncationFigures(_Part):
    linear_keep: Number
    model_keep: Number
    low_rank_layers: Count
    dense_layers: Count
    parameters: Count
    dense_weight_bytes: Least1
    disk_bytes: Count


class _ExportFigures(_Part):
    last_logits: bool


class _ComparedMethod(_Part):
    """A row of a comparison; the figures of its texts are for tables alone."""

    ranks: dict[str, Rank] | None = None
    held_out: Number | None = None
    seconds: Number | None = None
    backward_passes: Count | None = None
    tasks: dict[str, dict[str, Any]] | None = None
    error: str | None = None


class _ComparisonFigures(_Part):
    methods: dict[str, _ComparedMethod]


class _Anything(_Part):
    pass


SCHEMAS: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {
    "decompose": (_DecomposeSettings, _DecomposeFigures),
    "train-masks": (_TrainingSettings, _TrainingFigures),
    "allocate": (_AllocationSettings, _AllocationFigures),
    "truncate": (_TruncationSettings, _TruncationFigures),
    "export": (_Anything, _ExportFigures),
    "compare": (_Anything, _ComparisonFigures),
}


def manifest_problem(manifest: Manifest) -> str | None:
    """Return what is wrong with settings, figures or tensors of a result in one line, or ``None``."""
    if manifest.stage not in SCHEMAS:
        return None
    settings, figures = SCHEMAS[manifest.stage]
    try:
        settings.model_validate(manifest.config)
    except ValidationError as error:
        return f"config: {first_problem(error)}"
    try:
        figures.model_validate(manifest.results)
    except ValidationError as error:
        return f"results: {first_problem(error)}"
    return _layers_problem(manifest) if manifest.stage == "decompose" else None


def unfinished_problem(stage: str, results: dict[str, Any]) -> str | None:
    """Return what is wrong with those figures of an unfinished result that are there, or ``None``."""
    if stage not in SCHEMAS:
        return None
    figures = SCHEMAS[stage][1]
    # Figures that are not there yet are no problem, and neither is a table without entries.
    wanted = {name: results[name] for name in figures.model_fields if results.get(name) not in (None, {})}
    try:
        figures.model_validate(wanted)
    except ValidationError as error:
        wrong = [item for item in error.errors(include_url=False) if item["type"] != "missing" or len(item["loc"]) > 1]
        return f"results: {wrong[0]['msg']}" if wrong else None
    return None


def _layers_problem(manifest: Manifest) -> str | None:
    """Hold every layer to the table of tensors: A (r, n), B (m, r) and spectrum (r), all in the file of its block."""
    seen = set()
    for module in manifest.results["modules"]:
        name, m, n = module["name"], module["m"], module["n"]
        if name in seen:
            return f"results: layer {name!r} is listed twice"
        seen.add(name)
        r = min(m, n)
        for part, shape in (("A", (r, n)), ("B", (m, r)), ("spectrum", (r,))):
            record = manifest.tensors.get(f"{name}.{part}")
            if record is None or record.shape != shape or record.file != f"layer-{module['layer']:03d}.safetensors":
                found = "there is none" if record is None else f"it has {list(record.shape)} in {record.file}"
                return f"results: layer {name!r} needs a tensor {part} of shape {list(shape)}, {found}"
    return None
