"""Graphs of models that the graph builder does not know, written by transformers' own exporter.

The exporter follows a forward pass of the loaded model, so the model is in memory as a whole. Attention has no fused
operator, and its caches are handed on from step to step. Such a graph is always compared with torch.

The comparison reads about a hundred tokens. What a model does otherwise only on longer texts is therefore refused:
rotary embeddings that depend on the length, and windows, whose caches transformers shortens.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from ara.errors import UnsupportedModelError, first_line
from ara.models.silence import silence_transformers
from ara.progress import Reporter
from export.config import ExportConfig
from export.onnx.config_fields import read_context
from export.onnx.settings import precision_of, provider_of
from export.onnx.stored_weights import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Batch, past and new tokens of the pass that is followed: all different, so that no two sizes are taken for one.
_BATCH, _PAST, _NEW = 2, 5, 3
_CACHE = re.compile(r"(?:input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s")
_INPUTS = {"input_ids", "attention_mask", "position_ids"}
# Rotary embeddings whose angles depend on the position alone, at any length.
_ROPES = {"default", "linear", "llama3", "yarn"}


def trace(
    checkpoint: Checkpoint,
    loaded: PreTrainedConfig,
    config: ExportConfig,
    refusal: UnsupportedModelError,
    report: Reporter,
) -> ir.Model:
    """Return the graph that transformers' exporter writes, with the names of ONNX Runtime GenAI.

    Args:
        checkpoint: compressed or dense.
        loaded: config of the model.
        config: resolved.
        refusal: of the graph builder.
        report: progress.

    Raises:
        UnsupportedModelError: the refusal, with what transformers' exporter lacks.
    """
    lacks = _obstacles(checkpoint, loaded, config)
    if lacks:
        raise UnsupportedModelError(str(refusal), f"transformers' own exporter could be tried, but {lacks[0]}")
    report.warn(f"{refusal}: transformers' own exporter writes the graph, which takes longer and runs more slowly")
    from ara.models.checkpoint import load

    model = load(checkpoint.folder, device="cpu", dtype="float32")
    try:
        with _quiet():
            return _renamed(_traced(model), model)
    except Exception as error:  # torch's and transformers' exporters raise errors of many classes
        raise UnsupportedModelError(
            f"{refusal}; transformers' own exporter fails as well: {type(error).__name__}: {first_line(error)}",
            "this model cannot be exported",
        ) from error


def _obstacles(checkpoint: Checkpoint, loaded: PreTrainedConfig, config: ExportConfig) -> list[str]:
    """Return why transformers' exporter cannot be used here, each with the remedy."""
    found = []
    if precision_of(config) != "fp32" or provider_of(config) != "cpu":
        found.append("only for --precision fp32 --execution-provider cpu")
    if checkpoint.rounded:
        found.append("its graph would have no matrices of few bits: export the checkpoint that ara quantise read")
    if config.merge_shared_inputs or config.last_logits:
        found.append("without --merge-shared-inputs and --last-logits")
    if not config.parity:
        found.append("its graph has to be compared with torch: leave --no-parity out")
    found += _of_length(loaded)
    try:
        read_context(loaded)
    except UnsupportedModelError as error:
        found.append(str(error))
    missing = _missing()
    if missing is not None:
        found.append(f"it needs another package ({missing}): pip install onnxscript")
    return found


def _missing() -> str | None:
    """Return what the exporter lacks on this machine; older versions of transformers have none."""
    try:
        import onnxscript  # noqa: F401
        from transformers.exporters.exporter_onnx import OnnxExporter  # noqa: F401
    except ImportError as error:
        return first_line(error)
    return None


def _of_length(loaded: PreTrainedConfig) -> list[str]:
    """Return what the model does otherwise on long texts than on short ones."""
    text, found = loaded.get_text_config(), []
    rope = getattr(text, "rope_parameters", None) or {}
    ropes = [one for one in rope.values() if isinstance(one, dict)] or [rope]
    kinds = {str(one.get("rope_type", "default")) for one in ropes}
    if not kinds <= _ROPES:
        found.append(f"rotary embeddings of type {', '.join(sorted(kinds - _ROPES))} depend on the length of the text")
    types = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    windows = [name for name in ("sliding_window", "attention_chunk_size") if getattr(text, name, None)]
    if types or windows:
        found.append(f"it cannot follow windows ({', '.join([*sorted(types), *windows])})")
    if getattr(text, "use_bidirectional_attention", None):
        found.append("the model reads text in both directions")
    return found


def _traced(model: PreTrainedModel) -> ir.Model:
    """Return the graph of a pass with caches; all its sizes are variable."""
    import inspect

    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    ids = torch.arange(_BATCH * (_PAST + _NEW)).view(_BATCH, -1) % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        past = model(input_ids=ids[:, :_PAST], use_cache=True).past_key_values
    inputs = {
        "input_ids": ids[:, _PAST:].contiguous(),
        "attention_mask": torch.ones_like(ids),
        "past_key_values": past,
        "use_cache": True,
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, -1).contiguous()
    return OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True)).program


def _renamed(graph: ir.Model, model: PreTrainedModel) -> ir.Model:
    """Give inputs and outputs the names of GenAI, and caches the sizes of their heads.

    Raises:
        ValueError: the graph has inputs or outputs that a decoder does not have.
    """
    outputs = {value.name for value in graph.graph.outputs}
    for values, prefix, length in (
        (graph.graph.inputs, "past_key_values", "p"),
        (graph.graph.outputs, "present", "t"),
    ):
        for value in values:
            found = _CACHE.fullmatch(value.name or "")
            if found is None:
                if value.name not in (_INPUTS if values is graph.graph.inputs else {"logits"}):
                    raise ValueError(
                        f"the graph has {value.name!r}, expected tokens, logits and caches of keys and values"
                    )
                continue
            assert value.shape is not None
            heads, width = (int(str(size)) for size in (value.shape[1], value.shape[3]))
            value.name, value.shape = f"{prefix}.{found[1]}.{found[2]}", ir.Shape(["b", heads, length, width])
    if "logits" not in outputs or len(graph.graph.inputs) < 4:
        raise ValueError("the graph has no logits or no caches")
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' messages off the terminal, where only the command's own results belong."""
    # Some of transformers' loggers here are named after files, so that its own switch does not reach them.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with silence_transformers(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
