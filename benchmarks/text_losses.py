"""Losses of models on the evaluation texts of a benchmark, window by window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ara.data.texts import load_documents
from ara.data.tokens import evaluation_windows
from ara.models.likelihood import nll_of_windows
from ara.models.scores import Head
from ara.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Perplexities; nothing is ever fitted to python-docs.
TEXTS = ("wikitext2", "c4", "python-docs")


class TextLosses:
    """The first evaluation windows of :data:`TEXTS`.

    Attributes:
        windows: text → token ids (w, t) int64.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, windows: int, seq_len: int, report: Reporter) -> None:
        self.report = report
        self.windows = {
            name: evaluation_windows(
                load_documents(name, "evaluation"), tokenizer, seq_len=seq_len, max_windows=windows
            ).ids
            for name in TEXTS
        }

    def of(self, model: PreTrainedModel, name: str) -> dict[str, Any]:
        """Return ``texts``: text → mean loss, and ``windows``: text → losses of the windows, in nats per token."""
        losses = {text: self._read(model, ids, f"{name}: {text}") for text, ids in self.windows.items()}
        return {"texts": {text: sum(found) / len(found) for text, found in losses.items()}, "windows": losses}

    @torch.inference_mode()
    def _read(self, model: PreTrainedModel, windows: torch.Tensor, label: str) -> list[float]:
        losses = nll_of_windows(Head(model).scores, windows, model.device, 1, self.report, label)
        found: list[float] = losses.tolist()
        return found
