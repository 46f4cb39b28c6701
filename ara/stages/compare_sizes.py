"""``ara compare --size``: measure every form of the model at some sizes, on held-out calibration text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ara.allocation.forms import FORMS, Form
from ara.allocation.sized import SizedAllocator
from ara.artifacts.comparison import SIZES_PICTURE_FILE, ComparisonResults, SizedModel
from ara.config import CompareConfig
from ara.config.allocate import SizedConfig
from ara.config.recover import LEAST_SAMPLES, NO_RECOVERY
from ara.config.sizes import bytes_in, few_bits
from ara.errors import AraError, NumericalError, UsageError
from ara.jsonfile import dump
from ara.recovery import levels_to_run
from ara.reporting.figures import size_curves
from ara.solver.file_sizes import check_room
from ara.solver.problem import DENSE, Allocation
from ara.stages.allocate_bytes import open_sized_allocator, other_bytes, saved_bytes
from ara.stages.common import Run, begin, default_name, embedding_words, open_task
from ara.stages.recover import training_placement
from ara.stages.recovered_forms import FormRepairs
from ara.stages.stored_ranks import stored_ranks
from ara.stages.tuning import placed
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter

if TYPE_CHECKING:
    import torch

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

    Every weight is rounded on the inputs of the dense model, as in the guard of ``ara allocate --size``. With a level
    of recovery, every form that can be repaired is also measured repaired (:mod:`ara.stages.recovered_forms`).

    Args:
        config: with sizes.
        run: workspace and reporter.
        factors: name of the decomposition; the latest by default.
        name: of the result; made from the sizes by default.

    Raises:
        AraError: no decomposition, a size without room for the factorised layers, or an unknown level.
    """
    started = begin(name, factors)
    with open_task("compare", run, started) as work:
        decomposition = work.workspace.require("factors", factors)
        stored_ranks(decomposition).need_all(f"--size {config.size[0]}", "give --keep instead")
        run.report.step(f"Comparing ranks and bits at {', '.join(config.size)}")
        resolved, repairs = placed(config, run), None
        if config.recover != NO_RECOVERY:
            resolved = resolved.model_copy(update={"dtype": training_placement(config).dtype})
            repairs = FormRepairs(resolved, decomposition, work.workspace, run)
        words = [*config.size, *embedding_words(few_bits(config.embedding_bits))]
        if repairs is not None:
            words.append(config.recover)
        settings = resolved.model_dump(mode="json", include=_SETTINGS)
        work.describe(
            name or default_name(decomposition.name, "sizes", *words, layout=config.layout),
            settings | ({"recovery": repairs.settings} if repairs else {}),
            [decomposition],
        )
        if (done := work.done()) is not None:
            return done
        others = Others(other_bytes(decomposition), saved_bytes(resolved, decomposition, run))
        for size in config.size:
            check_room(int(bytes_in(size)), others.rounded, f"--size {size}")
        with work.writer(seed=config.seed, resumable=True) as stage:
            windows = repairs.windows if repairs else None
            bits = {width for form in FORMS.values() for width in form.bits}
            sized = open_sized_allocator(resolved, tuple(bits), decomposition, work.workspace, run, windows)
            models = _measure_all(config.size, sized, others, stage, run)
            if repairs is not None:
                fitting = (one for one in _wanted(config.size) if models[one.key].held_out is not None)
                allocations = {one.key: (one.form, _allocation(one, sized, others)) for one in fitting}
                # Two models fit into memory more often than three.
                del sized
                models = _measure_repaired(models, allocations, repairs, stage, run)
            _draw(models, stage)
            ComparisonResults(models=models).write_file(stage)
        return work.view()


def refuse_with_sizes(config: CompareConfig, masks: str | None) -> None:
    """Check that nothing is given that only a comparison of allocators takes, and that the repairs are possible.

    Raises:
        UsageError: something is, there is no such level of recovery, or it has too few windows.
    """
    unset = CompareConfig()
    only = ("methods", "objective", "tasks", "eval_seq_len", "max_windows", "eval_batch_size")
    given = [name for name in only if getattr(config, name) != getattr(unset, name)]
    given += ["keep"] * ("keep" in config.model_fields_set) + ["masks"] * (masks is not None)
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(
            f"--size and {flags} are given together",
            "a comparison of sizes has no budget of parameters, and measures held-out calibration text only",
        )
    if config.recover != NO_RECOVERY:
        levels_to_run(config.recover, only=False)
        if config.samples < LEAST_SAMPLES:
            raise UsageError(
                f"--recover {config.recover} needs {LEAST_SAMPLES} windows to learn from, got {config.samples}",
                f"give --samples {LEAST_SAMPLES} or more",
            )


@dataclass(frozen=True)
class _Wanted:
    """One model to measure.

    Attributes:
        key: name of the model.
        form: how it is made.
        size: that it is made for; ``None`` for a dense model of one width.
    """

    key: str
    form: Form
    size: str | None

    @property
    def limit(self) -> int | None:
        """Bytes of the size."""
        return None if self.size is None else int(bytes_in(self.size))


def _wanted(sizes: tuple[str, ...]) -> Iterator[_Wanted]:
    """Yield every model that is not repaired: the dense ones first, then size by size."""
    for name, form in FORMS.items():
        if not form.sized:
            yield _Wanted(name, form, None)
    for size in sizes:
        for name, form in FORMS.items():
            if form.sized:
                yield _Wanted(f"{name}-{size}", form, size)


def _measure_all(
    sizes: tuple[str, ...], sized: SizedAllocator, others: Others, stage: StageWriter, run: Run
) -> dict[str, SizedModel]:
    """Measure every model not measured yet, without repairs; returns all of them."""
    models = dict(ComparisonResults.parse(stage.results).models or {})
    for wanted in _wanted(sizes):
        if wanted.key in models:
            run.report.fact(f"{wanted.key} was measured by an interrupted run")
            continue
        model = SizedModel(wanted.form.title, wanted.size, wanted.limit)
        try:
            model = _measured(wanted, model, sized, others)
        except (NumericalError, UsageError) as error:
            # NaN, or a form that does not fit, is a result and does not stop the others.
            model = _failed(wanted.key, model, error, run)
        _keep(wanted.key, model, models, stage)
    return models


def _measured(wanted: _Wanted, model: SizedModel, sized: SizedAllocator, others: Others) -> SizedModel:
    """Return a model with its choices, its size and its losses."""
    form, allocation = wanted.form, _allocation(wanted, sized, others)
    losses = sized.rounder.loss(wanted.key, allocation, form.method == "nearest", form.rounds)
    counts = Counter(str(choice.bits) for choice in allocation.choices.values())
    described = replace(
        model,
        bytes=others.of(form) + allocation.cost,
        layers=dict(sorted(counts.items())),
        dense_layers=allocation.dense_count(),
    )
    return _with_losses(described, losses)


def _allocation(wanted: _Wanted, sized: SizedAllocator, others: Others) -> Allocation:
    """Choose ranks and bits of a model.

    Raises:
        UsageError: the smallest choices need more bytes.
    """
    rest = others.of(wanted.form)
    if wanted.limit is not None:
        check_room(wanted.limit, rest, f"--size {wanted.size}")
    return sized.of_form(wanted.form, (wanted.limit or 0) - rest)


def _measure_repaired(
    models: Mapping[str, SizedModel],
    allocations: Mapping[str, tuple[Form, Allocation]],
    repairs: FormRepairs,
    stage: StageWriter,
    run: Run,
) -> dict[str, SizedModel]:
    """Repair every model that can be repaired, and measure it.

    Args:
        models: all models without repairs, and repaired ones of an interrupted run.
        allocations: form, ranks and bits of the models to repair.
        repairs: makes them.
        stage: keeps what is finished.
        run: reporter.

    Returns:
        All models, each one before its repaired one.
    """
    found = dict(models)
    for key, (form, allocation) in allocations.items():
        repaired = _repaired(key)
        if repaired in found:
            run.report.fact(f"{repaired} was measured by an interrupted run")
        elif repairs.levels_of(form, allocation):
            run.report.step(f"Recovering {key}")
            model = replace(found[key], title=f"{form.title}, recovered")
            try:
                losses, levels = repairs.losses(repaired, form, allocation, stage)
                model = replace(_with_losses(model, losses), recovered=levels)
            except NumericalError as error:
                model = _failed(repaired, replace(model, held_out=None, window_nlls=()), error, run)
            _keep(repaired, model, found, stage)
            stage.drop_work(f"{repaired}.")
    in_order = [name for key in models for name in (key, _repaired(key))]
    return {name: found[name] for name in in_order if name in found}


def _repaired(key: str) -> str:
    """Return the key of a model after its repair."""
    return f"{key}-recovered"


def _keep(key: str, model: SizedModel, models: dict[str, SizedModel], stage: StageWriter) -> None:
    """Store the figures of a model."""
    models[key] = model
    ComparisonResults(models=models).write(stage)
    stage.text(f"{key}.json", dump(model.plain(), key))


def _failed(key: str, model: SizedModel, error: AraError, run: Run) -> SizedModel:
    run.report.warn(f"{key}: {error}")
    return replace(model, error=str(error))


def _with_losses(model: SizedModel, losses: torch.Tensor) -> SizedModel:
    """Return a model with the losses of all held-out windows, (w) float64.

    Raises:
        NumericalError: their mean is NaN or infinite.
    """
    held_out = float(losses.mean())
    if not math.isfinite(held_out):
        raise NumericalError(f"a loss of {held_out} on held-out text", "try --dtype float32")
    return replace(model, held_out=held_out, window_nlls=tuple(losses.tolist()))


def _draw(models: Mapping[str, SizedModel], stage: StageWriter) -> None:
    """Write the picture of all measured models."""
    dense = models[DENSE].held_out
    if dense is None:
        raise NumericalError("the dense model has no finite loss on held-out text", "try --dtype float32")
    curves: dict[str, dict[float, float]] = {}
    repaired = set()
    for key, model in models.items():
        if key != DENSE and model.bytes is not None and model.held_out is not None:
            curves.setdefault(model.title, {})[model.bytes / 1e6] = math.exp(model.held_out)
            if model.recovered is not None:
                repaired.add(model.title)
    picture = size_curves(curves, math.exp(dense), "Held-out calibration text", repaired)
    (stage.folder / SIZES_PICTURE_FILE).write_bytes(picture)
