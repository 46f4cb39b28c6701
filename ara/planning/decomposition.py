"""What ``ara decompose`` takes with its own settings: the first stage of the plan, without a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ara.config import DecomposeConfig, EvalConfig, RecoverConfig, TrainMasksConfig, TruncateConfig, TuningConfig
from ara.decomposition.base import Decomposition
from ara.models.disk import factor_bytes, storing
from ara.models.memory import available_bytes
from ara.models.placement import Placement, torch_dtype
from ara.models.sources import ModelSource
from ara.models.weights import LinearSpec
from ara.planning.needs import Settings, decompose, read_in
from ara.planning.plan import StagePlan, stage_plan
from ara.planning.shape import read_shape
from ara.planning.sizes import Pages, moment_bytes, pages_of, stored_weights


@dataclass(frozen=True)
class DecompositionPlan:
    """What ``ara decompose`` takes on this machine.

    Attributes:
        linears: the layers that are factorised.
        parameters: of the model.
        chunks: parts of the model whose second moments are collected one after the other; 0 if no text is read.
        blocks: number of decoder blocks.
        stage: memory and place of the weights.
        free_memory: bytes that are free now.
        weight_bytes: of the model in the run's dtype.
        pages: whether the weights are pages of files, and the copy that is written for this.
        factor_bytes: of all factors.
        moment_bytes: of the second moments of the inputs, if they are kept; 0 if no text is read.
    """

    linears: tuple[LinearSpec, ...]
    parameters: int
    chunks: int
    blocks: int
    stage: StagePlan
    free_memory: int
    weight_bytes: int
    pages: Pages
    factor_bytes: int
    moment_bytes: int


def plan_decomposition(
    config: DecomposeConfig, method: Decomposition, source: ModelSource, placement: Placement
) -> DecompositionPlan:
    """Plan a decomposition; no weight is read or downloaded.

    Args:
        config: its settings, with the dtype of the factors.
        method: of decomposition.
        source: the model.
        placement: where it runs.

    Raises:
        UnsupportedModelError: no layer can be factorised, or the work cannot be counted.
        UsageError: a pattern of ``config.exclude`` matches nothing.
    """
    dtype, stored = torch_dtype(placement.dtype), torch_dtype(config.factors_dtype)
    shape = read_shape(source, dtype, config.seq_len, config.exclude, stored=stored)
    shape = replace(shape, specs=tuple(storing(shape.specs, config.max_keep)))
    settings = Settings(
        decompose=config,
        method=method,
        tuning=TuningConfig(),
        masks=TrainMasksConfig(),
        truncate=TruncateConfig(),
        recover=RecoverConfig(),
        evaluate=EvalConfig(),
        eval_tokens=0,
        eval_seq_len=config.seq_len,
        ranks={},
        on_gpu=placement.device.startswith("cuda"),
    )
    free = available_bytes(placement.device)
    weights = stored_weights(source, shape.parameters, shape.dtype)
    pages = pages_of(source, weights, shape, placement.device == "cpu", free)
    return DecompositionPlan(
        linears=shape.specs,
        parameters=shape.parameters,
        chunks=len(read_in(shape, settings, free)) if method.needs_text else 0,
        blocks=shape.blocks,
        stage=stage_plan(decompose, shape, settings, free, pages.mapped),
        free_memory=free,
        weight_bytes=shape.weight_bytes,
        pages=pages,
        factor_bytes=factor_bytes(shape.specs, shape.stored.itemsize),
        moment_bytes=moment_bytes(shape) if method.needs_text else 0,
    )
