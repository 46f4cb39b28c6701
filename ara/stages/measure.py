"""Measures the models of ``ara eval`` in the memory of this process, interleaved if they fit together."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from textwrap import shorten
from typing import TYPE_CHECKING

from ara.artifacts.evaluation import DENSE, DistancesPiece, ModelPiece
from ara.evaluation.chat import answer_distances
from ara.evaluation.generation import greedy_continuation
from ara.evaluation.harness import ask
from ara.evaluation.perplexity import interleaved_perplexity
from ara.models.accounting import parameter_count, weight_bytes
from ara.stages.chats import Chat, openings
from ara.stages.common import groups_in_memory
from ara.stages.pieces import Pieces, Variant, text_figures

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Measurement(Pieces):
    """Measures models of transformers, and others that are called like them."""

    def run(self, dense_bytes: int) -> bool:
        """Measure all pieces that are missing; return whether the models ran interleaved.

        Args:
            dense_bytes: weight bytes of the dense model, the largest one, in the dtype of the run.

        Raises:
            NumericalError: a model gives NaN.
        """
        lost = ", and the divergence from the dense model is not measured"
        numbers = groups_in_memory(range(len(self.variants)), dense_bytes, self.config.device, self.report, lost)
        # The memory of process 0 decides.
        together = [[self.variants[number] for number in group] for group in self.group.broadcast(numbers)]
        for variants in together:
            if not all(self._done(piece, variant) for variant in variants for piece in self._pieces()):
                self._measure(variants)
                gc.collect()
        return len(together) == 1

    def _measure(self, variants: Sequence[Variant]) -> None:
        """Load models, measure them, and release them."""
        self.report.fact(f"loading {', '.join(variant.name for variant in variants)}")
        models = {variant.name: variant.load() for variant in variants}
        for variant in variants:
            if not self._done("model", variant):
                figures = self._figures(variant, models[variant.name]).plain() if self.group.writes else None
                self._keep("model", variant, figures)
        for name, windows in self.windows.items():
            if all(self._done(name, variant) for variant in variants):
                continue
            found = interleaved_perplexity(
                models,
                windows.ids,
                batch_size=self.config.batch_size,
                reference=DENSE if DENSE in models and len(models) > 1 else None,
                report=self.report,
                label=f"Reading {name}",
                group=self.group,
            )
            for variant in variants:
                self._keep(name, variant, text_figures(found[variant.name]).plain() if found else None)
        for chat in self.questions.chats:
            self._measure_chat(chat, variants, models)
        for task in self.questions.tasks:
            for variant in variants:
                if not self._done(task.name, variant):
                    score = ask(
                        models[variant.name],
                        self.questions.tokenizer,
                        task,
                        self.documents[task.name],
                        batch_size=self.config.batch_size,
                        report=self.report,
                        label=f"{task.name}, {variant.name}",
                        group=self.group,
                    )
                    self._keep(task.name, variant, None if score is None else asdict(score))

    def _measure_chat(self, chat: Chat, variants: Sequence[Variant], models: Mapping[str, PreTrainedModel]) -> None:
        """Generate the answers of every model, then let all models read the same answers."""
        length = self.config.max_new_tokens
        for variant in variants:
            if not self._done(chat.openings_piece, variant):
                model = models[variant.name]
                found = openings(chat, variant.name, model, self.questions.tokenizer, length, self.report, self.group)
                self._keep(chat.openings_piece, variant, found.plain())
        if all(self._done(chat.distances_piece, variant) for variant in variants):
            return
        distances: Mapping[str, Sequence[tuple[float, float]]] = {}
        if DENSE in models and len(models) > 1:
            opened = self.group.broadcast(self._openings(chat)[DENSE] if self.group.writes else None)
            label = f"Reading answers of {chat.name}"
            distances = answer_distances(models, chat.readings(opened), DENSE, self.report, label, self.group)
        for variant in variants:
            row = distances.get(variant.name)
            piece = DistancesPiece(None if row is None else tuple(row))
            self._keep(chat.distances_piece, variant, piece.plain())

    def _figures(self, variant: Variant, model: PreTrainedModel) -> ModelPiece:
        counted = variant.figures or {"parameters": parameter_count(model), "weight_bytes": weight_bytes(model)}
        tokenizer, length = self.questions.tokenizer, self.config.max_new_tokens
        continued = tuple(
            greedy_continuation(model, tokenizer, prompt, length, f"{variant.name} after “{shorten(prompt, 40)}”")
            for prompt in self.questions.prompts
        )
        return ModelPiece(**counted, linear_keep=variant.linear_keep, continuations=continued)
