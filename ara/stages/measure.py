"""What ``ara eval`` does with its models: texts in turn, tasks one by one; every finished piece is kept.

A piece is one text or task of one model, a JSON file of the stage; for a task it holds every question's answer. A run
that was stopped, or in which a model gave NaN, goes on behind the pieces that it has finished.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from ara.artifacts.base import Part
from ara.artifacts.evaluation import (
    DENSE,
    ContinuedPrompt,
    DivergenceFigures,
    EvaluationResults,
    MeanFigures,
    MeanResults,
    ModelFigures,
    ModelPiece,
    PairedDifference,
    SpreadFigures,
    TaskFigures,
    TaskPiece,
    TaskResults,
    TextFigures,
    TextResults,
)
from ara.config import EvalConfig
from ara.data.texts import Documents
from ara.data.tokens import evaluation_windows
from ara.errors import CorruptedError
from ara.evaluation.generation import greedy_continuation
from ara.evaluation.harness import ask
from ara.evaluation.paired import Difference, bootstrap_pairs, compare_pairs
from ara.evaluation.perplexity import VariantRun, interleaved_perplexity
from ara.evaluation.tasks import ZERO_SHOT, Task, chosen_documents
from ara.jsonfile import dump, first_problem, read_object
from ara.models.accounting import parameter_count, weight_bytes
from ara.progress import Reporter
from ara.stages.common import groups_in_memory
from ara.workspace.writer import StageWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

P = TypeVar("P", bound=Part)
# Words of a prompt, at most half of its document, and of the shortest document that gives one.
_PROMPT_WORDS = 24
_LEAST_WORDS = 8
# Characters of a name, of up to 3 bytes, in the name of a file, which takes 255 bytes; numbers keep apart what is cut.
_FILE_WORDS = 40
# What must not stand in the name of a file.
_NOT_PLAIN = re.compile(r"[^\w.-]")


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: dense, uniform, or the name of the checkpoint.
        load: brings the model into memory.
        linear_keep: fraction kept of the factorised layers' parameters.
        figures: parameters and bytes, where they cannot be counted on what ``load`` returns.
    """

    name: str
    load: Callable[[], PreTrainedModel]
    linear_keep: float
    figures: Mapping[str, int] | None = None


@dataclass(frozen=True, eq=False)
class Questions:
    """What all models are asked.

    Attributes:
        tokenizer: of the model.
        texts: name → text for perplexity.
        tasks: tasks of lm-eval.
        prompts: beginnings that every model continues.
        rows: of the models' embedding, if known.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: Mapping[str, Documents]
    tasks: Sequence[Task]
    prompts: Sequence[str]
    rows: int | None = None


class Measurement:
    """Measures models, and keeps every finished piece in the folder of the stage.

    Args:
        variants: rows of the table; the dense one is called ``dense``.
        chosen: name of the row that is compared with all others.
        questions: what to ask.
        config: resolved.
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
        """Measure all that is not there yet; return whether the models took turns.

        Args:
            dense_bytes: of the weights of the dense model, the largest one.

        Raises:
            NumericalError: a model gives NaN.
        """
        lost = ", and their distance from the dense model is not measured"
        groups = groups_in_memory(self.variants, dense_bytes, self.config.device, self.report, lost)
        for group in groups:
            if not all(self._done(piece, variant) for variant in group for piece in self._pieces()):
                self._measure(group)
                gc.collect()
        return len(groups) == 1

    def results(self, interleaved: bool, disk_bytes: int) -> EvaluationResults:
        """Return the figures of all models, texts and tasks, from the finished pieces.

        Args:
            interleaved: whether the models took turns.
            disk_bytes: of the chosen checkpoint.

        Raises:
            CorruptedError: a piece is not what this version writes for these questions.
        """
        models = {variant.name: self._read("model", variant, ModelPiece) for variant in self.variants}
        if any(len(row.continuations) != len(self.questions.prompts) for row in models.values()):
            raise CorruptedError(f"{self.stage.folder} holds continuations of other prompts", self._again)
        dense = models[DENSE].parameters
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
                    disk_bytes=disk_bytes if name == self.chosen else None,
                )
                for name, row in models.items()
            },
            tasks={**{name: self._text(name) for name in self.windows}, **tasks},
            continuations=tuple(
                ContinuedPrompt(prompt, {name: row.continuations[number] for name, row in models.items()})
                for number, prompt in enumerate(self.questions.prompts)
            ),
            zero_shot=mean_accuracy(tasks, answers, list(models), self.chosen),
            interleaved=interleaved,
        )

    # -- pieces -------------------------------------------------------------------------------------------------

    def _pieces(self) -> list[str]:
        return ["model", *self.questions.texts, *(task.name for task in self.questions.tasks)]

    def _file(self, piece: str, variant: Variant) -> str:
        """Name the file of a piece; the numbers keep names apart that differ in what a file name cannot hold."""
        row = self.variants.index(variant)
        words = Path(piece.removeprefix("file:")).stem if piece.startswith("file:") else piece
        number = self._pieces().index(piece)
        names = [_NOT_PLAIN.sub("_", name)[:_FILE_WORDS] for name in (words, variant.name)]
        return f"{number:02d}-{names[0]}.{row}-{names[1]}.json"

    def _done(self, piece: str, variant: Variant) -> bool:
        return self._file(piece, variant) in self.stage.finished

    @property
    def _again(self) -> str:
        return f"delete {self.stage.folder} and run the same command again"

    def _read(self, piece: str, variant: Variant, form: type[P]) -> P:
        """Return a finished piece, which an earlier run may have written, or somebody else.

        Raises:
            CorruptedError: it is not what this version writes.
        """
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
        """Load the models of one group and measure them; they are out of memory again when this returns."""
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

    def _figures(self, variant: Variant, model: PreTrainedModel) -> ModelPiece:
        counted = variant.figures or {"parameters": parameter_count(model), "weight_bytes": weight_bytes(model)}
        tokenizer, length = self.questions.tokenizer, self.config.max_new_tokens
        continued = tuple(
            greedy_continuation(model, tokenizer, prompt, length, f"{variant.name} behind “{shorten(prompt, 40)}”")
            for prompt in self.questions.prompts
        )
        return ModelPiece(**counted, linear_keep=variant.linear_keep, continuations=continued)

    # -- results ------------------------------------------------------------------------------------------------

    def _text(self, name: str) -> TextResults:
        """Return the figures of one text."""
        windows = self.windows[name]
        models = {variant.name: self._read(name, variant, TextFigures) for variant in self.variants}
        return TextResults("text", self.questions.texts[name].origin, windows.windows, windows.seq_len, models)

    def _answers(self, task: Task) -> dict[str, TaskPiece]:
        rows = {variant.name: self._read(task.name, variant, TaskPiece) for variant in self.variants}
        first = next(iter(rows.values()))
        if not all(row.fits(first.headline, len(first.answers)) for row in rows.values()):
            raise CorruptedError(f"{self.stage.folder} holds answers to other questions of {task.name}", self._again)
        return rows


def task_results(task: Task, rows: Mapping[str, TaskPiece], chosen: str, seed: int) -> TaskResults:
    """Return one task's figures, and how the chosen model compares with all others.

    Args:
        task: of lm-eval.
        rows: model → its answers.
        chosen: name of the compressed model.
        seed: by which the questions were drawn.
    """
    metric = next(iter(rows.values())).headline
    higher = task.definition.higher_is_better().get(metric) is not False
    dense = rows[DENSE].metrics[metric] if DENSE in rows and higher else None
    models = {
        name: TaskFigures(
            value=row.metrics[metric],
            stderr=row.stderrs[metric],
            # Of a mean of questions only, and where more is better: a share of a perplexity or error says nothing.
            retained=row.metrics[metric] / dense if dense and row.stderrs[metric] is not None else None,
            metrics=row.metrics,
            stderrs=row.stderrs,
        )
        for name, row in rows.items()
    }
    compared = {}
    if all(row.stderrs[metric] is not None for row in rows.values()):
        ours = rows[chosen].values(metric)
        compared = {
            name: _difference(compare_pairs(ours, row.values(metric))) for name, row in rows.items() if name != chosen
        }
    return TaskResults(
        kind="harness",
        text=task.origin,
        metric=metric,
        examples=len(rows[chosen].answers),
        of=task.documents,
        seed=seed,
        models=models,
        compared=compared,
    )


def mean_accuracy(
    tasks: Mapping[str, TaskResults],
    answers: Mapping[str, Mapping[str, TaskPiece]],
    models: Sequence[str],
    chosen: str,
) -> MeanResults | None:
    """Return the mean accuracy over tasks, each counting the same, or ``None`` if fewer than two have one.

    With all of :data:`ZERO_SHOT` among the tasks it is taken over these alone, as in the papers.

    Args:
        tasks: task → its figures.
        answers: task → model → its answers.
        models: names of the rows.
        chosen: the one that is compared with all others.
    """
    names = [
        name
        for name, task in tasks.items()
        if task.metric == "acc" and all(row.stderr is not None for row in task.models.values())
    ]
    if set(ZERO_SHOT) <= set(names):
        names = list(ZERO_SHOT)
    if len(names) < 2:
        return None

    def mean(model: str) -> float:
        return sum(tasks[name].models[model].value for name in names) / len(names)

    def stderr(model: str) -> float:
        return math.hypot(*(tasks[name].models[model].stderr or 0.0 for name in names)) / len(names)

    def pairs(other: str) -> dict[str, tuple[list[float], list[float]]]:
        return {name: (answers[name][chosen].values("acc"), answers[name][other].values("acc")) for name in names}

    return MeanResults(
        tasks=tuple(names),
        models={
            model: MeanFigures(
                mean=mean(model),
                stderr=stderr(model),
                retained=mean(model) / mean(DENSE) if DENSE in models and mean(DENSE) else None,
            )
            for model in models
        },
        compared={other: _difference(bootstrap_pairs(pairs(other))) for other in models if other != chosen},
    )


def prompts_of(
    texts: Mapping[str, Documents], count: int, tokenizer: PreTrainedTokenizerBase, room: int | None
) -> list[str]:
    """Return the beginnings of ``count`` documents of the first text.

    Args:
        texts: to be measured.
        count: at most so many.
        tokenizer: of the model.
        room: most tokens of a prompt, with which its continuation fits into the context; ``None``: no limit.
    """
    prompts: list[str] = []
    for text in next(iter(texts.values())).documents if texts else ():
        words = text.split(maxsplit=2 * _PROMPT_WORDS)  # a text of one document may have millions
        prompt = " ".join(words[: min(_PROMPT_WORDS, len(words) // 2)])
        if len(prompts) == count:
            break
        if len(words) >= _LEAST_WORDS and (room is None or len(tokenizer(prompt)["input_ids"]) <= room):
            prompts.append(prompt)
    return prompts


def _difference(found: Difference) -> PairedDifference:
    return PairedDifference(**asdict(found))


def _text_figures(run: VariantRun) -> TextFigures:
    return TextFigures(
        **asdict(run.result),
        tokens_per_second=SpreadFigures(**asdict(run.tokens_per_second)),
        divergence=DivergenceFigures(**asdict(run.divergence)) if run.divergence else None,
    )
