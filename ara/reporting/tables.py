"""The tables of the report and of the model card, each made once and drawn in HTML or in Markdown.

A cell keeps the number beside its text, so that a page can carry what ``report.json`` says to the last digit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from textwrap import shorten

from ara.artifacts.evaluation import DENSE, UNIFORM, SpreadFigures
from ara.evaluation.paired import NOISE
from ara.evaluation.tasks import mean_label
from ara.layout_names import DEFAULT_LAYOUT
from ara.reporting.document import (
    Allocated,
    Benched,
    Compared,
    Difference,
    Evaluated,
    Exported,
    HarnessResult,
    HarnessRow,
    Layer,
    Report,
    TextResult,
    Trained,
    Work,
    ZeroShot,
)
from ara.reporting.summary import case_name, share_text

_NONE = "–"
# Seconds below which milliseconds have more digits.
_SHORT = 0.01
# Characters of an error that a table has room for.
_ERROR_WIDTH = 60


@dataclass(frozen=True)
class Cell:
    """Text of a cell, the number that it stands for, and whether it is a name in a program."""

    text: str
    value: float | None = None
    code: bool = False


@dataclass(frozen=True)
class Table:
    """A table: what it shows, titles with units, rows. Columns of numbers stand right, the first column left.

    Attributes:
        words: how many columns from the left hold words.
        marked: index of the row that the report is about.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: int = 1
    marked: int | None = None


def size_table(report: Report) -> Table:
    """Return parameters and bytes, dense and compressed."""
    figures, stored = report.allocation, report.checkpoint
    rows = [
        (
            Cell("parameters of the factorised layers"),
            _count(figures.linear_parameters_dense),
            _count(figures.linear_parameters),
            _share(figures.linear_keep, 2),
        ),
        (
            Cell("parameters of the whole model"),
            _count(figures.model_parameters_dense),
            _count(figures.model_parameters),
            _share(figures.model_keep, 2),
        ),
        (
            Cell(f"weights on disk, MiB ({stored.dtype})"),
            _mib(stored.dense_weight_bytes),
            _mib(stored.disk_bytes),
            _share(stored.disk_keep, 2),
        ),
    ]
    return Table("Parameters and bytes", ("", "dense", "compressed", "kept"), tuple(rows))


def kinds_table(allocation: Allocated) -> Table:
    """Return ranks by kind of layer."""
    rows = []
    for kind in allocation.kinds:
        low = (
            Cell(_NONE)
            if kind.rank_mean is None
            else Cell(f"{kind.rank_min} / {kind.rank_mean:.0f} / {kind.rank_max}", kind.rank_mean)
        )
        m, n = kind.shape
        dense = Cell(f"{kind.dense} of {kind.layers}", kind.dense)
        rows.append((Cell(kind.kind, code=True), Cell(f"{m} × {n}"), dense, low, _share(kind.keep)))
    columns = ("layers", "shape (out × in)", "dense", "rank min / mean / max", "kept")
    return Table("Ranks by kind of layer", columns, tuple(rows), words=2)


def layers_table(layers: Sequence[Layer]) -> Table:
    """Return every layer."""
    rows = tuple(
        (
            Cell(layer.name, code=True),
            Cell(f"{layer.m} × {layer.n}"),
            Cell("dense") if layer.rank is None else Cell(f"{layer.rank}", layer.rank),
            _share(layer.keep),
            _share(layer.left, 2),
        )
        for layer in layers
    )
    columns = ("layer", "shape (out × in)", "rank", "kept", "spectrum cut off")
    return Table("All layers", columns, rows, words=2)


def models_table(evaluation: Evaluated) -> Table:
    """Return the sizes of the models of an evaluation."""
    rows = tuple(
        (
            Cell(model.name),
            _count(model.parameters),
            _share(model.linear_keep),
            _share(model.model_keep),
            _mib(model.weight_bytes),
        )
        for model in evaluation.models
    )
    columns = ("model", "parameters", "linear kept", "model kept", "weights (MiB)")
    names = [model.name for model in evaluation.models]
    return Table("Models", columns, rows, marked=_index(names, evaluation.chosen))


def text_table(evaluation: Evaluated, result: TextResult) -> Table:
    """Return all models on one text: quality and the speed of reading."""
    names = [model.name for model in evaluation.models if model.name in result.models]
    with_kl = any(row.kl is not None for row in result.models.values())
    rows = []
    for name in names:
        row = result.models[name]
        perplexity = f"{row.perplexity:,.2f}{_plus_minus(row.stderr, row.perplexity)}"
        cells = [Cell(name), Cell(perplexity, row.perplexity), _number(row.nll, 4, row.stderr)]
        if with_kl:
            cells += [_number(row.kl, 4, row.kl_stderr), _share(row.agreement)]
        rows.append((*cells, _spread(row.speed, 0), _spread(row.ratio, 2)))
    divergence = ("KL to dense (nats/token)", "same next token") if with_kl else ()
    columns = ("model", "perplexity", "loss (nats/token)", *divergence, "tokens/s (p10 – p90)", "× dense (range)")
    caption = f"{result.task}, {result.windows} × {result.seq_len:,} tokens"
    return Table(caption, columns, tuple(rows), marked=_index(names, evaluation.chosen))


def harness_table(evaluation: Evaluated) -> Table:
    """Return zero-shot accuracies: tasks downwards, the mean last; models across, then how the chosen one compares."""
    names = [model.name for model in evaluation.models]
    rivals = [name for name in (DENSE, UNIFORM) if name in names and name != evaluation.chosen]
    rows = [
        (
            Cell(result.task),
            Cell(result.metric),
            _questions(result.examples, result.of),
            *(_accuracy(result.models.get(name)) for name in names),
            *_comparisons(evaluation, result, rivals),
        )
        for result in evaluation.harness
    ]
    mean = evaluation.zero_shot
    if mean is not None:
        cells = (_accuracy(mean.models.get(name)) for name in names)
        rows.append((Cell(mean_label(mean.tasks)), Cell(""), Cell(""), *cells, *_comparisons(evaluation, mean, rivals)))
    against = (f"{evaluation.chosen} − {rival} (p)" for rival in rivals)
    columns = ("task", "metric", "questions", *names, "kept of dense", *against)
    return Table("Zero-shot accuracy (≈: may be chance, p > 0.05)", columns, tuple(rows), words=2)


def _comparisons(evaluation: Evaluated, result: HarnessResult | ZeroShot, rivals: Sequence[str]) -> Iterator[Cell]:
    """Yield what the chosen model keeps of the dense one, and its differences to ``rivals``."""
    row = result.models.get(evaluation.chosen)
    yield _share(row.retained if row else None)
    yield from (_difference(result.compared.get(rival)) for rival in rivals)


def bench_tables(bench: Benched) -> Iterable[Table]:
    """Return a table of sizes and one of speeds."""
    names = list(bench.models)
    sizes = [
        (
            Cell(name),
            _count(model.parameters),
            _mib(model.weight_bytes),
            _mib(model.disk_bytes),
            _mib(model.peak_memory_bytes),
        )
        for name, model in bench.models.items()
    ]
    titles = ("model", "parameters", "weights (MiB)", "on disk (MiB)", "peak memory (MiB)")
    yield Table("Memory", titles, tuple(sizes), marked=_index(names, bench.chosen))
    rows = []
    for case in bench.cases:
        for name, row in case.models.items():
            rows.append(
                (
                    Cell(case_name(case)),
                    Cell(name),
                    _milliseconds(row.seconds),
                    _number(None if row.tokens_per_second is None else row.tokens_per_second.median, 1),
                    _spread(row.ratio, 2),
                    _number(row.predicted, 2),
                    Cell(_NONE) if row.macs is None else Cell(f"{row.macs / 1e9:,.2f}", row.macs),
                    _mib(row.bytes_read),
                )
            )
    columns = ("case", "model", "ms (p10 – p90)", "tokens/s", "× dense (95 % interval)", "× by arithmetic")
    counted = ("G mult-adds", "MiB read")
    yield Table("Speed", (*columns, *counted), tuple(rows), words=2)


def training_table(training: Trained) -> Table:
    """Return what the training has won at each budget."""
    rows = tuple(
        (
            Cell(f"{curve.keep:g}", curve.keep),
            _number(curve.start_held_out, 4),
            _number(curve.held_out, 4),
            _number(curve.won, 4),
            Cell(f"{curve.best_step} of {curve.steps}", curve.best_step),
            _count(curve.backward_passes),
            _number(curve.seconds, 0),
        )
        for curve in training.curves
    )
    columns = ("keep", "held-out loss at the start (nats/token)", "of the best", "won", "best step")
    return Table(f"Masks of {training.name}", (*columns, "backward passes", "seconds"), rows)


def guard_table(allocation: Allocated) -> Table | None:
    """Return the candidates that the guard has compared, or ``None``."""
    guard = allocation.guard
    if guard is None:
        return None
    names = list(guard.held_out)
    rows = tuple(
        (Cell(name), _number(loss, 4), _number(guard.behind.get(name), 4, guard.stderr.get(name)))
        for name, loss in guard.held_out.items()
    )
    columns = ("ranks", "held-out loss (nats/token)", "behind the best (± standard error)")
    return Table(f"Guard: {guard.winner} was handed out", columns, rows, marked=_index(names, guard.winner))


def comparison_table(comparison: Compared, allocation: Allocated) -> Table:
    """Return all allocators, best held-out loss first, the dense model on top; that of ``allocation`` is marked."""
    methods = comparison.methods
    measured = [name for name, row in methods.items() if row.held_out is not None and name != DENSE]
    order = [DENSE] if DENSE in methods else []
    order += sorted(measured, key=lambda name: methods[name].held_out or 0.0)
    order += [name for name in methods if name not in order]
    rows = []
    for name in order:
        row = methods[name]
        failed = None if row.error is None else Cell(f"failed: {shorten(row.error, _ERROR_WIDTH)}")
        cells = [Cell(name), failed or _number(row.held_out, 4)]
        for task in comparison.tasks:
            cells += [_number(row.perplexity.get(task), 2), _share(row.gap_closed.get(task), 0)]
        rows.append((*cells, _count(row.dense_layers), _number(row.seconds, 0), _count(row.backward_passes)))
    columns = ["allocator", "held-out loss (nats/token)"]
    for task in comparison.tasks:
        columns += [f"perplexity, {task}", "gap closed"]
    columns += ["dense layers", "seconds", "backward passes"]
    layout = "" if comparison.layout == DEFAULT_LAYOUT else f", {comparison.layout}"
    caption = f"{comparison.name}: keep {comparison.keep:g}{layout}"
    same = (comparison.keep, comparison.layout) == (allocation.keep, allocation.layout)
    return Table(caption, tuple(columns), tuple(rows), marked=_index(order, allocation.method if same else None))


def export_table(export: Exported) -> Table:
    """Return how far a graph is from torch."""
    rows = tuple(
        (
            Cell(row.case),
            _count(row.tokens),
            Cell(f"{row.difference:.2g}", row.difference),
            _share(row.agreement, 2),
            Cell(f"{row.kl:.2g}", row.kl),
            _number(row.nll_torch, 4),
            _number(row.nll_onnx, 4),
        )
        for row in export.parity
    )
    columns = ("run as", "tokens", "largest difference of a logit", "same token", "KL (nats/token)")
    size = "" if export.graph_bytes is None else f", {export.graph_bytes / 2**20:,.1f} MiB"
    caption = f"{export.name}: {export.precision} graph{size}, ONNX Runtime against torch"
    return Table(caption, (*columns, "loss in torch", "loss in ONNX Runtime"), rows)


def work_table(work: Sequence[Work]) -> Table:
    """Return what every stage took."""
    rows = tuple(
        (
            Cell(item.key, code=True),
            Cell(f"{item.created[:16].replace('T', ' ')} UTC"),
            Cell(" ".join(word for word in (item.device, item.dtype) if word) or _NONE),
            _number(item.seconds, 1),
            _mib(item.peak_memory_bytes),
            Cell(item.id[:12], code=True),
        )
        for item in work
    )
    return Table("Stages", ("result", "made", "on", "seconds", "peak memory (MiB)", "content"), rows, words=3)


def _index(names: Sequence[str], name: str | None) -> int | None:
    return names.index(name) if name in names else None


def _count(value: int | None) -> Cell:
    return Cell(_NONE) if value is None else Cell(f"{value:,}", value)


def _share(value: float | None, digits: int = 1) -> Cell:
    return Cell(_NONE) if value is None else Cell(f"{value:.{digits}%}", value)


def _mib(value: float | None) -> Cell:
    return Cell(_NONE) if value is None else Cell(f"{value / 2**20:,.1f}", value)


def _number(value: float | None, digits: int, stderr: float | None = None) -> Cell:
    return Cell(_NONE) if value is None else Cell(f"{value:,.{digits}f}{_error(stderr, digits)}", value)


def _spread(value: SpreadFigures | None, digits: int, scale: float = 1.0) -> Cell:
    return Cell(_NONE) if value is None else Cell(_range(value, digits, scale), value.median)


def _milliseconds(value: SpreadFigures | None) -> Cell:
    return _spread(value, 1 if value is not None and value.median >= _SHORT else 3, 1000)


def _range(value: SpreadFigures, digits: int, scale: float = 1.0) -> str:
    median, low, high = (f"{scale * part:,.{digits}f}" for part in (value.median, value.low, value.high))
    return f"{median} ({low} – {high})"


def _error(stderr: float | None, digits: int) -> str:
    return "" if stderr is None else f" ± {stderr:.{digits}f}"


def _plus_minus(stderr: float | None, perplexity: float) -> str:
    """Return the standard error of a perplexity, to first order in that of its logarithm."""
    return "" if stderr is None else f" ± {stderr * perplexity:,.2f}"


def _accuracy(row: HarnessRow | None) -> Cell:
    if row is None:
        return Cell(_NONE)
    text = share_text(row.value)
    if not text.endswith("%"):
        return _number(row.value, 2, row.stderr)
    return Cell(text + ("" if row.stderr is None else f" ± {row.stderr:.1%}"), row.value)


def _questions(examples: int | None, of: int | None) -> Cell:
    if examples is None:
        return Cell(_NONE)
    return Cell(f"{examples:,}" if of in (None, examples) else f"{examples:,} of {of:,}", examples)


def _difference(difference: Difference | None) -> Cell:
    if difference is None:
        return Cell(_NONE)
    p = "" if difference.p is None else f" ({difference.p:.2g})"
    noise = "≈ " if difference.p is not None and difference.p > NOISE else ""
    return Cell(f"{noise}{difference.difference:+.1%}{p}", difference.difference)
