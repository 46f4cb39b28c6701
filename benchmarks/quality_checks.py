"""Checks of rows of ``benchmarks/quality.py`` without code of ARA's evaluation: the dense row, and stored layers."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ara.artifacts.factors import factor_files, specs_of
from ara.layout_names import LayoutName
from ara.solver.problem import Allocation
from ara.stages.common import Run, model_of
from ara.workspace.view import StageView


def independent_perplexity(model: Any, tokenizer: Any, windows: int, seq_len: int) -> float:
    """Compute WikiText-2 perplexity as the GPTQ and SVD-LLM scripts describe it, with torch's own cross-entropy.

    Args:
        model: a model of transformers.
        tokenizer: its tokenizer.
        windows: how many of the first windows to read.
        seq_len: tokens per window.
    """
    import torch

    with (Path(os.environ["ARA_DATA_DIR"]) / "wikitext2_raw" / "test.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line)["text"] for line in file]
    ids = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids
    losses = []
    for i in range(windows):
        window = ids[:, i * seq_len : (i + 1) * seq_len]
        with torch.no_grad():
            logits = model(window).logits.to(torch.float64)
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1].double(), window[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def check_dense(run: Run, view: StageView, losses: Sequence[float], seq_len: int) -> None:
    """Compare the dense losses of the first windows with the independent ones; more than 0.01 % off is a failure."""
    model, tokenizer = _model(run, view)
    ours = math.exp(sum(losses) / len(losses))
    theirs = independent_perplexity(model, tokenizer, len(losses), seq_len)
    off = abs(theirs / ours - 1)
    run.report.fact(
        f"dense, first {len(losses)} windows: {ours:.4f}, computed independently {theirs:.4f}; "
        f"relative difference {off:.1e}"
    )
    if off > 1e-4:
        sys.exit("error: the dense row disagrees with the independent computation by more than 0.01 %")


def check_stored(
    run: Run, view: StageView, allocation: Allocation, layout: LayoutName, losses: Sequence[float], seq_len: int
) -> None:
    """Compare losses measured with masks with those of stored layers; more than 1 % off is a failure.

    All rows are measured by one masked model that computes with A and B; a checkpoint may hold pivoted layers, whose
    rounding is another one.
    """
    from ara.models.low_rank import apply_factors

    model, tokenizer = _model(run, view)
    apply_factors(model, allocation.low_rank(), factor_files(view, specs_of(view)), layout, run.report)
    masked = math.exp(sum(losses) / len(losses))
    stored = independent_perplexity(model, tokenizer, len(losses), seq_len)
    off = stored / masked - 1
    run.report.fact(f"ara, {layout}: {masked:.3f} with masks, {stored:.3f} as stored ({off:+.2%})")
    if abs(off) > 0.01:
        sys.exit("error: the stored layers disagree with the masks by more than 1 %")


def _model(run: Run, view: StageView) -> tuple[Any, Any]:
    """Return the dense model in the type of its factors, and its tokenizer."""
    import torch

    assert view.manifest is not None
    source = model_of(view, run)
    return source.load_model(getattr(torch, view.manifest.config["dtype"])), source.load_tokenizer()
