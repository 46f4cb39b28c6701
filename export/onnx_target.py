"""Writes a checkpoint as a folder that ONNX Runtime and ONNX Runtime GenAI run, and proves it against torch.

Weights go from safetensors to the external data file one at a time; only the parity check loads the model into torch.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import onnxruntime as ort
import torch

from ara.calibration.texts import load_documents
from ara.environment import versions
from ara.errors import DataError, ModelError, NumericalError, UnavailableError, UsageError, disk_errors, first_line
from ara.manifest import file_sha256
from ara.models.quiet import quiet_transformers
from ara.progress import Reporter
from export.architecture import read_decoder
from export.config import ExportConfig
from export.genai import genai_config
from export.graph import GraphOptions, Precision, build
from export.parity import TOLERANCES, Parity, compare
from export.rewrite import load_graph, rewrite
from export.runner import GRAPH_FILE, PROVIDERS, OnnxDecoder, Provider, read_report
from export.stage import REPORT_FILE
from export.weights import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

DATA_FILE = f"{GRAPH_FILE}.data"
GENAI_FILE = "genai_config.json"
EXPORT_FORMAT = 1
# What belongs to the tokenizer and to generation, in the words of transformers.
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
# Text that needs no network; its evaluation part.
PARITY_TEXT = "python-docs"
_PARITY_TOKENS = 96
_BLOCKED_INT4 = (
    "int4 is not offered: rounding to nearest compounds over two factors (SmolLM2-135M: NLL 2.92 → 3.43, against "
    "2.94 → 3.08 for dense weights), and calibrated rounding is not there yet"
)


def resolve(config: ExportConfig) -> ExportConfig:
    """Decide provider and precision.

    Raises:
        UnavailableError: CUDA was asked for, and this ONNX Runtime has none; int4.
        UsageError: a combination that ONNX Runtime cannot run.
    """
    provider = config.execution_provider
    if provider == "auto":
        there = torch.cuda.is_available() and PROVIDERS["cuda"] in ort.get_available_providers()
        provider = "cuda" if there else "cpu"
    if provider == "cuda" and PROVIDERS["cuda"] not in ort.get_available_providers():
        raise UnavailableError(
            f"this ONNX Runtime has no {PROVIDERS['cuda']}", "install onnxruntime-gpu, or use --execution-provider cpu"
        )
    precision = config.precision or ("fp16" if provider == "cuda" else "fp32")
    if precision == "int4":
        raise UnavailableError(_BLOCKED_INT4, "use --precision int8")
    if config.rewrite is not None and (config.merge_shared_inputs or config.last_logits or config.precision):
        raise UsageError(
            "--rewrite changes nothing but the factors: no --precision, --merge-shared-inputs or --last-logits",
            "leave them out, or leave --rewrite out",
        )
    if (provider, precision) == ("cuda", "fp32"):
        raise UsageError(
            "fused attention of ONNX Runtime has no fp32 on CUDA", "use --precision fp16, or --execution-provider cpu"
        )
    return config.model_copy(update={"execution_provider": provider, "precision": precision})


def write_onnx(source: Path, folder: Path, config: ExportConfig, origin: str, report: Reporter) -> dict[str, Any]:
    """Write a checkpoint as ONNX, prove it, and return what ``ara_export.json`` says of it.

    Args:
        source: folder of the checkpoint, compressed or dense.
        folder: empty; on failure it is the caller's to remove.
        config: resolved by :func:`resolve`.
        origin: hash that names the source.
        report: progress.

    Raises:
        ModelError: the checkpoint is damaged, or of a family that the builder does not know.
        NumericalError: the graph is not what the checkpoint is.
        DiskFullError: no room.
    """
    from transformers import AutoConfig

    checkpoint = Checkpoint(source)
    if not checkpoint.compressed:
        report.warn(f"{source} is not compressed: it is exported as it is, dense")
    try:
        with quiet_transformers():
            model_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers' errors of a bad config share no base class
        raise ModelError(
            f"{source}/config.json cannot be used: {first_line(error)}", "is it a model's folder?"
        ) from error
    assert config.execution_provider != "auto" and config.precision not in (None, "int4")
    provider: Provider = config.execution_provider
    precision: Precision = config.precision  # type: ignore[assignment]
    options = GraphOptions(
        precision=precision,
        activations="fp16" if provider == "cuda" or precision == "fp16" else "fp32",
        merge_shared_inputs=config.merge_shared_inputs,
        last_logits=config.last_logits,
    )
    eos = _eos(source, model_config)
    report.fact(f"{model_config.model_type}: {len(checkpoint.ranks)} low-rank layers; {precision} for {provider}")
    model, genai = _graph(checkpoint, model_config, eos, options, config, provider, report)
    if config.rewrite is not None:
        precision = _precision_of(model)
    about: dict[str, Any] = {
        "format_version": EXPORT_FORMAT,
        "source": {"name": source.name, "sha256": origin},
        "precision": precision,
        "execution_provider": provider,
        "merge_shared_inputs": config.merge_shared_inputs,
        "last_logits": config.last_logits,
        "layout": "pivoted" if checkpoint.pivoted else "factors",
        "ranks": checkpoint.ranks,
        "rewritten": config.rewrite is not None,
        "decoder": {
            "family": model_config.model_type,
            "context": model_config.max_position_embeddings,
            "eos": eos,
        },
        "versions": {**versions(), "onnx_ir": ir.__version__, "onnxruntime": ort.__version__},
        "parity": None,
    }
    with disk_errors(folder):
        _save(model, folder, report)
        if genai is not None:
            _write_json(folder / GENAI_FILE, genai)
        for name in _COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        _write_json(folder / REPORT_FILE, about)
    if config.parity:
        found = _prove(source, folder, precision, report)
        about["parity"] = {
            "text": PARITY_TEXT,
            "tolerance": asdict(TOLERANCES[precision]),
            "cases": [row.plain() for row in found],
        }
        with disk_errors(folder):
            _write_json(folder / REPORT_FILE, about)
    return about


def source_hash(folder: Path) -> str:
    """Return the sha256 over names and contents of a checkpoint's config and weights."""
    sha = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        sha.update(f"{path.name} {file_sha256(path)}\n".encode())
    return sha.hexdigest()


def _graph(
    checkpoint: Checkpoint,
    model_config: PreTrainedConfig,
    eos: list[int],
    options: GraphOptions,
    config: ExportConfig,
    provider: Provider,
    report: Reporter,
) -> tuple[ir.Model, dict[str, Any] | None]:
    """Return the graph, and what GenAI wants to know of it, if that is known."""
    if config.rewrite is None:
        decoder = read_decoder(model_config)
        return build(checkpoint, decoder, options), genai_config(decoder, eos, provider)
    dense = Path(config.rewrite)
    if not checkpoint.compressed:
        raise UsageError("--rewrite is given, and the checkpoint has no low-rank layers", "leave --rewrite out")
    model = load_graph(dense)
    with report.bar("Putting factors into the graph", len(checkpoint.ranks)) as bar:
        rewrite(model, checkpoint, bar.advance)
    return model, _genai_beside(dense)


def _genai_beside(dense: Path) -> dict[str, Any] | None:
    """Return what stands beside a dense graph for GenAI, with the name that our graph has."""
    path = dense.with_name(GENAI_FILE)
    if not path.is_file():
        return None
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        document["model"]["decoder"]["filename"] = GRAPH_FILE
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is not what GenAI reads ({error})", "remove it, or export the dense model again"
        ) from None
    return document


def _precision_of(model: ir.Model) -> Precision:
    """Return the precision of a graph that somebody else has built, by its caches."""
    kinds = {value.dtype for value in model.graph.inputs}
    return "fp16" if ir.DataType.FLOAT16 in kinds else "fp32"


def _eos(source: Path, model_config: PreTrainedConfig) -> list[int]:
    """Return the tokens that end a text; chat models name the end of a turn in ``generation_config.json`` alone."""
    value = model_config.eos_token_id
    path = source / "generation_config.json"
    if path.is_file():
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", value)
        except (ValueError, AttributeError) as error:
            raise ModelError(
                f"{path} is not JSON ({error})", "write the checkpoint again: ara truncate --force"
            ) from None
    return value if isinstance(value, list) else [] if value is None else [value]


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _save(model: ir.Model, folder: Path, report: Reporter) -> None:
    """Write graph and weights; each weight is read when its turn comes and let go again."""
    with report.bar("Writing weights", len(model.graph.initializers)) as bar:
        ir.save(
            model,
            folder / GRAPH_FILE,
            external_data=DATA_FILE,
            callback=lambda tensor, info: bar.advance(),
            # One at a time: none waits in memory while another is written.
            max_workers=1,
            max_in_flight_bytes=1,
        )


def _prove(source: Path, folder: Path, precision: str, report: Reporter) -> list[Parity]:
    """Compare the graph with the checkpoint; beyond tolerance is an error."""
    from transformers import AutoTokenizer

    from ara.models.checkpoint import load

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    context = int(read_report(folder)["decoder"]["context"])
    ids = parity_windows(tokenizer, min(_PARITY_TOKENS, context // 2))
    report.fact(f"comparing with torch on {ids.shape[1]} tokens of {PARITY_TEXT}")
    model = load(source, device="cpu", dtype="float32")
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits.float()
    # Not both at once: the graph takes as much memory again.
    del model
    found = compare(OnnxDecoder(folder), expected, ids)
    problems = [text for row in found for text in row.misses(TOLERANCES[precision])]
    if problems:
        more = f" (and {len(problems) - 2} more)" if len(problems) > 2 else ""
        raise NumericalError(
            f"the {precision} graph is not what the checkpoint is: {'; '.join(problems[:2])}{more}",
            "this is a defect of the export, or a model whose activations this precision cannot hold: try another one",
        )
    return found


def parity_windows(tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """Return two windows of text that no calibration has seen: (2, length) int64.

    Raises:
        DataError: the text is shorter than that.
    """
    documents = load_documents(PARITY_TEXT, "evaluation")
    ids: list[int] = []
    for text in documents.documents:
        ids += tokenizer(text, verbose=False)["input_ids"]
        if len(ids) >= 2 * length:
            return torch.tensor(ids[: 2 * length], dtype=torch.int64).view(2, length)
    raise DataError(
        f"{PARITY_TEXT} has only {len(ids)} tokens, {2 * length} are needed", "install Python's documentation"
    )
