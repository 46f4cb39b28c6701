"""Measures the models of ``ara eval`` in a runtime that reads checkpoint folders, one after the other."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ara.artifacts.evaluation import ModelPiece
from ara.config import EvalConfig
from ara.errors import UsageError
from ara.evaluation.generation import prompt_ids
from ara.evaluation.harness import ask_through
from ara.evaluation.perplexity import VariantRun, summarise
from ara.evaluation.runtime import RunningModel, Runtime
from ara.evaluation.timing import spread
from ara.models.placement import torch_dtype
from ara.stages.model_folders import ModelFolder
from ara.stages.pieces import Pieces, Variant, text_figures

# Folder for models that are in no folder yet, within the unfinished folder of the stage.
_ASIDE = "aside"


class MeasurementElsewhere(Pieces):
    """Measures checkpoint folders in another runtime; each model is gone before the next one is loaded.

    Args:
        runtime: runs the models.
        arguments: of :class:`Pieces`.
    """

    def __init__(self, runtime: Runtime, *arguments: Any) -> None:
        super().__init__(*arguments)
        assert not self.questions.chats, "conversations need logits"
        self._runtime, self.runtime = runtime, runtime.title

    def run(self, dense_bytes: int) -> bool:
        """Measure all pieces that are missing; return ``False``, since the models do not take turns.

        Raises:
            NumericalError: a model gives NaN.
            ModelError: the runtime cannot run a model.
        """
        for variant in self.variants:
            missing = [piece for piece in self._pieces() if not self._done(piece, variant)]
            if missing:
                self._measure(variant, missing)
        return False

    def _measure(self, variant: Variant, missing: Sequence[str]) -> None:
        assert variant.store is not None, variant.name
        aside = self.stage.folder / _ASIDE
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
        try:
            stored = variant.store(aside)
            self.report.fact(f"loading {variant.name} in {self._runtime.title}")
            with self._runtime.open(stored.folder, self.config.dtype) as model:
                for piece in missing:
                    self._keep(piece, variant, self._measured(piece, variant, model, stored))
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _measured(self, piece: str, variant: Variant, model: RunningModel, stored: ModelFolder) -> Any:
        """Return a piece as plain data."""
        if piece == "model":
            return self._figures(variant, model, stored).plain()
        if piece in self.windows:
            return text_figures(self._reading(piece, variant, model)).plain()
        (task,) = (task for task in self.questions.tasks if task.name == piece)
        label = f"{piece}, {variant.name}"
        score = ask_through(lambda: model.harness(self.report, label), task, self.documents[task.name], label)
        assert score is not None, "one process asks all questions"
        return asdict(score)

    def _figures(self, variant: Variant, model: RunningModel, stored: ModelFolder) -> ModelPiece:
        size = stored.parameters * torch_dtype(self.config.dtype).itemsize
        tokenizer, length = self.questions.tokenizer, self.config.max_new_tokens
        continued = tuple(
            str(tokenizer.decode(model.continuation(ids.tolist(), length), skip_special_tokens=True))
            for ids in (prompt_ids(tokenizer, prompt) for prompt in self.questions.prompts)
        )
        return ModelPiece(stored.parameters, size, variant.linear_keep, continued)

    def _reading(self, name: str, variant: Variant, model: RunningModel) -> VariantRun:
        """Read a text; the first batch is left out of the speed unless it is the only one."""
        nlls: list[float] = []
        speeds: list[float] = []
        windows = self.windows[name].ids
        with self.report.bar(f"Reading {name}, {variant.name}", len(windows)) as bar:
            for batch in windows.split(self.config.batch_size):
                start = time.perf_counter()
                nlls += model.window_nlls(batch)
                speeds.append(batch.numel() / max(time.perf_counter() - start, 1e-9))
                bar.advance(len(batch))
        return VariantRun(summarise(nlls, windows.shape[1], f"model {variant.name!r}"), spread(speeds[1:] or speeds))


def refuse_chats(config: EvalConfig, chats: Sequence[str]) -> None:
    """Refuse conversations, which need logits.

    Args:
        config: as the user gave it.
        chats: names of the conversations to measure.

    Raises:
        UsageError: there are some.
    """
    if chats:
        raise UsageError(
            f"--backend {config.backend} measures texts and tasks of lm-eval; {chats[0]} are conversations",
            "measure them in a second run with --backend torch",
        )
