"""The finished pieces of ``ara eval``, and the results that are made from them.

A piece is one text or task of one model, stored as a JSON file of the stage; for a task it holds the answer to every
question. Conversations have two pieces per model: the generated answers, and the distances from the dense model. A run
that was interrupted, or in which a model gave NaN, resumes after its finished pieces.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
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
from ara.distributed.group import ALONE, Group
from ara.errors import CorruptedError
from ara.evaluation.perplexity import VariantRun
from ara.evaluation.tasks import Task, chosen_documents
from ara.jsonfile import dump, first_problem, read_object
from ara.progress import Reporter
from ara.stages.chats import Chat, chat_results
from ara.stages.common import NOT_PLAIN
from ara.stages.model_folders import ModelFolder
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
        store: gives the model as a checkpoint folder; one that is in no folder yet is written to the given one.
    """

    name: str
    load: Callable[[], PreTrainedModel]
    linear_keep: float
    figures: Mapping[str, int] | None = None
    disk_bytes: int | None = None
    store: Callable[[Path], ModelFolder] | None = None


class Pieces(ABC):
    """The pieces of an evaluation in the folder of its stage; subclasses measure those that are missing.

    Args:
        variants: models to measure; the dense one is called ``dense``.
        chosen: name of the model to compare with all others.
        questions: what to ask.
        config: settings with all automatic values resolved.
        stage: writer of the stage, resumable; ``None`` in other processes than the first.
        report: progress.
        group: processes that share the work. All call the same methods; process 0 stores the pieces.

    Attributes:
        runtime: title of the runtime that all models run in; ``None`` for torch.
    """

    runtime: str | None = None

    def __init__(
        self,
        variants: Sequence[Variant],
        chosen: str,
        questions: Questions,
        config: EvalConfig,
        stage: StageWriter | None,
        report: Reporter,
        group: Group = ALONE,
    ) -> None:
        assert config.seq_len is not None, "not resolved"
        self.variants, self.chosen, self.questions, self.config = variants, chosen, questions, config
        self._stage, self.report, self.group = stage, report, group
        # Names of the files of finished pieces, which all processes know.
        self._finished = set(group.broadcast(None if stage is None else stage.finished))
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

    @abstractmethod
    def run(self, dense_bytes: int) -> bool:
        """Measure all pieces that are missing; return whether the models ran interleaved.

        Args:
            dense_bytes: weight bytes of the dense model, the largest one, in the dtype of the run.

        Raises:
            NumericalError: a model gives NaN.
        """

    def results(self, interleaved: bool) -> EvaluationResults:
        """Return the figures of all models, texts and tasks, from the finished pieces; in process 0 alone.

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
            runtime=self.runtime,
        )

    @property
    def stage(self) -> StageWriter:
        """Writer of the stage, in process 0."""
        assert self._stage is not None, "only process 0 reads and writes pieces"
        return self._stage

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
        return self._file(piece, variant) in self._finished

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
        """Note that a piece is finished. Process 0 stores it; what ``row`` is in the others does not matter."""
        name = self._file(piece, variant)
        if self._stage is not None:
            self._stage.text(name, dump(row, name) + "\n")
        self._finished.add(name)

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


def text_figures(run: VariantRun) -> TextFigures:
    """Return the figures of one model on one text."""
    return TextFigures(
        **asdict(run.result),
        tokens_per_second=SpreadFigures(**asdict(run.tokens_per_second)),
        divergence=DivergenceFigures(**asdict(run.divergence)) if run.divergence else None,
    )
