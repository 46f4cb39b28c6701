"""Measures the models of ``ara eval`` piece by piece, and keeps every finished piece.

A piece is one text or task of one model, stored as a JSON file of the stage; for a task it holds the answer to every
question. Conversations have two pieces per model: the generated answers, and the distances from the dense model. A run
that was interrupted, or in which a model gave NaN, resumes after its finished pieces.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from ara.artifacts.base import Part
from ara.artifacts.evaluation import (
    DENSE,
    ChatResults,
    ContinuedPrompt,
    DistancesPiece,
    DivergenceFigures,
    EvaluationResults,
    ModelFigures,
    ModelPiece,
    OpeningsPiece,
    SpreadFigures,
    TaskPiece,
    TextFigures,
    TextResults,
)
from ara.config import EvalConfig
from ara.data.filespecs import is_file
from ara.data.tokens import evaluation_windows
from ara.errors import CorruptedError
from ara.evaluation.chat import answer_distances
from ara.evaluation.generation import greedy_continuation
from ara.evaluation.harness import ask
from ara.evaluation.perplexity import VariantRun, interleaved_perplexity
from ara.evaluation.tasks import Task, chosen_documents
from ara.jsonfile import dump, first_problem, read_object
from ara.models.accounting import parameter_count, weight_bytes
from ara.progress import Reporter
from ara.stages.chats import Chat, chat_results, openings
from ara.stages.common import NOT_PLAIN, groups_in_memory
from ara.stages.questions import Questions
from ara.stages.scores import mean_accuracy, task_results
from ara.workspace.writer import StageWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

P = TypeVar("P", bound=Part)
# Characters of a name that a file name takes over: each has up to 3 bytes, and a file name at most 255.
_NAME_CHARACTERS = 40


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: dense, uniform, or the name of the checkpoint.
        load: loads the model.
        linear_keep: fraction kept of the factorised layers' parameters.
        figures: parameters and weight bytes, if they cannot be counted on what ``load`` returns.
        disk_bytes: of the stored weights of a checkpoint.
    """

    name: str
    load: Callable[[], PreTrainedModel]
    linear_keep: float
    figures: Mapping[str, int] | None = None
    disk_bytes: int | None = None


class Measurement:
    """Measures models, and keeps every finished piece in the folder of the stage.

    Args:
        variants: models to measure; the dense one is called ``dense``.
        chosen: name of the model to compare with all others.
        questions: what to ask.
        config: settings with all automatic values resolved.
        stage: writer of the stage, resumable.
        report: progress.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        chosen: str,
        questions: Questions,
        config: EvalConfig,
        stage: StageWriter,
        report: Reporter,
    ) -> None:
        assert config.seq_len is not None, "not resolved"
        self.variants, self.chosen, self.questions, self.config = variants, chosen, questions, config
        self.stage, self.report = stage, report
        self.windows = {
            name: evaluation_windows(
                documents,
                questions.tokenizer,
                seq_len=config.seq_len,
                max_windows=config.max_windows,
                rows=questions.rows,
            )
            for name, documents in questions.texts.items()
        }
        self.documents = {
            task.name: chosen_documents(task.name, task.documents, config.limit, config.seed)
            for task in questions.tasks
        }

    def run(self, dense_bytes: int) -> bool:
        """Measure all pieces that are missing; return whether the models ran interleaved.

        Args:
            dense_bytes: weight bytes of the dense model, the largest one.

        Raises:
            NumericalError: a model gives NaN.
        """
        lost = ", and the divergence from the dense model is not measured"
        groups = groups_in_memory(self.variants, dense_bytes, self.config.device, self.report, lost)
        for group in groups:
            if not all(self._done(piece, variant) for variant in group for piece in self._pieces()):
                self._measure(group)
                gc.collect()
        return len(groups) == 1

    def results(self, interleaved: bool) -> EvaluationResults:
        """Return the figures of all models, texts and tasks, from the finished pieces.

        Args:
            interleaved: whether the models ran interleaved.

        Raises:
            CorruptedError: a piece does not belong to these questions or has another form.
        """
        models = {variant.name: self._read("model", variant, ModelPiece) for variant in self.variants}
        if any(len(row.continuations) != len(self.questions.prompts) for row in models.values()):
            raise CorruptedError(f"{self.stage.folder} holds continuations of other prompts", self._again)
        dense = models[DENSE].parameters
        stored = {variant.name: variant.disk_bytes for variant in self.variants}
        answers = {task.name: self._answers(task) for task in self.questions.tasks}
        tasks = {
            task.name: task_results(task, answers[task.name], self.chosen, self.config.seed)
            for task in self.questions.tasks
        }
        return EvaluationResults(
            chosen=self.chosen,
            variants={
                name: ModelFigures(
                    parameters=row.parameters,
                    weight_bytes=row.weight_bytes,
                    linear_keep=row.linear_keep,
                    model_keep=row.parameters / dense,
                    disk_bytes=stored[name],
                )
                for name, row in models.items()
            },
            tasks={
                **{name: self._text(name) for name in self.windows},
                **{chat.name: self._chat(chat) for chat in self.questions.chats},
                **tasks,
            },
            continuations=tuple(
                ContinuedPrompt(prompt, {name: row.continuations[number] for name, row in models.items()})
                for number, prompt in enumerate(self.questions.prompts)
            ),
            zero_shot=mean_accuracy(tasks, answers, list(models), self.chosen),
            interleaved=interleaved,
        )

    # -- pieces -------------------------------------------------------------------------------------------------

    def _pieces(self) -> list[str]:
        questions = self.questions
        chats = [piece for chat in questions.chats for piece in (chat.openings_piece, chat.distances_piece)]
        return ["model", *questions.texts, *(task.name for task in questions.tasks), *chats]

    def _file(self, piece: str, variant: Variant) -> str:
        """Return the file name of a piece; its numbers distinguish names that differ only in replaced characters."""
        row = self.variants.index(variant)
        words = Path(piece.partition(":")[2]).stem if is_file(piece) else piece
        number = self._pieces().index(piece)
        names = [NOT_PLAIN.sub("_", name)[:_NAME_CHARACTERS] for name in (words, variant.name)]
        return f"{number:02d}-{names[0]}.{row}-{names[1]}.json"

    def _done(self, piece: str, variant: Variant) -> bool:
        return self._file(piece, variant) in self.stage.finished

    @property
    def _again(self) -> str:
        return f"delete {self.stage.folder} and run the same command again"

    def _read(self, piece: str, variant: Variant, form: type[P]) -> P:
        """Return a finished piece; raise :class:`CorruptedError` if it is not in the form that this version writes."""
        path = self.stage.folder / self._file(piece, variant)
        found = read_object(path, self._again, CorruptedError, finite=True)
        try:
            return form.parse(found)
        except ValidationError as error:
            raise CorruptedError(f"{path}: {first_problem(error)}", self._again) from None

    def _keep(self, piece: str, variant: Variant, row: Any) -> None:
        self.stage.text(self._file(piece, variant), dump(row, self._file(piece, variant)) + "\n")

    # -- measuring ----------------------------------------------------------------------------------------------

    def _measure(self, group: Sequence[Variant]) -> None:
        """Load the models of one group, measure them, and release them."""
        self.report.fact(f"loading {', '.join(variant.name for variant in group)}")
        models = {variant.name: variant.load() for variant in group}
        for variant in group:
            if not self._done("model", variant):
                self._keep("model", variant, self._figures(variant, models[variant.name]).plain())
        for name, windows in self.windows.items():
            if all(self._done(name, variant) for variant in group):
                continue
            found = interleaved_perplexity(
                models,
                windows.ids,
                batch_size=self.config.batch_size,
                reference=DENSE if DENSE in models and len(models) > 1 else None,
                report=self.report,
                label=f"Reading {name}",
            )
            for variant in group:
                self._keep(name, variant, _text_figures(found[variant.name]).plain())
        for chat in self.questions.chats:
            self._measure_chat(chat, group, models)
        for task in self.questions.tasks:
            for variant in group:
                if not self._done(task.name, variant):
                    score = ask(
                        models[variant.name],
                        self.questions.tokenizer,
                        task,
                        self.documents[task.name],
                        batch_size=self.config.batch_size,
                        report=self.report,
                        label=f"{task.name}, {variant.name}",
                    )
                    self._keep(task.name, variant, asdict(score))

    def _measure_chat(self, chat: Chat, group: Sequence[Variant], models: Mapping[str, PreTrainedModel]) -> None:
        """Generate the answers of every model, then let all models read the same answers."""
        length = self.config.max_new_tokens
        for variant in group:
            if not self._done(chat.openings_piece, variant):
                model = models[variant.name]
                found = openings(chat, variant.name, model, self.questions.tokenizer, length, self.report)
                self._keep(chat.openings_piece, variant, found.plain())
        if all(self._done(chat.distances_piece, variant) for variant in group):
            return
        distances: Mapping[str, Sequence[tuple[float, float]]] = {}
        if DENSE in models and len(models) > 1:
            readings = chat.readings(self._openings(chat)[DENSE])
            distances = answer_distances(models, readings, DENSE, self.report, f"Reading answers of {chat.name}")
        for variant in group:
            row = distances.get(variant.name)
            self._keep(chat.distances_piece, variant, DistancesPiece(None if row is None else tuple(row)).plain())

    def _figures(self, variant: Variant, model: PreTrainedModel) -> ModelPiece:
        counted = variant.figures or {"parameters": parameter_count(model), "weight_bytes": weight_bytes(model)}
        tokenizer, length = self.questions.tokenizer, self.config.max_new_tokens
        continued = tuple(
            greedy_continuation(model, tokenizer, prompt, length, f"{variant.name} after “{shorten(prompt, 40)}”")
            for prompt in self.questions.prompts
        )
        return ModelPiece(**counted, linear_keep=variant.linear_keep, continuations=continued)

    # -- results ------------------------------------------------------------------------------------------------

    def _text(self, name: str) -> TextResults:
        windows = self.windows[name]
        models = {variant.name: self._read(name, variant, TextFigures) for variant in self.variants}
        return TextResults("text", self.questions.texts[name].origin, windows.windows, windows.seq_len, models)

    def _openings(self, chat: Chat) -> dict[str, OpeningsPiece]:
        """Return the generated answers of all models that have theirs."""
        rows = {
            variant.name: self._read(chat.openings_piece, variant, OpeningsPiece)
            for variant in self.variants
            if self._done(chat.openings_piece, variant)
        }
        if not all(chat.fits(row, name) for name, row in rows.items()):
            raise CorruptedError(
                f"{self.stage.folder} holds answers to other conversations of {chat.name}", self._again
            )
        return rows

    def _chat(self, chat: Chat) -> ChatResults:
        opened = self._openings(chat)
        rows = {variant.name: self._read(chat.distances_piece, variant, DistancesPiece) for variant in self.variants}
        counts = {len(row.distances) for row in rows.values() if row.distances is not None}
        if counts - {len(chat.questions)}:
            raise CorruptedError(f"{self.stage.folder} holds other conversations of {chat.name}", self._again)
        return chat_results(chat, opened, rows, self.config)

    def _answers(self, task: Task) -> dict[str, TaskPiece]:
        rows = {variant.name: self._read(task.name, variant, TaskPiece) for variant in self.variants}
        first = next(iter(rows.values()))
        if not all(row.fits(first.headline, len(first.answers)) for row in rows.values()):
            raise CorruptedError(f"{self.stage.folder} holds answers to other questions of {task.name}", self._again)
        return rows


def _text_figures(run: VariantRun) -> TextFigures:
    return TextFigures(
        **asdict(run.result),
        tokens_per_second=SpreadFigures(**asdict(run.tokens_per_second)),
        divergence=DivergenceFigures(**asdict(run.divergence)) if run.divergence else None,
    )
