"""The plan: what every stage takes on this machine, and the least machine that works."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ara.allocation.uniform import Uniform
from ara.config import (
    DecomposeConfig,
    EvalConfig,
    PlanConfig,
    RecoverConfig,
    TrainMasksConfig,
    TruncateConfig,
    TuningConfig,
    build,
)
from ara.config.recover import LEAST_SAMPLES
from ara.config.sizes import DEFAULT_BLOCKS, FewBitsConfig, bytes_in, few_bits
from ara.decomposition import DECOMPOSITIONS
from ara.decomposition.base import Decomposition
from ara.errors import UsageError
from ara.files import existing_folder
from ara.layouts.grid import BITS, Grid
from ara.models.context import check_window, window_length
from ara.models.disk import storing
from ara.models.embeddings import find_embeddings
from ara.models.memory import Place, available_bytes, place_of_weights
from ara.models.placement import choose_placement, dtype_to_store, torch_dtype
from ara.models.sources import ModelSource, resolve
from ara.planning.needs import STAGES, Need, Needs, Settings, recover
from ara.planning.probe import Speed, probe
from ara.planning.shape import ModelShape, read_shape
from ara.planning.sizes import StoredWeights, checkpoint_bytes, pages_of, stored_weights
from ara.progress import SILENT, Reporter
from ara.solver.file_sizes import bytes_beside, bytes_saved, check_room
from ara.solver.problem import Budget, Module
from ara.solver.stored_ranks import StoredRanks, planned_ranks


@dataclass(frozen=True)
class StagePlan:
    """One stage on this machine.

    Attributes:
        stage: its command.
        optional: whether the pipeline is complete without it.
        memory_bytes: peak resident memory, with the pages of files that it reads.
        least_memory_bytes: memory with which it works at all, more slowly.
        place: where the weights of its models are, see :func:`ara.models.memory.place_of_weights`.
        disk_bytes: what it leaves on the disk.
        scratch_bytes: what it writes beside that and removes at its end.
        flops: of products and eigenproblems.
        seconds: estimated time; ``None`` without a probe.
    """

    stage: str
    optional: bool
    memory_bytes: int
    least_memory_bytes: int
    place: Place
    disk_bytes: int
    scratch_bytes: int
    flops: float
    seconds: float | None


@dataclass(frozen=True)
class Plan:
    """What compressing a model will take.

    Attributes:
        model: as it was asked for.
        architecture: its class.
        device, dtype: of the run.
        why: reason for these, in words.
        parameters: of the model; a tied weight counts once.
        linear_parameters: of the layers that are factorised.
        embedding_parameters: of the embedding and the head.
        kept_parts: path → parameters of the parts outside the language model, which stay as they are.
        layers: number of layers that are factorised.
        blocks: number of decoder blocks.
        weight_bytes: of the model in the run's dtype.
        stored_dtype: of factors and checkpoints.
        stored_bytes: of the dense model in that dtype.
        weights: where its weights are now.
        converted_bytes: copy of the weights in the run's dtype that is written to the cache, as they do not fit into
            memory (ara.models.offload); 0 if there is none, or if it is there already.
        max_keep: ranks above this share of a layer's parameters are not stored, so that ``recover`` cannot be planned;
            ``None`` if all are.
        keep: fraction of the factorised layers' parameters that stays; ``None`` for a size.
        size: bytes of the weight files after rounding; ``None`` without a size.
        checkpoint_bytes: weight files of the compressed model, before rounding; at most, if a size is given.
        stages: in their order.
        free_memory, free_disk: bytes that are free now.
        least_memory, least_disk: bytes of the least machine that works.
        speed: of this machine; ``None`` without a probe.
    """

    model: str
    architecture: str
    device: str
    dtype: str
    why: str
    parameters: int
    linear_parameters: int
    embedding_parameters: int
    kept_parts: Mapping[str, int]
    layers: int
    blocks: int
    weight_bytes: int
    stored_dtype: str
    stored_bytes: int
    weights: StoredWeights
    converted_bytes: int
    max_keep: float | None
    keep: float | None
    size: int | None
    checkpoint_bytes: int
    stages: tuple[StagePlan, ...]
    free_memory: int
    free_disk: int
    least_memory: int
    least_disk: int
    speed: Speed | None

    def plain(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        return asdict(self)


def make_plan(config: PlanConfig, root: Path, report: Reporter = SILENT) -> Plan:
    """Plan the compression of a model; no weight is read or downloaded.

    Args:
        config: model, budget, text, device.
        root: folder of the workspace, which need not exist.
        report: progress.

    Raises:
        AraError: the model is not found or not supported, or the budget cannot be met.
    """
    DECOMPOSITIONS.entry(config.method)
    _check_budget(config)
    placement = choose_placement(config.device, config.dtype)
    report.step(f"Planning {config.model}")
    source = resolve(config.model, revision=config.revision, report=report, needs_weights=False)
    source = source.with_experts(config.share_experts)
    check_window(config.seq_len, source.config)
    report.fact("reading the shape of the model; no weight is read")
    stored_dtype = dtype_to_store(placement, config.dtype, source.own_dtype)
    dtypes = {"dtype": torch_dtype(placement.dtype), "stored": torch_dtype(stored_dtype)}
    shape = read_shape(source, seq_len=config.seq_len, exclude=config.exclude, layout=config.layout, **dtypes)
    shape = replace(shape, specs=tuple(storing(shape.specs, config.max_keep)))
    stored = planned_ranks("the decomposition", shape.specs, config.max_keep)
    _check_ranks(config, stored, shape, report)
    size = None if config.size is None else _checked_size(config, source, shape)
    settings = _settings(config, source, shape, placement.device.startswith("cuda"))
    weights = stored_weights(source, shape.parameters, shape.dtype)
    folder, speed = existing_folder(root), None
    if config.probe:
        report.fact("measuring this machine")
        speed = probe(shape, placement.device, config.batch_size * config.seq_len, folder)
    free = available_bytes(placement.device)
    pages = pages_of(source, weights, shape, placement.device == "cpu", free)
    # The level that is planned for, closed, needs all ranks.
    possible = [needs for needs in STAGES if not (needs is recover and stored.lacking)]
    stages = tuple(stage_plan(needs, shape, settings, free, pages.mapped, speed) for needs in possible)
    required = [stage for stage in stages if not stage.optional]
    written = sum(stage.disk_bytes for stage in required) + (size or 0)
    return Plan(
        model=config.model,
        architecture=source.identity.architecture,
        device=placement.device,
        dtype=placement.dtype,
        why=placement.why,
        parameters=shape.parameters,
        linear_parameters=shape.linear,
        embedding_parameters=shape.embeddings,
        kept_parts=shape.kept,
        layers=len(shape.specs),
        blocks=shape.blocks,
        weight_bytes=shape.weight_bytes,
        stored_dtype=stored_dtype,
        stored_bytes=shape.parameters * shape.stored.itemsize,
        weights=weights,
        max_keep=config.max_keep if stored.lacking else None,
        keep=config.keep if size is None else None,
        size=size,
        checkpoint_bytes=checkpoint_bytes(shape, settings.ranks),
        stages=stages,
        free_memory=free,
        free_disk=shutil.disk_usage(folder).free,
        least_memory=max(stage.least_memory_bytes for stage in required),
        converted_bytes=pages.copied,
        least_disk=written
        + max(stage.scratch_bytes for stage in required)
        + weights.download
        + weights.unpacked
        + pages.copied,
        speed=speed,
    )


def _check_budget(config: PlanConfig) -> None:
    """Check that there is one budget.

    Raises:
        UsageError: there are two.
    """
    if config.size is not None and config.keep is not None and "keep" in config.model_fields_set:
        raise UsageError(f"--keep {config.keep:g} and --size {config.size} are given together", "give one budget")


def _check_ranks(config: PlanConfig, stored: StoredRanks, shape: ModelShape, report: Reporter) -> None:
    """Check that the budget can be met with the ranks that will be stored.

    Raises:
        UsageError: it needs others.
    """
    if config.size is not None:
        stored.need_all(f"--size {config.size}", "give --keep instead")
    elif config.keep is not None:
        stored.check_keep(shape.specs, config.keep, report)


def _checked_size(config: PlanConfig, source: ModelSource, shape: ModelShape) -> int:
    """Return the size in bytes.

    Raises:
        UsageError: the smallest choices of the layers need more, or the rest of the model alone.
    """
    assert config.size is not None
    limit, bits = int(bytes_in(config.size)), 8 * shape.stored.itemsize
    zero_points = FewBitsConfig().zero_points
    others = bytes_beside(shape.parameters - shape.linear, shape.specs)
    if (ends := few_bits(config.embedding_bits)) is not None:
        embeddings = find_embeddings(source.empty_model())
        others -= bytes_saved(embeddings, bits, Grid(ends, DEFAULT_BLOCKS[0], zero_points))
    check_room(limit, others, f"--size {config.size}")
    grids = [Grid(width, block, zero_points) for width in BITS for block in DEFAULT_BLOCKS]
    Budget.for_bytes(shape.specs, limit - others, grids, (bits, *BITS))
    return limit


def _settings(config: PlanConfig, source: ModelSource, shape: ModelShape, on_gpu: bool) -> Settings:
    """Return the configs of the stages, and uniform ranks for the budget.

    Raises:
        UsageError: the budget cannot be met.
    """
    ranks: dict[str, int] = {}
    if config.size is None:
        assert config.keep is not None
        # Uniform ranks look at no spectrum.
        modules = [Module(spec, torch.empty(0)) for spec in shape.specs]
        ranks = Uniform().allocate(modules, Budget.for_keep(shape.specs, config.keep)).low_rank()
    text = {"samples": config.samples, "seq_len": config.seq_len, "batch_size": config.batch_size}
    kind: type[Decomposition] = DECOMPOSITIONS.load(config.method)
    learning = {"samples": config.rank_samples, "batch_size": config.batch_size}
    # A level needs two windows at least.
    repaired = {**text, "samples": max(config.samples, LEAST_SAMPLES)}
    return Settings(
        decompose=build(DecomposeConfig, model=config.model, method=config.method, max_keep=config.max_keep, **text),
        method=kind(),
        tuning=build(TuningConfig, **learning),
        masks=build(TrainMasksConfig, **learning),
        truncate=TruncateConfig(),
        recover=build(RecoverConfig, **repaired),
        evaluate=EvalConfig(),
        eval_tokens=config.eval_tokens,
        eval_seq_len=window_length(None, source.config),
        ranks=ranks,
        on_gpu=on_gpu,
    )


def stage_plan(
    needs: Needs, shape: ModelShape, settings: Settings, free: int, mapped: bool, speed: Speed | None = None
) -> StagePlan:
    """Return one stage on this machine, and with as little memory as possible.

    Args:
        needs: of the stage.
        shape: of the model.
        settings: of all stages.
        free: bytes of memory.
        mapped: whether the weights of the model are pages of files.
        speed: of this machine; ``None`` without a probe.
    """
    need, least = needs(shape, settings, free), needs(shape, settings, 0)
    # Parts of the work each take a share of what is free, so together they can be planned too large: less also works.
    (held, pages), (least_held, least_pages) = (_places(one, mapped) for one in (need, least))
    fits = (place_of_weights(pages, free, held), place_of_weights(least_pages, free, least_held))
    place: Place = next((found for found in fits if found != "nowhere"), "nowhere")
    return StagePlan(
        stage=need.stage,
        optional=need.optional,
        memory_bytes=held + pages,
        # A pass needs the pages of a block at least, or it reads them again and again.
        least_memory_bytes=least_held + min(least_pages, shape.block_bytes),
        place=place,
        disk_bytes=need.disk,
        scratch_bytes=need.scratch,
        flops=need.work.flops,
        seconds=None if speed is None else speed.seconds(need.work),
    )


def _places(need: Need, mapped: bool) -> tuple[int, int]:
    """Return the bytes in memory, and those that are pages of files: so are weights in the dtype of their files."""
    if mapped:
        return need.held, need.weights + need.pages
    return need.held + need.weights, need.pages
