"""Writes a checkpoint as a folder for ONNX Runtime and ONNX Runtime GenAI, and compares it with torch.

Weights go from safetensors to the external data file one at a time; only the parity check loads the model into torch.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import onnxruntime as ort

from ara.environment import versions
from ara.errors import ModelError, UnsupportedModelError, UsageError, disk_errors, first_line
from ara.jsonfile import dump, read_object
from ara.models.silence import silence_transformers
from ara.models.vocabulary import end_tokens
from ara.progress import Reporter
from export.config import ExportConfig
from export.onnx.architecture import Decoder, read_decoder
from export.onnx.config_fields import read_context
from export.onnx.export_report import (
    DATA_FILE,
    GRAPH_FILE,
    DecoderFacts,
    ExportReport,
    Precision,
    Source,
    graph_files,
)
from export.onnx.fallback import fall_back
from export.onnx.few_bits import count_expanded
from export.onnx.genai import genai_config
from export.onnx.graph import build
from export.onnx.graph_options import GraphOptions
from export.onnx.proof import compare_graph, prove, read_reference
from export.onnx.rewrite import graph_errors, load_graph, rewrite
from export.onnx.settings import precision_of, provider_of
from export.onnx.stored_weights import Checkpoint
from export.onnx.tolerance import TOLERANCES, all_misses
from export.onnx.traced import trace

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GENAI_FILE = "genai_config.json"
# Files of transformers that belong to the tokenizer and to generation.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def write_onnx(
    checkpoint: Checkpoint, folder: Path, config: ExportConfig, origin: str, report: Reporter
) -> ExportReport:
    """Write a checkpoint as ONNX, compare it with torch, and return the contents of ``ara_export.json``.

    Args:
        checkpoint: compressed or dense.
        folder: an empty folder. After a failure the caller removes it.
        config: resolved by :func:`export.onnx.settings.resolve`.
        origin: hash that names the checkpoint.
        report: progress.

    Raises:
        ModelError: the checkpoint is damaged, or neither the graph builder nor transformers' exporter can write it.
        NumericalError: the results of the graph differ from those of the checkpoint, in int8 also with exact
            products.
        DiskFullError: the disk is full.
    """
    if not checkpoint.compressed:
        report.warn(f"{checkpoint.folder} is not compressed: the export is dense")
    loaded = model_config(checkpoint.folder)
    decoder: Decoder | None = None
    traced: ir.Model | None = None
    # The family comes first: the config of an unknown one may lack the fields that the facts need.
    if config.rewrite is None:
        try:
            decoder = read_decoder(loaded)
        except UnsupportedModelError as refusal:
            traced = trace(checkpoint, loaded, config, refusal, report)
    facts = DecoderFacts(family=loaded.model_type, context=read_context(loaded), eos=_eos(checkpoint.folder, loaded))
    report.fact(
        f"{facts.family}: {len(checkpoint.ranks)} low-rank layers; {config.precision} for {provider_of(config)}"
    )

    def write(exact: frozenset[str]) -> ExportReport:
        """Write the graph and its report; a graph of precision int8 multiplies by these matrices exactly."""
        if traced is not None:
            model, genai = traced, None
        else:
            model, genai = _graph(checkpoint, decoder, facts, config, exact, report)
        with disk_errors(folder), graph_errors(Path(config.rewrite)) if config.rewrite else nullcontext():
            _save(model, folder, report)
        with disk_errors(folder):
            if genai is not None:
                text = dump(genai, GENAI_FILE, indent=1)
                (folder / GENAI_FILE).write_text(text + "\n", encoding="utf-8")
            about = _about(checkpoint, model, facts, config, folder, origin, traced=traced is not None)
            about.write(folder)
        return about

    about = write(frozenset())
    with disk_errors(folder):
        for name in _COMPANIONS:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, folder / name)
    if config.parity:
        reference = read_reference(checkpoint, folder, decoder, config.parity_tokens, report)
        cases, tolerance = compare_graph(reference), TOLERANCES[about.precision]
        if about.precision == "int8" and all_misses(cases, tolerance):
            about, cases = fall_back(write, reference, about, cases, tolerance, report)
        about = about.model_copy(update={"parity": prove(about, cases)})
        with disk_errors(folder):
            about.write(folder)
    return about


def _about(
    checkpoint: Checkpoint,
    model: ir.Model,
    facts: DecoderFacts,
    config: ExportConfig,
    folder: Path,
    origin: str,
    *,
    traced: bool,
) -> ExportReport:
    """Return the report of a graph that has been written but not yet compared."""
    return ExportReport(
        source=Source(name=checkpoint.folder.name, sha256=origin),
        precision=precision_of(config) if config.rewrite is None else _stored_precision(model),
        execution_provider=provider_of(config),
        merge_shared_inputs=config.merge_shared_inputs,
        last_logits=config.last_logits,
        rewritten=config.rewrite is not None,
        traced=traced,
        layout=checkpoint.layout,
        ranks=checkpoint.ranks,
        rounded=len(checkpoint.rounded),
        expanded=count_expanded(model),
        decoder=facts.model_copy(update={"shared_caches": _shares_caches(model)}),
        files=graph_files(folder),
        versions={**versions(), "onnx_ir": ir.__version__, "onnxruntime": ort.__version__},
    )


def model_config(folder: Path) -> PreTrainedConfig:
    """Return the config of a checkpoint.

    Raises:
        ModelError: transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        with silence_transformers():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers' errors of a bad config share no base class
        raise ModelError(
            f"{folder}/config.json cannot be used: {first_line(error)}", "is it a model's folder?"
        ) from error


def _shares_caches(model: ir.Model) -> bool:
    """Tell whether every cache goes into attention that appends to it in place."""
    caches = [value for value in model.graph.inputs if (value.name or "").startswith("past_key_values.")]
    return all(use.node.op_type == "GroupQueryAttention" for value in caches for use in value.uses())


def _graph(
    checkpoint: Checkpoint,
    decoder: Decoder | None,
    facts: DecoderFacts,
    config: ExportConfig,
    exact: frozenset[str],
    report: Reporter,
) -> tuple[ir.Model, dict[str, Any] | None]:
    """Return the graph and the document for GenAI: both built, or both taken from ``--rewrite``."""
    if decoder is not None:
        precision, provider = precision_of(config), provider_of(config)
        options = GraphOptions(
            precision=precision,
            activations="fp16" if provider == "cuda" or precision == "fp16" else "fp32",
            provider=provider,
            merge_shared_inputs=config.merge_shared_inputs,
            last_logits=config.last_logits,
            exact=exact,
        )
        return build(checkpoint, decoder, options), genai_config(decoder, list(facts.eos), provider)
    assert config.rewrite is not None
    dense = Path(config.rewrite)
    if not checkpoint.compressed:
        raise UsageError("--rewrite is given, and the checkpoint has no low-rank layers", "leave --rewrite out")
    model = load_graph(dense)
    with report.bar("Putting factors into the graph", len(checkpoint.ranks)) as bar, graph_errors(dense):
        rewrite(model, checkpoint, provider_of(config), bar.advance)
    return model, _genai_beside(dense)


def _genai_beside(dense: Path) -> dict[str, Any] | None:
    """Return the GenAI document that lies beside a dense graph, changed to the file name of the new graph."""
    path, hint = dense.with_name(GENAI_FILE), "remove it, or export the dense model again"
    if not path.is_file():
        return None
    document = read_object(path, hint)
    try:
        document["model"]["decoder"]["filename"] = GRAPH_FILE
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path} is not what GenAI reads ({error})", hint) from None
    return document


def _stored_precision(model: ir.Model) -> Precision:
    """Return the precision of another exporter's graph: that of its caches."""
    kinds = {value.dtype for value in model.graph.inputs}
    return "fp16" if ir.DataType.FLOAT16 in kinds else "fp32"


def _eos(source: Path, loaded: PreTrainedConfig) -> tuple[int, ...]:
    """Return the tokens that end a text. Chat models name the end of a turn only in ``generation_config.json``."""
    value, hint = loaded.eos_token_id, "write the checkpoint again: ara truncate --force"
    path = source / "generation_config.json"
    if path.is_file():
        value = read_object(path, hint).get("eos_token_id", value)
    return end_tokens(value, str(source), hint)


def _save(model: ir.Model, folder: Path, report: Reporter) -> None:
    """Write graph and weights; each weight is read when it is written, and released afterwards."""
    with report.bar("Writing weights", len(model.graph.initializers)) as bar:
        ir.save(
            model,
            folder / GRAPH_FILE,
            external_data=DATA_FILE,
            callback=lambda tensor, info: bar.advance(),
            # One weight in memory at a time.
            max_workers=1,
            max_in_flight_bytes=1,
        )
