"""From manifests to the :class:`~ara.reporting.document.Report` of one checkpoint.

Nothing is measured here. The report lists what is missing, with the commands that add it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from ara.artifacts.checkpoint import CheckpointResults, CheckpointSettings
from ara.artifacts.evaluation import UNIFORM
from ara.artifacts.report import MissingPart
from ara.data.filespecs import split_items, split_share
from ara.errors import CorruptedError
from ara.models.multimodal import reads_text_alone
from ara.pipeline import naming_words
from ara.reporting.checkpoint_parts import Layer
from ara.reporting.document import Report
from ara.reporting.pareto import Measured, perplexity_fronts, speed_front
from ara.reporting.results import (
    read_allocation,
    read_base,
    read_bench,
    read_comparison,
    read_decomposition,
    read_evaluation,
    read_export,
    read_size_front,
    read_stored,
    read_training,
    read_work,
    text_labels,
)
from ara.reporting.summary import title, verdict
from ara.solver.problem import Allocation, Choice, Module
from ara.workspace.manifest import Manifest, remake

# Components of a spectrum that the report lists, in arithmetic and in geometric progression; the cut is added.
_EVENLY, _GEOMETRIC = 16, 16
# Significant digits of values that are only drawn.
_DRAWN_DIGITS = 5
# The zero-shot tasks that the report suggests.
# Texts to judge by, in the order in which they are suggested.
_TEXTS = ("python-docs", "wikitext2", "c4")
_ZERO_SHOT = "zero-shot"

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Made:
    """Manifests of one checkpoint, its ranks, and its measurements, oldest first.

    Attributes:
        truncated: the checkpoint.
        allocation: its ranks.
        evaluations, benches: made from it.
        earlier: the checkpoints that it was made from, oldest first.
    """

    truncated: Manifest
    allocation: Manifest
    evaluations: tuple[Manifest, ...] = ()
    benches: tuple[Manifest, ...] = ()
    earlier: tuple[Manifest, ...] = ()


@dataclass(frozen=True)
class Sources:
    """What a report is made from.

    Attributes:
        decomposition: of the factors.
        current: the checkpoint of the report.
        others: further checkpoints of the same factors, for the Pareto fronts.
        modules: factorised layers with their spectra, in the layout of the checkpoint.
        ranks: of these layers, with costs in parameters.
        training: from which the ranks come.
        comparisons: of allocators, or of sizes, on the same factors.
        exports: of the checkpoint.
        stale: stale results of the checkpoint, which are left out.
        damaged: ``stage/name`` of measurements that cannot be read, of any checkpoint.
        place: options that name the workspace in a command.
    """

    decomposition: Manifest
    current: Made
    others: tuple[Made, ...] = ()
    modules: Sequence[Module] = ()
    ranks: Allocation | None = None
    training: Manifest | None = None
    comparisons: tuple[Manifest, ...] = ()
    exports: tuple[Manifest, ...] = ()
    stale: tuple[Manifest, ...] = ()
    damaged: tuple[str, ...] = ()
    place: tuple[str, ...] = ()


def gather(sources: Sources) -> Report:
    """Return the report of a checkpoint."""
    place = sources.place
    missing = [MissingPart(f"{old.key} is stale and left out", _again(old, place)) for old in sources.stale]
    missing += [MissingPart(f"{key} is damaged and left out", _anew(key, place)) for key in sources.damaged]
    decomposition, made = sources.decomposition, sources.current
    current = _measured(made, True, missing, place)
    measured = [current, *(_measured(other, False, missing, place) for other in sources.others)]
    exports = _read_all(read_export, sources.exports, missing, place)
    sized = [one for one in sources.comparisons if one.config.get("size")]
    allocators = [one for one in sources.comparisons if one not in sized]
    comparisons = _read_all(read_comparison, allocators, missing, place)
    trained = [sources.training] if sources.training else []
    trainings = _read_all(read_training, trained, missing, place)
    base = read_base(decomposition.model)
    checkpoints = (*made.earlier, made.truncated)
    main = (decomposition, *trained, made.allocation, *checkpoints, *made.evaluations, *made.benches)
    report = Report(
        title=title(base, current.allocation, current.checkpoint),
        verdict=verdict(base, current.allocation, current.checkpoint, current.evaluations, current.benches),
        base=base,
        decomposition=read_decomposition(decomposition),
        allocation=current.allocation,
        checkpoint=current.checkpoint,
        layers=layers(sources.modules, sources.ranks) if sources.ranks else (),
        training=trainings[0] if trainings else None,
        evaluations=current.evaluations,
        benches=current.benches,
        fronts=perplexity_fronts(measured),
        speed_front=speed_front(measured),
        comparisons=comparisons,
        size_fronts=_read_all(read_size_front, sized, missing, place),
        exports=exports,
        work=tuple(map(read_work, (*main, *sources.comparisons, *sources.exports))),
        versions=_versions(main),
    )
    return report.model_copy(update={"missing": (*missing, *_missing(report, made.truncated, place))})


def basic_report(decomposition: Manifest, allocation: Manifest, results: CheckpointResults, dtype: str) -> Report:
    """Return the report of a checkpoint that was just written, without measurements.

    Args:
        decomposition: manifest of the factors.
        allocation: manifest of the ranks.
        results: sizes of the checkpoint.
        dtype: precision of the stored weights.
    """
    base, allocated = read_base(decomposition.model), read_allocation(allocation)
    stored = read_stored(allocation.name, results, dtype)
    return Report(
        title=title(base, allocated, stored),
        verdict=verdict(base, allocated, stored, (), ()),
        base=base,
        decomposition=read_decomposition(decomposition),
        allocation=allocated,
        checkpoint=stored,
        work=(read_work(decomposition), read_work(allocation)),
        versions=_versions((decomposition, allocation)),
    )


def layers(modules: Sequence[Module], ranks: Allocation) -> tuple[Layer, ...]:
    """Return every factorised layer with its rank and an excerpt of its spectrum."""
    return tuple(_layer(module, ranks.choices[module.spec.name]) for module in modules)


def _layer(module: Module, choice: Choice) -> Layer:
    spec, spectrum, rank = module.spec, module.spectrum.double(), choice.rank
    total = float(spectrum.sum()) or 1.0
    full = len(spectrum)
    evenly = torch.linspace(1, full, _EVENLY, dtype=torch.float64)
    geometric = torch.logspace(0, 1, _GEOMETRIC, base=full, dtype=torch.float64)
    components = {int(value) for value in torch.cat([evenly, geometric]).round()} | ({rank} if rank else set())
    listed = tuple(sorted(components))
    return Layer(
        **{key: getattr(spec, key) for key in ("name", "layer", "kind", "m", "n")},
        rank=rank,
        keep=choice.cost / spec.dense_cost,
        left=0.0 if rank is None else float(spectrum[rank:].sum()) / total,
        components=listed,
        spectrum=tuple(float(f"{float(spectrum[i - 1]) / total:.{_DRAWN_DIGITS}g}") for i in listed),
    )


def _versions(manifests: Iterable[Manifest]) -> dict[str, tuple[str, ...]]:
    """Return all versions of each package that made the results."""
    found: dict[str, dict[str, None]] = {}
    for manifest in manifests:
        for package, version in manifest.versions.items():
            found.setdefault(package, {})[version] = None
    return {package: tuple(known) for package, known in found.items()}


def _measured(made: Made, current: bool, missing: list[MissingPart], place: tuple[str, ...]) -> Measured:
    truncated = made.truncated
    dtype = CheckpointSettings.read(truncated).dtype
    return Measured(
        allocation=read_allocation(made.allocation),
        checkpoint=read_stored(truncated.name, CheckpointResults.read(truncated), dtype),
        evaluations=_read_all(read_evaluation, made.evaluations, missing, place),
        benches=_read_all(read_bench, made.benches, missing, place),
        current=current,
    )


def _read_all(
    read: Callable[[Manifest], _Part], manifests: Iterable[Manifest], missing: list[MissingPart], place: tuple[str, ...]
) -> tuple[_Part, ...]:
    """Read all results that this version can read; add the others to ``missing``."""
    parts = []
    for manifest in manifests:
        try:
            parts.append(read(manifest))
        except (CorruptedError, LookupError, ValueError, ArithmeticError):
            what = f"{manifest.key} was written in another form and is left out"
            missing.append(MissingPart(what, _again(manifest, place, force=True)))
    return tuple(parts)


def _again(manifest: Manifest, place: tuple[str, ...], force: bool = False) -> str:
    """Return the command that makes a result again."""
    command = remake(manifest, force).partition(": ")[2]
    # A command as it was typed names its workspace.
    return command if command.startswith(manifest.command) else shlex.join([*shlex.split(command), *place])


def _anew(key: str, place: tuple[str, ...]) -> str:
    """Return the command that replaces a result whose manifest cannot be trusted."""
    stage, _, name = key.partition("/")
    return shlex.join(["ara", stage, "--name", name, *place])


def _fitted(report: Report) -> set[str]:
    """Return the texts that factors or repairs were fitted to, as tables name them."""
    names = [split_share(item)[0] for item in split_items(report.decomposition.text or "")]
    repairs = report.checkpoint.recovery, report.checkpoint.recovery_after_rounding
    names += [part.name for repair in repairs if repair is not None for part in repair.parts]
    return set(text_labels(names).values())


def _missing(report: Report, checkpoint: Manifest, place: tuple[str, ...]) -> list[MissingPart]:
    """Return what was not measured or made yet, with the commands that add it."""
    found: list[tuple[str, list[str]]] = []
    this = naming_words(checkpoint.stage, checkpoint.name)
    keep = f"{report.allocation.keep or report.allocation.linear_keep:g}"
    if not any(evaluation.texts for evaluation in report.evaluations):
        found.append(("perplexity", ["eval", "--tasks", "wikitext2", *this]))
    elif all(text.task in _fitted(report) for evaluation in report.evaluations for text in evaluation.texts):
        other = next((name for name in _TEXTS if text_labels([name])[name] not in _fitted(report)), "file:PATH")
        found.append(("a text that nothing was fitted to", ["eval", "--tasks", other, *this]))
    if not any(evaluation.harness or evaluation.zero_shot for evaluation in report.evaluations):
        found.append(("zero-shot accuracy", ["eval", "--tasks", _ZERO_SHOT, *this]))
    if not any(evaluation.continuations for evaluation in report.evaluations):
        found.append(("continuations of a prompt", ["eval", "--prompt", "The capital of France is", *this]))
    if not report.benches:
        found.append(("speed and memory", ["bench", *this]))
    points = [point for front in report.fronts for point in front.points]
    if points and all(point.current or point.series.startswith(UNIFORM) for point in points):
        found.append(("a second budget on the same windows", ["allocate", "--keep", "0.6"]))
    if report.training is None:
        found.append(("training curves (these ranks are not trained)", ["train-masks", "--keep", keep]))
    if not report.comparisons:
        found.append(("a comparison of allocators", ["compare", "--keep", keep]))
    if not report.exports and reads_text_alone(report.base.architecture):
        found.append(("an export for other runtimes", ["export", "--onnx", *this]))
    return [MissingPart(what, shlex.join(["ara", *words, *place])) for what, words in found]
