"""``ara compare --size``: measure every form of the model at some sizes, on held-out calibration text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ara.allocation.forms import FORMS, Form
from ara.allocation.sized import SizedAllocator
from ara.artifacts.comparison import SIZES_PICTURE_FILE, ComparisonResults, SizedModel
from ara.config import CompareConfig
from ara.config.allocate import SizedConfig
from ara.config.sizes import bytes_in, few_bits
from ara.errors import NumericalError, UsageError
from ara.jsonfile import dump
from ara.reporting.figures import size_curves
from ara.solver.problem import DENSE
from ara.stages.allocate_bytes import check_room, open_sized_allocator, other_bytes, saved_bytes
from ara.stages.common import Run, begin, default_name, open_task
from ara.stages.tuning import placed
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter

# Fields of the config that mean something here.
_SETTINGS = {"size", *SizedConfig.model_fields}


@dataclass(frozen=True)
class Others:
    """Bytes of everything that is not a factorised layer.

    Attributes:
        plain: with the embedding and the head as they are.
        saved: by how many bytes these two become smaller in the models that are rounded.
    """

    plain: int
    saved: int

    @property
    def rounded(self) -> int:
        """Bytes in a model that is rounded."""
        return self.plain - self.saved

    def of(self, form: Form) -> int:
        """Return the bytes in a model of a form."""
        return self.rounded if form.rounds else self.plain


def compare_sizes(config: CompareConfig, run: Run, *, factors: str | None = None, name: str | None = None) -> StageView:
    """Choose ranks and bits in every form and measure the rounded weights; an interrupted run resumes.

    Every weight is rounded on the inputs of the dense model, as in the guard of ``ara allocate --size``. No model is
    repaired.

    Args:
        config: with sizes.
        run: workspace and reporter.
        factors: name of the decomposition; the latest by default.
        name: of the result; made from the sizes by default.

    Raises:
        AraError: no decomposition, or a size without room for the factorised layers.
    """
    started = begin(name, factors)
    with open_task("compare", run, started) as work:
        decomposition = work.workspace.require("factors", factors)
        run.report.step(f"Comparing ranks and bits at {', '.join(config.size)}")
        resolved = placed(config, run)
        ends = [] if few_bits(config.embedding_bits) is None else [f"embedding{config.embedding_bits}"]
        work.describe(
            name or default_name(decomposition.name, "sizes", *config.size, *ends, layout=config.layout),
            resolved.model_dump(mode="json", include=_SETTINGS),
            [decomposition],
        )
        if (done := work.done()) is not None:
            return done
        others = Others(other_bytes(decomposition), saved_bytes(resolved, decomposition, run))
        for size in config.size:
            check_room(int(bytes_in(size)), others.rounded, f"--size {size}")
        with work.writer(seed=config.seed, resumable=True) as stage:
            bits = {width for form in FORMS.values() for width in form.bits}
            sized = open_sized_allocator(resolved, tuple(bits), decomposition, work.workspace, run)
            models = _measure_all(config.size, sized, others, stage, run)
            _draw(models, stage)
            ComparisonResults(models=models).write_file(stage)
        return work.view()


def refuse_with_sizes(config: CompareConfig, masks: str | None) -> None:
    """Check that nothing is given that only a comparison of allocators takes.

    Raises:
        UsageError: something is.
    """
    unset = CompareConfig()
    only = ("methods", "tasks", "eval_seq_len", "max_windows", "eval_batch_size")
    given = [name for name in only if getattr(config, name) != getattr(unset, name)]
    given += ["keep"] * ("keep" in config.model_fields_set) + ["masks"] * (masks is not None)
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(
            f"--size and {flags} are given together",
            "a comparison of sizes has no budget of parameters, and measures held-out calibration text only",
        )


def _wanted(sizes: tuple[str, ...]) -> Iterator[tuple[str, Form, str | None]]:
    """Yield key, form and size of every model: the dense ones first, then size by size."""
    for name, form in FORMS.items():
        if not form.sized:
            yield name, form, None
    for size in sizes:
        for name, form in FORMS.items():
            if form.sized:
                yield f"{name}-{size}", form, size


def _measure_all(
    sizes: tuple[str, ...], sized: SizedAllocator, others: Others, stage: StageWriter, run: Run
) -> dict[str, SizedModel]:
    """Measure every model not measured yet; returns all of them."""
    models = dict(ComparisonResults.parse(stage.results).models or {})
    for key, form, size in _wanted(sizes):
        if key in models:
            run.report.fact(f"{key} was measured by an interrupted run")
            continue
        model = SizedModel(form.title, size, None if size is None else int(bytes_in(size)))
        try:
            model = _measured(key, form, model, sized, others)
        except (NumericalError, UsageError) as error:
            # NaN, or a form that does not fit, is a result and does not stop the others.
            run.report.warn(f"{key}: {error}")
            model = replace(model, error=str(error))
        models[key] = model
        ComparisonResults(models=models).write(stage)
        stage.text(f"{key}.json", dump(model.plain(), key))
    return models


def _measured(key: str, form: Form, model: SizedModel, sized: SizedAllocator, others: Others) -> SizedModel:
    """Return a model with its figures."""
    rest = others.of(form)
    if model.size is not None and model.limit is not None:
        check_room(model.limit, rest, f"--size {model.size}")
    allocation = sized.of_form(form, (model.limit or 0) - rest)
    losses = sized.rounder.loss(key, allocation, form.method == "nearest", form.rounds)
    held_out = float(losses.mean())
    if not math.isfinite(held_out):
        raise NumericalError(f"a loss of {held_out} on held-out text", "try --dtype float32")
    counts = Counter(str(choice.bits) for choice in allocation.choices.values())
    return replace(
        model,
        bytes=rest + allocation.cost,
        layers=dict(sorted(counts.items())),
        dense_layers=allocation.dense_count(),
        held_out=held_out,
        window_nlls=tuple(losses.tolist()),
    )


def _draw(models: Mapping[str, SizedModel], stage: StageWriter) -> None:
    """Write the picture of all measured models."""
    dense = models[DENSE].held_out
    if dense is None:
        raise NumericalError("the dense model has no finite loss on held-out text", "try --dtype float32")
    curves: dict[str, dict[float, float]] = {}
    for key, model in models.items():
        if key != DENSE and model.bytes is not None and model.held_out is not None:
            curves.setdefault(model.title, {})[model.bytes / 1e6] = math.exp(model.held_out)
    picture = size_curves(curves, math.exp(dense), "Held-out calibration text")
    (stage.folder / SIZES_PICTURE_FILE).write_bytes(picture)
