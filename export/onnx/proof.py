"""Compares an exported graph in ONNX Runtime with its checkpoint in torch; fails if they differ too much."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ara.data.texts import load_documents
from ara.errors import DataError, NumericalError
from ara.models.vocabulary import check_tokens
from ara.progress import Reporter
from export.onnx.architecture import Decoder
from export.onnx.export_report import Proof, read_report
from export.onnx.parity import compare
from export.onnx.runner import OnnxDecoder
from export.onnx.tolerance import TOLERANCES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A text that needs no network; its evaluation part is used.
PARITY_TEXT = "python-docs"
# Largest difference of a cosine or sine: both sides use the same formula, so only the last bits may differ.
_ROTARY_TOLERANCE = 1e-5


def prove(source: Path, folder: Path, decoder: Decoder | None, tokens: int, report: Reporter) -> Proof:
    """Compare a graph with its checkpoint.

    Args:
        source: folder of the checkpoint.
        folder: the graph, with its ``ara_export.json``.
        decoder: sizes that the graph was built from; ``None`` for a graph of another exporter.
        tokens: length of each of two windows of text; at most half of the context is used.
        report: progress.

    Raises:
        NumericalError: they differ by more than the precision of the graph allows.
        DataError: the text is too short.
        ModelError: the checkpoint has no usable tokenizer.
    """
    from ara.models.checkpoint import load, load_tokenizer

    tokenizer = load_tokenizer(source)
    about = read_report(folder)
    ids = parity_windows(tokenizer, min(tokens, about.decoder.context // 2))
    rows = decoder.vocabulary if decoder is not None else None
    check_tokens(ids, rows, tokenizer, PARITY_TEXT, "export without comparing: --no-parity")
    report.fact(f"comparing with torch on {ids.shape[1]} tokens of {PARITY_TEXT}")
    unreached = sorted({window for window in decoder.windows if window and window >= ids.shape[1]} if decoder else ())
    if unreached:
        report.fact(
            f"its sliding window of {unreached[0]} tokens is longer than that: --parity-tokens {unreached[0] + 32} "
            "compares beyond it"
        )
    model = load(source, device="cpu", dtype="float32")
    if decoder is not None:
        check_rotary(decoder, model)
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits.float()
    # Released before the graph is loaded, which takes as much memory again.
    del model
    tolerance = TOLERANCES[about.precision]
    found = compare(OnnxDecoder(folder), expected, ids)
    problems = [text for row in found for text in row.misses(tolerance)]
    if problems:
        more = f" (and {len(problems) - 2} more)" if len(problems) > 2 else ""
        raise NumericalError(
            f"the {about.precision} graph does not match the checkpoint: {'; '.join(problems[:2])}{more}",
            "try another --precision; if fp32 fails as well, this is a defect of the export",
        )
    return Proof(text=PARITY_TEXT, tolerance=tolerance, cases=tuple(found))


def check_rotary(decoder: Decoder, model: PreTrainedModel) -> None:
    """Check that the graph's tables equal the model's rotary embedding at every position of the context.

    Raises:
        NumericalError: they differ.
    """
    rotary = model.get_submodule("model.rotary_emb")
    cos, sin = decoder.rotary_tables()
    width = cos.shape[1]
    with torch.inference_mode():
        for start in range(0, decoder.context, 4096):
            positions = torch.arange(start, min(start + 4096, decoder.context))[None]
            theirs = rotary(torch.zeros(1), positions)
            for table, other in zip((cos, sin), theirs, strict=True):
                off = float((table[positions[0]] - other[0, :, :width]).abs().max())
                if not off <= _ROTARY_TOLERANCE:
                    raise NumericalError(
                        f"the rotary embedding of the graph differs from the model's by {off:.2g} between positions "
                        f"{start} and {int(positions[0, -1])}",
                        "this is a defect of the export (export/onnx/architecture.py)",
                    )


def parity_windows(tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
    """Return two windows of text that calibration does not use: (2, length) int64.

    Raises:
        DataError: the text is too short.
    """
    documents = load_documents(PARITY_TEXT, "evaluation")
    ids: list[int] = []
    for text in documents.documents:
        ids += tokenizer(text, verbose=False)["input_ids"]
        if len(ids) >= 2 * length:
            return torch.tensor(ids[: 2 * length], dtype=torch.int64).view(2, length)
    raise DataError(
        f"{PARITY_TEXT} has only {len(ids)} tokens, {2 * length} are needed",
        "use fewer --parity-tokens, or install Python's documentation",
    )
