"""START HERE: the kinds of results, and the stages that make one kind from others.

::

    model + text ──decompose──▶ factors ──(train-masks)──▶ training
                                   │                          │
                                   ├──────allocate ◀──────────┘
                                   ▼          │
                                truncate ◀── ranks
                                   │
                              checkpoint ──▶ eval, export

``ara run``, ``ara status``, the next command, the folders of a workspace and the documentation follow this table. A
stage asks for a kind and never for another stage, so a second stage that writes checkpoints is one line here and its
own file.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class TypedResults(Protocol):
    """What the workspace asks the results class of a kind; see :class:`ara.artifacts.base.Results`."""

    def problem(self, manifest: Any) -> str | None:
        """Return in one line what is wrong with settings, results or tensors of a manifest, or ``None``."""

    def unfinished_problem(self, results: Mapping[str, Any]) -> str | None:
        """Return what is wrong with the results of unfinished work, or ``None``."""


@dataclass(frozen=True)
class Kind:
    """What a result is, whichever stage made it.

    Attributes:
        name: of the kind.
        argument: name of the argument, and of the option, by which a stage is given one by name.
        results: ``"package.module:Class"`` of its typed results, imported on first use.
    """

    name: str
    argument: str
    results: str

    @property
    def option(self) -> str:
        """The option that names one, such as ``--checkpoint``."""
        return f"--{self.argument}"

    def load(self) -> TypedResults:
        """Import and return the class of the results."""
        found: TypedResults = _load(self.results)
        return found


@dataclass(frozen=True)
class Stage:
    """One line of the pipeline.

    Attributes:
        name: of the command and of the workspace folder.
        title: one line for ``ara --help``.
        run: ``"package.module:function"``, imported on first use. The function takes config and
            :class:`ara.stages.common.Run`, and the result that it builds on by the argument of the first consumed kind.
        consumes: kinds that a result may be made from, the one that the stage builds on first.
        produces: kind of the result.
        flow: what goes in and what comes out, in words, for ``ara --help``.
        optional: whether the pipeline is complete without it.
        aside: whether it measures or shows only, and is no step of the pipeline.
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
        return _load(self.run)


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

# In the order in which people run them.
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
        "Learn which ranks matter",
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
        "eval",
        "Measure dense, uniform and chosen side by side",
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
        consumes=(
            "checkpoint",
            "factors",
            "training",
            "ranks",
            "graph",
            "evaluation",
            "comparison",
            "benchmark",
        ),
        produces="report",
        aside=True,
    ),
)


def stages() -> tuple[Stage, ...]:
    """Return all stages in their order."""
    return STAGES


def steps() -> tuple[Stage, ...]:
    """Return the stages of the pipeline itself, without those that stand aside."""
    return tuple(stage for stage in stages() if not stage.aside)


def stage_named(name: str) -> Stage | None:
    """Return the stage called ``name``, or ``None``."""
    return next((stage for stage in stages() if stage.name == name), None)


def kind_named(name: str) -> Kind:
    """Return the kind called ``name``."""
    return next(kind for kind in KINDS if kind.name == name)


def kind_of(stage: str) -> Kind | None:
    """Return the kind of result that the stage of this name makes; ``None`` if there is no such stage."""
    found = stage_named(stage)
    return None if found is None else kind_named(found.produces)


def producers(kind: str) -> tuple[str, ...]:
    """Return the names of the stages that make results of a kind."""
    return tuple(stage.name for stage in stages() if stage.produces == kind)


def may_be_made_from(stage: str, parent: str) -> bool:
    """Tell whether a result of ``stage`` may be made from one of the stage ``parent``."""
    child, source = stage_named(stage), stage_named(parent)
    return child is not None and source is not None and source.produces in child.consumes


def next_stage(name: str) -> Stage | None:
    """Return the step of the pipeline that a result of the stage called ``name`` leads to, if there is one."""
    order = [stage.name for stage in stages()]
    after = stages()[order.index(name) + 1 :]
    made = stages()[order.index(name)].produces
    return next((stage for stage in after if made in stage.consumes and not stage.optional and not stage.aside), None)


def naming_words(stage: str, name: str) -> list[str]:
    """Return the option that names a result on the command line: ``--checkpoint NAME``, or ``--from STAGE/NAME``."""
    kind = kind_of(stage)
    assert kind is not None, stage
    return [kind.option, name] if producers(kind.name)[0] == stage else ["--from", f"{stage}/{name}"]


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
