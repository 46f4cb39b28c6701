"""START HERE: the kinds of results, and the stages that make one kind from others.

::

    model + text ──decompose──▶ factors ──(train-masks)──▶ training
                                   │                          │
                                   ├──────allocate ◀──────────┘
                                   ▼          │
                                truncate ◀── ranks
                                   │
                              checkpoint ──▶ eval, export
                                 │    ▲
                                 └ recover, (quantise)

``ara run``, ``ara status``, the suggested next command, the folders of a workspace and the documentation follow this
table. A stage consumes kinds and never names another stage. So a second stage that writes checkpoints needs one entry
here and its own file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ara.registry import import_object


class TypedResults(Protocol):
    """What the workspace needs from the results class of a kind; see :class:`ara.artifacts.base.Results`."""

    def problem(self, manifest: Any) -> str | None:
        """Return the problem with settings, results or tensors of a manifest in one line, or ``None``."""

    def unfinished_problem(self, results: Mapping[str, Any]) -> str | None:
        """Return the problem with the results of unfinished work, or ``None``."""


@dataclass(frozen=True)
class Kind:
    """A kind of result; several stages may produce the same kind.

    Attributes:
        name: of the kind.
        argument: name of the argument and option that select a result of this kind by name.
        results: ``"package.module:Class"`` of its typed results, imported on first use.
    """

    name: str
    argument: str
    results: str

    @property
    def option(self) -> str:
        """The option that selects a result, such as ``--checkpoint``."""
        return f"--{self.argument}"

    def load(self) -> TypedResults:
        """Import and return the class of the results."""
        found: TypedResults = import_object(self.results)
        return found


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        name: of the command and of the workspace folder.
        title: one line for ``ara --help``.
        run: ``"package.module:function"``, imported on first use. The function takes a config, a
            :class:`ara.stages.common.Run`, and its main input as the argument of the first consumed kind.
        consumes: kinds that a result may be made from; the main input is first.
        produces: kind of the result.
        flow: inputs and outputs in words, for ``ara --help``.
        optional: whether the pipeline is complete without it.
        aside: whether it only measures or shows, and is no step of the pipeline.
    """

    name: str
    title: str
    run: str
    consumes: tuple[str, ...]
    produces: str
    flow: str = ""
    optional: bool = False
    aside: bool = False

    @property
    def help(self) -> str:
        """The line of ``ara --help``."""
        return f"{self.title}: {self.flow}" if self.flow else self.title

    def load(self) -> Any:
        """Import and return the function."""
        return import_object(self.run)


KINDS: tuple[Kind, ...] = (
    Kind("factors", "factors", "ara.artifacts.factors:FactorsResults"),
    Kind("training", "masks", "ara.artifacts.training:TrainingResults"),
    Kind("ranks", "allocation", "ara.artifacts.ranks:RanksResults"),
    Kind("checkpoint", "checkpoint", "ara.artifacts.checkpoint:CheckpointResults"),
    Kind("graph", "export", "ara.artifacts.graph:GraphResults"),
    Kind("evaluation", "evaluation", "ara.artifacts.evaluation:EvaluationResults"),
    Kind("comparison", "comparison", "ara.artifacts.comparison:ComparisonResults"),
    Kind("benchmark", "benchmark", "ara.artifacts.benchmark:BenchmarkResults"),
    Kind("report", "report", "ara.artifacts.report:ReportResults"),
)

# In the order in which users run them.
STAGES: tuple[Stage, ...] = (
    Stage(
        "decompose",
        "Factor every linear layer once",
        "ara.stages.decompose:decompose",
        consumes=(),
        produces="factors",
        flow="model, text → factors",
    ),
    Stage(
        "train-masks",
        "Learn the loss of every rank",
        "ara.stages.train_masks:train_masks",
        consumes=("factors",),
        produces="training",
        flow="factors, text → masks",
        optional=True,
    ),
    Stage(
        "allocate",
        "Give every layer a rank under one budget",
        "ara.stages.allocate:allocate",
        consumes=("factors", "training"),
        produces="ranks",
        flow="factors, text → ranks",
    ),
    Stage(
        "truncate",
        "Write the compressed checkpoint",
        "ara.stages.truncate:truncate",
        consumes=("ranks", "factors"),
        produces="checkpoint",
        flow="factors, ranks, model → checkpoint",
    ),
    Stage(
        "recover",
        "Repair the values of a compressed checkpoint",
        "ara.stages.recover:recover",
        consumes=("checkpoint", "factors"),
        produces="checkpoint",
        flow="checkpoint, factors, model, text → checkpoint",
    ),
    Stage(
        "quantise",
        "Round a compressed checkpoint to few bits",
        "ara.stages.quantise:quantise",
        consumes=("checkpoint", "factors"),
        produces="checkpoint",
        flow="checkpoint, text → checkpoint",
        optional=True,
    ),
    Stage(
        "eval",
        "Compare compressed, dense and uniform models",
        "ara.stages.evaluate:evaluate",
        consumes=("checkpoint", "factors", "graph"),
        produces="evaluation",
        flow="checkpoint, text → results",
    ),
    Stage(
        "export",
        "Write the model for another runtime",
        "export.stage:export",
        consumes=("checkpoint",),
        produces="graph",
        flow="checkpoint → ONNX graph",
        optional=True,
    ),
    Stage(
        "compare",
        "All allocators side by side: loss, perplexity, cost, a picture of their ranks",
        "ara.stages.compare:compare",
        consumes=("factors", "training"),
        produces="comparison",
        aside=True,
    ),
    Stage(
        "bench",
        "Speed, memory and size of the dense and the compressed model, in turn in one run",
        "ara.stages.bench:bench",
        consumes=("checkpoint", "factors", "graph"),
        produces="benchmark",
        aside=True,
    ),
    Stage(
        "report",
        "One page about a checkpoint: sizes, quality, speed, ranks; and a model card",
        "ara.stages.report:report",
        consumes=("checkpoint", "factors", "training", "ranks", "graph", "evaluation", "comparison", "benchmark"),
        produces="report",
        aside=True,
    ),
)


def stages() -> tuple[Stage, ...]:
    """Return all stages in their order."""
    return STAGES


def steps() -> tuple[Stage, ...]:
    """Return the stages that are steps of the pipeline."""
    return tuple(stage for stage in stages() if not stage.aside)


def stage_named(name: str) -> Stage | None:
    """Return the stage called ``name``, or ``None``."""
    return next((stage for stage in stages() if stage.name == name), None)


def kind_named(name: str) -> Kind:
    """Return the kind called ``name``."""
    return next(kind for kind in KINDS if kind.name == name)


def kind_of(stage: str) -> Kind | None:
    """Return the kind that the stage called ``stage`` produces, or ``None`` if there is no such stage."""
    found = stage_named(stage)
    return None if found is None else kind_named(found.produces)


def producers(kind: str) -> tuple[str, ...]:
    """Return the names of the stages that produce a kind."""
    return tuple(stage.name for stage in stages() if stage.produces == kind)


def makers(kind: str) -> tuple[str, ...]:
    """Return the names of the stages that make a kind without having one already."""
    return tuple(stage.name for stage in stages() if stage.produces == kind and kind not in stage.consumes)


def may_be_made_from(stage: str, parent: str) -> bool:
    """Tell whether a result of ``stage`` may be made from a result of ``parent``."""
    child, source = stage_named(stage), stage_named(parent)
    return child is not None and source is not None and source.produces in child.consumes


def next_stage(name: str) -> Stage | None:
    """Return the next step of the pipeline after the stage called ``name``, if there is one."""
    position = [stage.name for stage in stages()].index(name)
    made, after = stages()[position].produces, stages()[position + 1 :]
    return next((stage for stage in after if made in stage.consumes and not stage.optional and not stage.aside), None)


def naming_words(stage: str, name: str) -> list[str]:
    """Return the option that selects a result: ``--checkpoint NAME``, or ``--from STAGE/NAME``."""
    kind = kind_of(stage)
    assert kind is not None, stage
    return [kind.option, name] if producers(kind.name)[0] == stage else ["--from", f"{stage}/{name}"]
