"""Compares an exported graph in ONNX Runtime with its checkpoint in torch; fails if they differ too much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ara.data.texts import Purpose, load_documents
from ara.errors import DataError, NumericalError
from ara.models.vocabulary import check_tokens
from ara.progress import Reporter
from export.onnx.architecture import Decoder
from export.onnx.export_report import ExportReport, Fallback, Proof, read_report
from export.onnx.parity import compare
from export.onnx.runner import OnnxDecoder
from export.onnx.stored_weights import Checkpoint
from export.onnx.tolerance import TOLERANCES, Parity, all_misses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A text that needs no network. Graphs are compared on its evaluation part.
PARITY_TEXT = "python-docs"
# Largest difference of a cosine or sine: both sides use the same formula, so only the last bits may differ.
_ROTARY_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Reference:
    """What a graph is compared with.

    Attributes:
        checkpoint: read tensor by tensor.
        folder: of the graph.
        ids: (2, t) int64, two windows of text.
        expected: (2, t, v) float32, the checkpoint's logits in torch.
        rows: number of rows of the embedding; ``None`` if unknown.
    """

    checkpoint: Checkpoint
    folder: Path
    ids: torch.Tensor
    expected: torch.Tensor
    rows: int | None

    def load(self) -> PreTrainedModel:
        """Load the checkpoint into torch, float32."""
        return _load(self.checkpoint)

    def windows(self, purpose: Purpose, count: int) -> torch.Tensor:
        """Return ``count`` windows of one part of the text, as long as those of the comparison: (count, t) int64."""
        return _windows(self.checkpoint, self.rows, purpose, count, self.ids.shape[1])


def read_reference(
    checkpoint: Checkpoint, folder: Path, decoder: Decoder | None, tokens: int, report: Reporter
) -> Reference:
    """Run a checkpoint in torch, to compare graphs with it.

    Args:
        checkpoint: that the graph was made from.
        folder: the graph, with its ``ara_export.json``.
        decoder: sizes that the graph was built from; ``None`` for a graph of another exporter.
        tokens: length of each of two windows of text; at most half of the context is used.
        report: progress.

    Raises:
        NumericalError: the rotary embedding of the graph differs from the model's.
        DataError: the text is too short.
        ModelError: the checkpoint has no usable tokenizer.
    """
    rows = decoder.vocabulary if decoder is not None else None
    ids = _windows(checkpoint, rows, "evaluation", 2, min(tokens, read_report(folder).decoder.context // 2))
    report.fact(f"comparing with torch on {ids.shape[1]} tokens of {PARITY_TEXT}")
    unreached = sorted({window for window in decoder.windows if window and window >= ids.shape[1]} if decoder else ())
    if unreached:
        report.fact(
            f"its sliding window of {unreached[0]} tokens is longer than that: --parity-tokens {unreached[0] + 32} "
            "compares beyond it"
        )
    # The model is released on return, before the graph is loaded, which takes as much memory again.
    model = _load(checkpoint)
    if decoder is not None:
        check_rotary(decoder, model)
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits.float()
    return Reference(checkpoint, folder, ids, expected, rows)


def compare_graph(reference: Reference) -> list[Parity]:
    """Load the graph into ONNX Runtime and return its differences from torch, case by case."""
    return compare(OnnxDecoder(reference.folder), reference.expected, reference.ids)


def prove(about: ExportReport, cases: Sequence[Parity]) -> Proof:
    """Return the comparison as the report keeps it.

    Raises:
        NumericalError: a case differs by more than the precision of the graph allows.
    """
    tolerance = TOLERANCES[about.precision]
    problems = all_misses(cases, tolerance)
    if problems:
        more = f" (and {len(problems) - 2} more)" if len(problems) > 2 else ""
        fallback = about.fallback
        even = "" if fallback is None else f", even with {_few(fallback)} products exact"
        raise NumericalError(
            f"the {about.precision} graph does not match the checkpoint{even}: {'; '.join(problems[:2])}{more}",
            "try another --precision; if fp32 fails as well, this is a defect of the export",
        )
    return Proof(text=PARITY_TEXT, tolerance=tolerance, cases=tuple(cases))


def _few(fallback: Fallback) -> str:
    return f"{len(fallback.matrices)} of {fallback.candidates}"


def _load(checkpoint: Checkpoint) -> PreTrainedModel:
    from ara.models.checkpoint import load

    return load(checkpoint.folder, device="cpu", dtype="float32")


def _windows(checkpoint: Checkpoint, rows: int | None, purpose: Purpose, count: int, length: int) -> torch.Tensor:
    from ara.models.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.folder)
    ids = text_windows(tokenizer, purpose, count, length)
    check_tokens(ids, rows, tokenizer, PARITY_TEXT, "export without comparing: --no-parity")
    return ids


def check_rotary(decoder: Decoder, model: PreTrainedModel) -> None:
    """Check that the graph's tables equal the model's rotary embedding at every position of the context.

    Raises:
        NumericalError: they differ.
    """
    for name in decoder.rotary:
        _check_table(decoder, model, name)


def _check_table(decoder: Decoder, model: PreTrainedModel, name: str) -> None:
    """Compare one rotary embedding of the graph with the model's."""
    rotation = decoder.family.rotation
    assert rotation is not None
    rotary = model.get_submodule(decoder.family.names.rotary)
    cos, sin = decoder.rotary_tables(name)
    width = cos.shape[1]
    # The model repeats every angle: next to itself, or in a second half.
    once = slice(0, None, 2) if rotation.neighbours else slice(0, width)
    with torch.inference_mode():
        for start in range(0, decoder.context, 4096):
            positions = torch.arange(start, min(start + 4096, decoder.context))[None]
            theirs = rotary(torch.zeros(1), positions, *([name] if rotation.by_type else []))
            for table, other in zip((cos, sin), theirs, strict=True):
                off = float((table[positions[0]] - other[0, :, once]).abs().max())
                if not off <= _ROTARY_TOLERANCE:
                    raise NumericalError(
                        f"the rotary embedding of the graph differs from the model's by {off:.2g} between positions "
                        f"{start} and {int(positions[0, -1])}",
                        "this is a defect of the export (export/onnx/architecture.py)",
                    )


def text_windows(tokenizer: PreTrainedTokenizerBase, purpose: Purpose, count: int, length: int) -> torch.Tensor:
    """Return windows of one part of the text, evaluation or calibration: (count, length) int64.

    Raises:
        DataError: the text is too short.
    """
    ids: list[int] = []
    for text in load_documents(PARITY_TEXT, purpose).documents:
        ids += tokenizer(text, verbose=False)["input_ids"]
        if len(ids) >= count * length:
            return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
    raise DataError(
        f"{PARITY_TEXT} has only {len(ids)} tokens, {count * length} are needed",
        "use fewer --parity-tokens, or install Python's documentation",
    )
