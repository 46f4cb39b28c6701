"""``ara decompose``: factor every linear layer of the decoder blocks once, for every later budget."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ara.artifacts.factors import FactorisedLayer, FactorsResults
from ara.calibration.moments import shared_inputs
from ara.config import DecomposeConfig, method_options
from ara.decomposition import DECOMPOSITIONS
from ara.decomposition.base import Decomposition
from ara.errors import DiskFullError, UnsupportedModelError
from ara.models.accounting import parameter_count
from ara.models.context import check_window
from ara.models.disk import factor_bytes
from ara.models.experts import every_expert_sees_all
from ara.models.multimodal import kept_parts
from ara.models.placement import Placement, choose_placement, dtype_to_store, torch_dtype
from ara.models.sources import ModelSource, resolve
from ara.models.vocabulary import token_rows
from ara.models.weights import LinearSpec, left_dense, shared_layers
from ara.stages.common import Run, begin, open_task, outputs_folder, text_parts, warn_without_chat
from ara.stages.decompose_ahead import less_room, linears_to_store, prepare
from ara.stages.disk_room import mebibytes
from ara.stages.factoring import factor_layers, refuse_nonfinite_weights, unfinished
from ara.stages.moments import moment_bytes, moments_to_keep
from ara.workspace.store import Workspace
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ara.data.mixtures import CalibrationText
    from ara.data.tokens import TokenWindows

# With fewer calibration tokens per input dimension the second moments are noisy. Papers use 256 x 2048 tokens for
# widths of 4096 to 11008.
_TOKENS_PER_DIMENSION = 8
# Tokens of the pass that finds the layers which a forward pass calls.
_PROBED_TOKENS = 16


def decompose(config: DecomposeConfig, run: Run, name: str | None = None) -> StageView:
    """Factor the model and store the factors in the workspace; an interrupted run resumes at the next block.

    Args:
        config: model, method, text.
        run: workspace and reporter; a missing workspace is created.
        name: of the result; the method's name by default.

    Raises:
        AraError: a problem with the model, the text, the disk or the workspace.
    """
    started = begin(name)
    entry = DECOMPOSITIONS.entry(config.method)
    method: Decomposition = entry.load()(method_options(entry.load().Options, config.options))
    placement = choose_placement(config.device, config.dtype)
    run.check_offload(placement.device)
    run.group.check_device(placement.device, placement.dtype)
    run.report.step(f"Decomposing {config.model}")
    with run.group.first_of_machine():
        source = resolve(config.model, revision=config.revision, report=run.report, offload=run.offload)
    source = source.with_experts(config.share_experts)
    run.group.agree(source.identity.fingerprint, "the model")
    run.report.fact(placement.why)
    stored: str = config.factors_dtype
    if stored == "auto":
        stored = dtype_to_store(placement, config.dtype, source.own_dtype)
    config = config.model_copy(update={"factors_dtype": stored})
    if stored != placement.dtype:
        run.report.fact(f"factors and checkpoints are stored in {stored} (--factors-dtype)")
    if not run.group.writes:
        return _assist(config, method, source, placement, run, started)
    tokenizer = source.load_tokenizer() if method.needs_text else None
    text = None if tokenizer is None else _text(config, tokenizer, run)
    if text is None:
        run.report.fact(f"{config.method} needs no calibration text")
    else:
        config = config.model_copy(update={"text": text.spec})
    with open_task("decompose", run, started, create=True) as task:
        task.workspace.bind(source.identity.as_dict())
        resolved = config.model_copy(update={"device": placement.device, "dtype": placement.dtype})
        settings = {**_recorded(resolved), "text_sha256": text.digest if text else None}
        task.describe(name or config.method, settings, (), source.identity.as_dict())
        if (done := task.done()) is not None:
            return done
        prepare(source, config, method, placement, task, run)
        windows = _windows(config, source, tokenizer, text, task.workspace, run)
        run.report.fact("loading the model")
        with run.group.first_of_machine():
            model = source.load_model(torch_dtype(placement.dtype), placement.device)
        linears = _factorisable(model, linears_to_store(model, config), windows, run)
        if windows is not None:
            _warn_if_few(windows, linears, run)
        owners = {} if windows is None else _owners(model, linears, windows, config)
        with task.writer(seed=config.seed, resumable=True) as stage:
            moments = _preflight(model, linears, owners, config, stage, run)
            _overview(model, linears, windows, text, moments).write(stage)
            run.group.broadcast((linears, windows, owners, moments))
            spill = outputs_folder(task.workspace)
            factor_layers(model, linears, method, windows, owners, moments, config, stage, run, spill)
        return task.view()


def _assist(
    config: DecomposeConfig, method: Decomposition, source: ModelSource, placement: Placement, run: Run, started: float
) -> StageView:
    """Take a share of the windows and layers of the process that writes, and return its result."""
    with open_task("decompose", run, started) as task:
        if (done := task.done()) is not None:
            return done
        with run.group.first_of_machine():
            model = source.load_model(torch_dtype(placement.dtype), placement.device)
        linears, windows, owners, moments = run.group.broadcast()
        spill = outputs_folder(task.workspace)
        factor_layers(model, linears, method, windows, owners, moments, config, None, run, spill)
        return task.view()


def _recorded(config: DecomposeConfig) -> dict[str, Any]:
    """Return the settings for the manifest; results of earlier versions lack those that did not exist."""
    later = {
        "max_keep": None,
        "calibrate_all_experts": False,
        "share_experts": False,
        "factors_dtype": config.dtype,
    }
    unset = {name for name, default in later.items() if getattr(config, name) == default}
    return config.model_dump(mode="json", exclude=unset)


def _text(config: DecomposeConfig, tokenizer: PreTrainedTokenizerBase, run: Run) -> CalibrationText:
    """Load the calibration text, or the model's default one; warn if a chat model would read no conversation."""
    from ara.data.mixtures import load_calibration_text, resolved_text

    spec = resolved_text(config.text, tokenizer)
    warn_without_chat(spec, tokenizer, run)
    text = load_calibration_text(spec, run.report)
    run.report.fact(f"calibration text: {text.origin}")
    return text


def _windows(
    config: DecomposeConfig,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase | None,
    text: CalibrationText | None,
    workspace: Workspace,
    run: Run,
) -> TokenWindows | None:
    from ara.data.windows import WindowReader

    if text is None or tokenizer is None:
        return None
    check_window(config.seq_len, source.config)
    rows, folder = token_rows(source.config), workspace.cache / "tokens"
    windows = WindowReader(folder, tokenizer, text, config.seq_len, config.seed, rows, run.report).first(config.samples)
    if len(windows.names) > 1:
        run.report.fact(", ".join(f"{count:,} tokens of {name}" for name, count in windows.tokens_of.items()))
    return windows


def _factorisable(
    model: PreTrainedModel, linears: list[LinearSpec], windows: TokenWindows | None, run: Run
) -> list[LinearSpec]:
    """Return the layers that the model calls, and report what stays dense."""
    ids = torch.arange(_PROBED_TOKENS)[None] if windows is None else windows.ids[:1, :_PROBED_TOKENS]
    rows = model.get_input_embeddings().weight.shape[0]
    shared = shared_layers(model)
    uncalled, others = left_dense(model, linears, (ids % rows).to(model.device))
    parts = [
        f"{what} ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})"
        for names, what in (
            (uncalled, f"{len(uncalled)} linear layer{'s' * (len(uncalled) > 1)} that the forward pass does not call"),
            (shared, f"{len(shared)} linear layers that share their weights"),
            (others, f"{len(others)} weight{'s' * (len(others) > 1)} that belong to no linear layer"),
        )
        if names
    ]
    if parts:
        run.report.fact(f"left dense: {'; '.join(parts)}")
    if outside := kept_parts(model):
        run.report.fact(f"kept as they are: {', '.join(outside)} ({sum(outside.values()):,} parameters)")
    kept = [spec for spec in linears if spec.name not in set(uncalled)]
    if not kept:
        raise UnsupportedModelError(
            f"{type(model).__name__} calls none of its {len(linears)} linear layers in a forward pass",
            "ARA can only factorise layers whose modules are called",
        )
    return kept


def _owners(
    model: PreTrainedModel, linears: Sequence[LinearSpec], windows: TokenWindows, config: DecomposeConfig
) -> dict[str, str]:
    """Return layer → the first layer of the model with the same input."""
    with every_expert_sees_all(model) if config.calibrate_all_experts else nullcontext():
        return shared_inputs(model, linears, windows.ids[:1].to(model.device))


def _warn_if_few(windows: TokenWindows, linears: Sequence[LinearSpec], run: Run) -> None:
    width = max(spec.n for spec in linears)
    tokens = windows.ids.numel()
    if tokens < _TOKENS_PER_DIMENSION * width:
        samples = math.ceil(_TOKENS_PER_DIMENSION * width / windows.ids.shape[1])
        run.report.warn(
            f"{tokens:,} calibration tokens are few for inputs {width:,} wide: {tokens / width:.1f} per dimension, "
            f"{_TOKENS_PER_DIMENSION} or more are advisable (--samples {samples})"
        )


def _preflight(
    model: PreTrainedModel,
    linears: Sequence[LinearSpec],
    owners: Mapping[str, str],
    config: DecomposeConfig,
    stage: StageWriter,
    run: Run,
) -> dict[str, str] | None:
    """Refuse to start if the disk is too small or a weight is not finite, and decide whether moments are kept.

    Returns:
        :attr:`FactorsResults.moments`.
    """
    todo, itemsize = unfinished(linears, stage), torch_dtype(config.factors_dtype).itemsize
    needed, free = factor_bytes(todo, itemsize), shutil.disk_usage(stage.folder).free
    run.report.fact(f"{len(todo)} linear layers; their factors take {mebibytes(needed)}")
    leaders = moments_to_keep(linears, owners, config.keep_moments, free - needed, stage, run)
    what = "the factors"
    if leaders is not None:
        what += " and second moments"
        needed += moment_bytes(todo, leaders)
    if free < needed:
        raise DiskFullError(
            f"{what} need {mebibytes(needed)}, {stage.folder.parent} has {mebibytes(free)} free",
            less_room(todo, itemsize, config),
        )
    refuse_nonfinite_weights(model, linears)
    return leaders


def _overview(
    model: PreTrainedModel,
    linears: Sequence[LinearSpec],
    windows: TokenWindows | None,
    text: CalibrationText | None,
    moments: Mapping[str, str] | None,
) -> FactorsResults:
    return FactorsResults(
        modules=tuple(
            FactorisedLayer(
                spec.name,
                spec.layer,
                spec.kind,
                spec.m,
                spec.n,
                spec.stored,
                spec.experts if spec.experts > 1 else None,
            )
            for spec in linears
        ),
        model_parameters=parameter_count(model),
        linear_parameters=sum(spec.dense_cost for spec in linears),
        text=text.origin if text is not None else None,
        parts=text_parts(text, windows) if text is not None and windows is not None else (),
        windows=tuple(windows.ids.shape) if windows is not None else None,
        windows_sha256=windows.digest if windows is not None else None,
        moments=moments,
    )
