"""The tables of the report and of the model card, each made once and written as HTML or as Markdown.

A cell keeps the number beside its text, so that the page contains the figures of ``report.json`` to the last digit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import shorten

from ara.artifacts.checkpoint import RecoveryFigures
from ara.artifacts.evaluation import DENSE, UNIFORM
from ara.evaluation.tasks import mean_label
from ara.layout_names import DEFAULT_LAYOUT
from ara.reporting import cells
from ara.reporting.benchmark_parts import Benched
from ara.reporting.cells import NONE, Cell, Table
from ara.reporting.checkpoint_parts import Allocated, Latency, Layer, Stored, Work
from ara.reporting.comparison_parts import Compared, SizeFront
from ara.reporting.document import Report
from ara.reporting.evaluation_parts import ChatResult, Evaluated, HarnessResult, TextResult, ZeroShot
from ara.reporting.export_parts import Exported
from ara.reporting.summary import case_name, how_words
from ara.reporting.training_parts import Trained

# Characters of an error that a table has room for.
_ERROR_WIDTH = 60


def size_table(report: Report) -> Table:
    """Return parameters and bytes, dense and compressed; for a budget of time also the predicted time."""
    figures, stored = report.allocation, report.checkpoint
    parameters = (
        ("factorised layers", figures.linear_parameters_dense, figures.linear_parameters, figures.linear_keep),
        ("whole model", figures.model_parameters_dense, figures.model_parameters, figures.model_keep),
    )
    rows = [
        (Cell(f"parameters of the {what}"), cells.count(dense), cells.count(kept), cells.share(keep, 2))
        for what, dense, kept, keep in parameters
    ]
    disk = cells.mib(stored.dense_weight_bytes), cells.mib(stored.disk_bytes), cells.share(stored.disk_keep, 2)
    rows.append((Cell(f"weights on disk, MiB ({stored.dtype})"), *disk))
    if (latency := figures.latency) is not None:
        predicted = cells.share(latency.predicted_ns / latency.dense_ns, 2)
        times = cells.nanoseconds(latency.dense_ns), cells.nanoseconds(latency.predicted_ns)
        rows.append((Cell(_timed_as(latency)), *times, predicted))
    return Table("Parameters and bytes", ("", "dense", "compressed", "kept"), rows)


def _timed_as(latency: Latency) -> str:
    place = ", ".join((latency.library, *how_words(latency)))
    return f"predicted time of the factorised layers, ms ({latency.tokens:,} tokens; {place})"


def recovery_tables(stored: Stored) -> list[Table]:
    """Return one table per recovery: before the rounding, and after it."""
    both = (stored.recovery, False), (stored.recovery_after_rounding, True)
    return [recovery_table(recovery, after) for recovery, after in both if recovery is not None]


def recovery_table(recovery: RecoveryFigures, after_rounding: bool = False) -> Table:
    """Return what each level of a recovery has changed."""
    rows = [
        (
            Cell(f"{level.level}{level.mark}"),
            Cell(f"{level.before:.4f}", level.before),
            Cell(f"{level.shown:.4f}", level.shown),
            cells.count(level.tokens),
            Cell(f"{level.seconds / 60:.1f}", level.seconds),
        )
        for level in recovery.levels
    ]
    columns = ("level", "KL to dense before (nats/token)", "after", "training tokens", "minutes")
    return Table(f"Recovery{' after rounding' * after_rounding}, on held-out text", columns, rows)


def kinds_table(allocation: Allocated) -> Table:
    """Return ranks by kind of layer."""
    rows = []
    for kind in allocation.kinds:
        ranks = NONE
        if kind.rank_mean is not None:
            ranks = Cell(f"{kind.rank_min} / {kind.rank_mean:.0f} / {kind.rank_max}", kind.rank_mean)
        m, n = kind.shape
        dense = Cell(f"{kind.dense} of {kind.layers}", kind.dense)
        rows.append((Cell(kind.kind, code=True), Cell(f"{m} × {n}"), dense, ranks, cells.share(kind.keep)))
    columns = ("layers", "shape (out × in)", "dense", "rank min / mean / max", "kept")
    return Table("Ranks by kind of layer", columns, rows, words=2)


def layers_table(layers: Sequence[Layer]) -> Table:
    """Return every layer."""
    rows = [
        (
            Cell(layer.name, code=True),
            Cell(f"{layer.m} × {layer.n}"),
            Cell("dense") if layer.rank is None else Cell(f"{layer.rank}", layer.rank),
            cells.share(layer.keep),
            cells.share(layer.left, 2),
        )
        for layer in layers
    ]
    columns = ("layer", "shape (out × in)", "rank", "kept", "spectrum cut off")
    return Table("All layers", columns, rows, words=2)


def models_table(evaluation: Evaluated) -> Table:
    """Return the sizes of the models of an evaluation."""
    rows = [
        (
            Cell(model.name),
            cells.count(model.parameters),
            cells.share(model.linear_keep),
            cells.share(model.model_keep),
            cells.mib(model.weight_bytes),
        )
        for model in evaluation.models
    ]
    columns = ("model", "parameters", "linear kept", "model kept", "weights (MiB)")
    names = [model.name for model in evaluation.models]
    return Table("Models", columns, rows, marked=cells.index(names, evaluation.chosen))


def text_table(evaluation: Evaluated, result: TextResult) -> Table:
    """Return all models on one text: quality and the speed of reading."""
    names = [model.name for model in evaluation.models if model.name in result.models]
    with_kl = any(row.kl is not None for row in result.models.values())
    rows = []
    for name in names:
        row = result.models[name]
        quality = [cells.perplexity(row.perplexity, row.stderr), cells.number(row.nll, 4, row.stderr)]
        if with_kl:
            quality += [cells.number(row.kl, 4, row.kl_stderr), cells.share(row.agreement)]
        rows.append((Cell(name), *quality, cells.spread(row.speed, 0), cells.spread(row.ratio, 2)))
    divergence = ("KL to dense (nats/token)", "same next token") if with_kl else ()
    columns = ("model", "perplexity", "loss (nats/token)", *divergence, "tokens/s (p10 – p90)", "× dense (range)")
    caption = f"{result.task}, {result.windows} × {result.seq_len:,} tokens"
    return Table(caption, columns, rows, marked=cells.index(names, evaluation.chosen))


def chat_table(evaluation: Evaluated, result: ChatResult) -> Table:
    """Return all models on conversations: distance from the dense model on the answers, and empty answers."""
    names = [model.name for model in evaluation.models if model.name in result.models]
    rows = []
    for name in names:
        row = result.models[name]
        empty = Cell(f"{row.empty:,} of {result.conversations:,}", row.empty)
        rows.append((Cell(name), cells.number(row.kl, 4, row.kl_stderr), cells.share(row.agreement), empty))
    columns = ("model", "KL to dense (nats/token)", "same next token", "empty answers")
    caption = f"{result.task}: {result.sample}"
    return Table(caption, columns, rows, marked=cells.index(names, evaluation.chosen))


def harness_table(evaluation: Evaluated) -> Table:
    """Return zero-shot accuracies: one row per task, the mean last; one column per model, then comparisons."""
    names = [model.name for model in evaluation.models]
    rivals = [name for name in (DENSE, UNIFORM) if name in names and name != evaluation.chosen]
    rows = [
        (
            Cell(result.task),
            Cell(result.metric),
            cells.questions(result.examples, result.of),
            *(cells.accuracy(result.models.get(name)) for name in names),
            *_comparisons(evaluation, result, rivals),
        )
        for result in evaluation.harness
    ]
    mean = evaluation.zero_shot
    if mean is not None:
        values = (cells.accuracy(mean.models.get(name)) for name in names)
        compared = _comparisons(evaluation, mean, rivals)
        rows.append((Cell(mean_label(mean.tasks)), Cell(""), Cell(""), *values, *compared))
    against = (f"{evaluation.chosen} − {rival} (p)" for rival in rivals)
    columns = ("task", "metric", "questions", *names, "kept of dense", *against)
    return Table("Zero-shot accuracy (≈: may be chance, p > 0.05)", columns, rows, words=2)


def _comparisons(evaluation: Evaluated, result: HarnessResult | ZeroShot, rivals: Sequence[str]) -> Iterator[Cell]:
    """Yield the chosen model's share of the dense model's accuracy, then its differences to ``rivals``."""
    row = result.models.get(evaluation.chosen)
    yield cells.share(row.retained if row else None)
    yield from (cells.difference(result.compared.get(rival)) for rival in rivals)


def bench_tables(bench: Benched) -> Iterator[Table]:
    """Return a table of sizes, and one of passes or of requests."""
    names = list(bench.models)
    sizes = [
        (
            Cell(name),
            cells.count(model.parameters),
            cells.mib(model.weight_bytes),
            cells.mib(model.disk_bytes),
            cells.mib(model.peak_memory_bytes),
        )
        for name, model in bench.models.items()
    ]
    titles = ("model", "parameters", "weights (MiB)", "on disk (MiB)", "peak memory (MiB)")
    yield Table("Memory", titles, tuple(sizes), marked=cells.index(names, bench.chosen))
    if bench.serving:
        yield _serving_table(bench)
        return
    rows = [
        (
            Cell(case_name(case)),
            Cell(name),
            cells.milliseconds(row.seconds),
            cells.number(row.tokens_per_second.median, 1),
            cells.spread(row.ratio, 2),
            cells.number(row.predicted, 2),
            Cell(f"{row.macs / 1e9:,.2f}", row.macs),
            cells.mib(row.bytes_read),
        )
        for case in bench.cases
        for name, row in case.models.items()
    ]
    columns = ("case", "model", "ms (p10 – p90)", "tokens/s", "× dense (95 % interval)", "× by arithmetic")
    counted = ("G mult-adds", "MiB read")
    yield Table("Speed", (*columns, *counted), rows, words=2)


def _serving_table(bench: Benched) -> Table:
    rows = [
        (
            cells.count(case.requests),
            Cell(name),
            cells.spread(row.output_tokens_per_second, 1),
            cells.milliseconds(row.first_token_seconds),
            cells.spread(row.ratio, 2),
        )
        for case in bench.serving
        for name, row in case.models.items()
    ]
    first = bench.serving[0]
    figures = "output tokens/s (p10 – p90)", "first token, ms (p10 – p90)", "× dense (95 % interval)"
    caption = f"Requests with prompts of {first.prompt:,} tokens and answers of {first.new:,}"
    return Table(caption, ("at once", "model", *figures), rows)


def training_table(training: Trained) -> Table:
    """Return how far the training has lowered the held-out loss at each budget."""
    rows = [
        (
            Cell(f"{curve.keep:g}", curve.keep),
            cells.number(curve.start_held_out, 4),
            cells.number(curve.held_out, 4),
            cells.number(curve.won, 4),
            Cell(f"{curve.best_step} of {curve.steps}", curve.best_step),
            cells.count(curve.backward_passes),
            cells.number(curve.seconds, 0),
        )
        for curve in training.curves
    ]
    columns = ("keep", "held-out loss at the start (nats/token)", "best", "gain", "best step")
    return Table(f"Masks of {training.name}", (*columns, "backward passes", "seconds"), rows)


def guard_table(allocation: Allocated) -> Table | None:
    """Return the candidates that the guard has compared, or ``None`` without a guard."""
    guard = allocation.guard
    if guard is None:
        return None
    names = list(guard.held_out)
    rows = [
        (Cell(name), cells.number(loss, 4), cells.number(guard.behind.get(name), 4, guard.stderr.get(name)))
        for name, loss in guard.held_out.items()
    ]
    columns = ("ranks", "held-out loss (nats/token)", "above the best (± standard error)")
    return Table(f"Guard: {guard.winner} was chosen", columns, rows, marked=cells.index(names, guard.winner))


def comparison_table(comparison: Compared, allocation: Allocated) -> Table:
    """Return the dense model, then all allocators by held-out loss; the method of ``allocation`` is marked."""
    methods = comparison.methods
    timed = comparison.objective == "latency"
    measured = [name for name, row in methods.items() if row.held_out is not None and name != DENSE]
    order = [DENSE] if DENSE in methods else []
    order += sorted(measured, key=lambda name: methods[name].held_out or 0.0)
    order += [name for name in methods if name not in order]
    rows = []
    for name in order:
        row = methods[name]
        failed = None if row.error is None else Cell(f"failed: {shorten(row.error, _ERROR_WIDTH)}")
        quality = [failed or cells.number(row.held_out, 4)]
        for task in comparison.tasks:
            quality += [cells.number(row.perplexity.get(task), 2), cells.share(row.gap_closed.get(task), 0)]
        kept = [cells.share(row.linear_keep, 2), cells.share(row.time_keep, 2)] if timed else []
        cost = cells.number(row.seconds, 0), cells.count(row.backward_passes)
        rows.append((Cell(name), *quality, *kept, cells.count(row.dense_layers), *cost))
    columns = ["allocator", "held-out loss (nats/token)"]
    for task in comparison.tasks:
        columns += [f"perplexity, {task}", "gap closed"]
    columns += ["linear kept", "predicted time"] if timed else []
    columns += ["dense layers", "seconds", "backward passes"]
    layout = "" if comparison.layout == DEFAULT_LAYOUT else f", {comparison.layout}"
    caption = f"{comparison.name}: keep {comparison.keep:g}{' of the time' * timed}{layout}"
    same = not timed and (comparison.keep, comparison.layout) == (allocation.keep, allocation.layout)
    return Table(caption, tuple(columns), rows, marked=cells.index(order, allocation.method if same else None))


def size_front_table(front: SizeFront) -> Table:
    """Return the forms of the model with their size and loss, the dense ones first, then size by size."""
    rows = []
    repaired = any(point.recovered is not None for point in front.points)
    for point in front.points:
        bits = ", ".join(f"{count} × {width}" for width, count in (point.layers or {}).items())
        failed = None if point.error is None else Cell(shorten(point.error, _ERROR_WIDTH))
        size = failed or (NONE if point.bytes is None else Cell(f"{point.bytes / 1e6:,.1f}", point.bytes))
        names = Cell(point.title), Cell(point.size or NONE.text)
        levels = (Cell(", ".join(point.recovered or ()) or NONE.text),) if repaired else ()
        quality = cells.number(point.held_out, 4), cells.number(point.perplexity, 2)
        rows.append((*names, *levels, size, Cell(bits or NONE.text), cells.count(point.dense_layers), *quality))
    words = ("model", "made for", *(("repaired by",) if repaired else ()))
    columns = (*words, "weight files (MB)", "layers × bits per weight", "dense layers")
    layout = "" if front.layout == DEFAULT_LAYOUT else f", {front.layout}"
    caption = f"{front.name}: held-out calibration text{layout}"
    return Table(caption, (*columns, "held-out loss (nats/token)", "perplexity"), rows, words=len(words))


def export_table(export: Exported) -> Table:
    """Return the differences between a graph and torch."""
    rows = [
        (
            Cell(row.case),
            cells.count(row.tokens),
            Cell(f"{row.difference:.2g}", row.difference),
            cells.share(row.agreement, 2),
            Cell(f"{row.kl:.2g}", row.kl),
            cells.number(row.nll_torch, 4),
            cells.number(row.nll_onnx, 4),
        )
        for row in export.parity
    ]
    columns = ("run as", "tokens", "largest difference of a logit", "same token", "KL (nats/token)")
    size = "" if export.graph_bytes is None else f", {export.graph_bytes / 2**20:,.1f} MiB"
    mixed = f" with {export.exact} of {export.candidates} products exact" if export.exact else ""
    caption = f"{export.name}: {export.precision} graph{mixed}{size}, ONNX Runtime against torch"
    return Table(caption, (*columns, "loss in torch", "loss in ONNX Runtime"), rows)


def work_table(work: Sequence[Work]) -> Table:
    """Return time, memory and device of every stage."""
    rows = [
        (
            Cell(item.key, code=True),
            Cell(f"{item.created[:16].replace('T', ' ')} UTC"),
            Cell(" ".join(word for word in (item.device, item.dtype) if word) or NONE.text),
            cells.number(item.seconds, 1),
            cells.mib(item.peak_memory_bytes),
            Cell(item.id[:12], code=True),
        )
        for item in work
    ]
    return Table("Stages", ("result", "made", "on", "seconds", "peak memory (MiB)", "content"), rows, words=3)
