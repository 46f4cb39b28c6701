"""Tables of results, one function per stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ara.artifacts.base import manifest_of
from ara.artifacts.checkpoint import CheckpointResults, RecoveryFigures
from ara.artifacts.comparison import ComparedMethod, ComparedText, ComparisonResults, SizedModel, best_in_words
from ara.artifacts.evaluation import DENSE, EvaluationResults
from ara.artifacts.factors import FactorisedLayer, FactorsResults
from ara.artifacts.graph import GraphResults
from ara.artifacts.ranks import GuardResults, LatencyResults, RanksResults
from ara.artifacts.report import HTML_FILE, ReportResults
from ara.artifacts.training import TrainingResults
from ara.errors import CorruptedError
from ara.pipeline import steps
from ara.workspace.following import next_command
from ara.workspace.store import Workspace
from ara.workspace.view import StageView
from ara_cli.console import Column, Console, columns
from ara_cli.formatting import bytes_text, count_text, percent, seconds_text
from ara_cli.render_bench import bench_figure
from ara_cli.render_eval import show_evaluation
from ara_cli.shown import shown, shows_results


def show_decomposition(console: Console, view: StageView) -> None:
    """Show the factored layers by kind."""
    results = FactorsResults.read(view)
    kinds: dict[str, list[FactorisedLayer]] = {}
    for layer in results.modules:
        kinds.setdefault(layer.kind, []).append(layer)
    rows = []
    for kind, layers in kinds.items():
        m, n = layers[0].m, layers[0].n
        rows.append(
            (kind, len(layers), f"{m} × {n}", min(m, n), (m * n - 1) // (m + n), count_text(len(layers) * m * n))
        )
    headers = columns("layers", "count", "shape (out × in)", "full rank", "break-even rank (factors)", "parameters")
    linear, model = count_text(results.linear_parameters), count_text(results.model_parameters)
    count = len(results.modules)
    console.table(f"Factored {count} layers, {linear} of the model's {model} parameters", headers, rows)


@shows_results
def show_allocation(console: Console, view: StageView) -> None:
    """Show ranks by kind of layer, and the shares kept of linear layers and of the whole model."""
    results = RanksResults.read(view)
    rows = []
    for kind, row in results.kinds.items():
        ranks = "–" if row.rank_mean is None else f"{row.rank_min} / {row.rank_mean:.0f} / {row.rank_max}"
        m, n = row.shape
        rows.append((kind, f"{m} × {n}", f"{row.dense} of {row.layers}", ranks, percent(row.keep)))
    headers = columns("layers", "shape (out × in)", "dense", "rank min / mean / max", "kept")
    title = (
        f"{view.name}: {percent(results.linear_keep, 2)} of the linear layers' parameters kept, "
        f"{percent(results.model_keep, 2)} of the whole model's"
    )
    console.table(title, headers, rows)
    if (size := results.size) is not None:
        counts = ", ".join(f"{count} layers {bits} bits" for bits, count in size.layers.items())
        if size.blocks:
            lengths = ", ".join(f"{block} in {count}" for block, count in size.blocks.items())
            counts += f" (weights per scale: {lengths})"
        if size.embedding_bits is not None:
            counts += f", embedding and head {size.embedding_bits} bits"
        whole = f"{bytes_text(size.linear + size.others)} of {bytes_text(size.limit)}"
        console.text(f"{counts}; {whole} after ara quantise, {bytes_text(size.linear)} of them in these layers")
    if (latency := results.latency) is not None:
        console.text(_latency_text(latency))
    if results.guard is not None:
        console.text(_guard_text(results.guard))


def _latency_text(latency: LatencyResults) -> str:
    threads = f"{latency.threads} thread{'s' if latency.threads > 1 else ''}"
    place = f"{latency.library} on {latency.device}, {latency.precision}, {threads}"
    return (
        f"predicted time of these layers: {percent(latency.share, 2)} of dense, {latency.predicted_ns / 1e6:.2f} of "
        f"{latency.dense_ns / 1e6:.2f} ms for {latency.tokens} tokens ({place})"
    )


def _guard_text(guard: GuardResults) -> str:
    losses, winner = guard.held_out, guard.winner
    best = losses[winner]
    # NaN and infinity are stored as null.
    texts = {name: "not finite" if loss is None else f"{loss:.4f}" for name, loss in losses.items()}
    for name, stderr in guard.stderr.items():
        loss = losses[name]
        if name != winner and loss is not None and best is not None:
            texts[name] += f" (+{loss - best:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}") + ")"
    candidates = ", ".join(f"{name} {texts[name]}" for name in losses if name != DENSE)
    return f"guard, held-out loss in nats per token (dense {texts[DENSE]}): {candidates}; {winner} won"


def show_training(console: Console, view: StageView) -> None:
    """Show what the training has gained at each budget."""
    rows = [
        (
            keep,
            f"{row.start_held_out:.4f}",
            f"{row.held_out:.4f}",
            f"{row.won:.4f}",
            f"{row.best_step} of {row.steps}",
            sum(rank == "dense" for rank in row.ranks.values()),
            row.backward_passes,
            seconds_text(row.seconds),
        )
        for keep, row in TrainingResults.read(view).budgets.items()
    ]
    losses = ("loss at the start (held-out, nats/token)", "at the best step", "gain")
    headers = columns("keep", *losses, "best step", "dense layers", "backward passes", "time")
    console.table(f"{view.name}: trained masks", headers, rows)


@shows_results
def show_comparison(console: Console, view: StageView) -> None:
    """Show the dense model, then all allocators by held-out loss; or all forms of the model by size."""
    results = ComparisonResults.read(view)
    if results.models is not None:
        _show_sizes(console, view.name, results.models)
        return
    methods = results.methods
    tasks = list(methods[DENSE].tasks or {})
    timed = any(row.time_keep is not None for row in methods.values())
    order = [DENSE, *sorted((n for n, row in methods.items() if n != DENSE and row.tasks), key=_held_out(methods))]
    rows = [
        (
            name,
            f"{row.held_out:.4f}",
            *(_perplexity((row.tasks or {})[task]) for task in tasks),
            percent(1.0 if row.linear_keep is None else row.linear_keep, 2),
            percent(1.0 if row.model_keep is None else row.model_keep, 2),
            *([percent(1.0 if row.time_keep is None else row.time_keep, 2)] if timed else []),
            row.dense_layers,
            None if row.seconds is None else seconds_text(row.seconds),
            row.backward_passes,
        )
        for name in order
        for row in (methods[name],)
    ]
    texts = [f"{task} perplexity (gap closed)" for task in tasks]
    kept = ("linear kept", "model kept", *(["predicted time"] if timed else []))
    figures = (*kept, "dense layers", "time", "backward passes")
    headers = columns("allocator", "held-out loss (nats/token)", *texts, *figures)
    console.table(f"{view.name}: gap closed = (ln uniform − ln x) / (ln uniform − ln dense)", headers, rows)
    for name, row in methods.items():
        if row.error is not None:
            console.text(f"{name} failed: {row.error}")


def _show_sizes(console: Console, name: str, models: Mapping[str, SizedModel]) -> None:
    """Show every form of the model with its size and loss, and which one is best for which size."""
    rows = [
        (
            model.title,
            model.size,
            f"{model.bytes / 1e6:,.1f}",
            ", ".join(f"{count} × {width}" for width, count in (model.layers or {}).items()),
            model.dense_layers,
            f"{model.held_out:.4f}",
            f"{math.exp(model.held_out):,.2f}",
        )
        for model in models.values()
        if model.bytes is not None and model.held_out is not None
    ]
    figures = ("layers × bits per weight", "dense layers", "held-out loss (nats/token)", "perplexity")
    console.table(name, columns("model", "made for", "weight files (MB)", *figures), rows)
    for model in models.values():
        if model.error is not None:
            console.text(f"{_sized_name(model)}: {model.error}")
        elif model.recovered == ():
            console.text(f"{_sized_name(model)}: no level lowered the divergence from the dense model")
    console.text(best_in_words(models.values()))


def _sized_name(model: SizedModel) -> str:
    return f"{model.title} for {model.size}" if model.size else model.title


def _held_out(methods: Mapping[str, ComparedMethod]) -> Callable[[str], float]:
    """Return a sort key: a method's held-out loss; methods without one come last."""
    return lambda name: math.inf if (loss := methods[name].held_out) is None else loss


def _perplexity(figures: ComparedText) -> str:
    closed = figures.gap_closed
    return f"{figures.perplexity:,.2f}" + ("" if closed is None else f" ({closed:.0%})")


def show_checkpoint(console: Console, view: StageView) -> None:
    """Show the size of a checkpoint and of the dense model."""
    results = CheckpointResults.read(view)
    dense, disk = results.dense_weight_bytes, results.disk_bytes
    rows = [
        ("linear layers kept", percent(results.linear_keep, 2)),
        ("whole model kept", percent(results.model_keep, 2)),
        ("parameters", count_text(results.parameters)),
        ("low-rank / dense layers", f"{results.low_rank_layers} / {results.dense_layers}"),
        ("weights on disk", f"{bytes_text(disk)} (dense {bytes_text(dense)}, {percent(disk / dense)})"),
    ]
    if (rounding := results.rounding) is not None:
        zero_points = " and a zero point" if rounding.zero_points else ""
        counts = [f"{bits} ({count} matrices)" for bits, count in rounding.bits.items()]
        if rounding.embedding_bits is not None:
            counts.append(f"{rounding.embedding_bits} (embedding and head)")
        rows.append(
            ("bits per weight", f"{', '.join(counts)}, a scale{zero_points} per {rounding.block_words} weights")
        )
        rows.append(("rounding", rounding.method))
        rows.append(("held-out loss", f"{rounding.loss_before:.4f} → {rounding.loss_after:.4f} nats/token"))
    console.table(f"{view.name}", columns("", ""), rows)
    if results.recovery is not None:
        _show_recovery(console, "Recovery", results.recovery)
    if results.recovery_after_rounding is not None:
        _show_recovery(console, "Recovery after rounding", results.recovery_after_rounding)


def _show_recovery(console: Console, what: str, figures: RecoveryFigures) -> None:
    """Show what each level of recovery has changed."""
    rows = [
        (
            row.level,
            f"{row.before:.4f}",
            f"{row.shown:.4f}{row.mark}",
            count_text(row.tokens),
            seconds_text(row.seconds),
        )
        for row in figures.levels
    ]
    headers = columns("level", "KL to dense before (held-out, nats/token)", "after", "training tokens", "time")
    title = f"{what}: held-out loss {figures.loss_before:.4f} → {figures.loss_after:.4f} nats/token, dense "
    console.table(f"{title}{figures.dense_loss:.4f}", headers, rows)


def show_export(console: Console, results: GraphResults) -> None:
    """Show the form of the graph, how much it differs from the checkpoint in torch, and what it cost to get so near."""
    if results.rounded and not results.rewritten:
        console.fact(_few_bits(results))
    if results.fallback is not None:
        wide = results.fallback
        # Short rows take fewer bytes in 16 bits: they fill no block, and need no scales.
        size = f"{bytes_text(abs(wide.extra_bytes))} {'more' if wide.extra_bytes >= 0 else 'less'}"
        console.fact(
            f"{results.precision} with {len(wide.matrices)} of {wide.candidates} products exact: {size}; "
            f"all in 8 bits: KL {wide.kl:.2g} nats"
        )
    if results.parity is None:
        console.warn("the graph was not compared with the checkpoint (--no-parity)")
        return
    rows = [
        (
            case.case,
            case.tokens,
            f"{case.difference:.2g}",
            percent(case.agreement, 2),
            f"{case.kl:.2g}",
            f"{case.nll_torch:.4f}",
            f"{case.nll_onnx:.4f}",
        )
        for case in results.parity.cases
    ]
    headers = columns(
        "run as", "tokens", "largest difference of a logit", "same token", "KL, nats", "NLL torch", "NLL ONNX"
    )
    console.table(f"{results.precision} graph in ONNX Runtime against torch", headers, rows)


def _few_bits(results: GraphResults) -> str:
    """Say in which form the graph has the matrices of few bits."""
    form = (
        "their inputs are rounded to 8 bits (exact with --precision fp32)"
        if results.precision == "int8" and results.execution_provider == "cpu"
        else "their products are exact"
    )
    memory = f"; {results.expanded} take the memory of float weights" if results.expanded else ""
    return f"{results.rounded} matrices of few bits as stored: {form}{memory}"


@shows_results
def show_report(console: Console, view: StageView, root: Path, copies: Sequence[Path]) -> None:
    """Show the verdict of a report, the missing results, and the files."""
    results = ReportResults.read(view)
    console.text(results.verdict)
    for item in results.missing:
        console.fact(f"without {item.what}: {item.command}")
    console.saved(view.path / HTML_FILE)
    for path in copies:
        console.saved(path)
    console.next_command(next_command(Workspace.open(root)))
    console.result(_document(view))


def show_end(console: Console, view: StageView, root: Path) -> None:
    """Show what was written and what comes next; in JSON mode, print the manifest."""
    manifest = manifest_of(view)
    console.fact(f"{seconds_text(manifest.seconds)}, peak memory {bytes_text(manifest.peak_memory_bytes)}")
    console.saved(view.path)
    console.next_command(next_command(Workspace.open(root), view))
    console.result(_document(view))


def show_pipeline(console: Console, views: Sequence[StageView], root: Path) -> None:
    """Show the figures of a whole run."""
    shown_kinds = {"training": show_training, "ranks": show_allocation, "evaluation": show_evaluation}
    for view in views:
        if view.kind in shown_kinds:
            shown_kinds[view.kind](console, view)
    for view in views:
        manifest = manifest_of(view)
        console.fact(f"{view.key}: {seconds_text(manifest.seconds)}, {bytes_text(manifest.peak_memory_bytes)} peak")
    console.saved(views[-1].path)
    console.next_command(next_command(Workspace.open(root), views[-1]))
    console.result({"stages": [_document(view) for view in views]})


def show_status(console: Console, workspace: Workspace) -> None:
    """Show every result of a workspace with its state, the missing stages, and the next command."""
    views = workspace.views()
    rows: list[tuple[str, ...]] = []
    for stage in steps():
        found = [view for view in views if view.stage == stage.name]
        rows += [_status_row(view) for view in found]
        if not found:
            rows.append((stage.name, "–", "optional" if stage.optional else "missing", "", "", stage.title))
    known = {stage.name for stage in steps()}
    rows += [_status_row(view) for view in views if view.stage not in known]
    model = (workspace.model or {}).get("requested", "no model yet")
    titles = ("stage", "name", "state", "made", "took", "what")
    console.table(f"{workspace.root}: {model}", [Column(title, "left") for title in titles], rows)
    following = next_command(workspace)
    console.next_command(following)
    console.result(
        {
            "workspace": str(workspace.root),
            "model": workspace.model,
            "stages": [
                {"stage": v.stage, "name": v.name, "state": v.state, "why": v.why, "remedy": v.remedy} for v in views
            ],
            "missing": [s.name for s in steps() if not any(v.stage == s.name for v in views)],
            "next": following,
        }
    )


def _status_row(view: StageView) -> tuple[str, ...]:
    manifest = view.manifest
    made = "" if manifest is None else f"{manifest.created[:16].replace('T', ' ')} UTC"
    time = "" if manifest is None else seconds_text(manifest.seconds)
    what = f"{view.why} ({view.remedy})" if view.remedy else view.why
    return view.stage, view.name, view.state, made, time, what or _figure_if_any(view)


def _figure_if_any(view: StageView) -> str:
    """Return a result's figures in one line; an unreadable one is named, and the list continues."""
    figure = _FIGURES.get(view.kind)
    if view.manifest is None or figure is None:
        return ""
    try:
        with shown(view):
            return figure(view)
    except CorruptedError as error:
        return f"written in another form ({error.hint})"


def _factors_figure(view: StageView) -> str:
    results = FactorsResults.read(view)
    return f"{len(results.modules)} layers, {count_text(results.linear_parameters)} parameters"


def _training_figure(view: StageView) -> str:
    return ", ".join(
        f"keep {keep}: {row.won:.4f} nats gained" for keep, row in TrainingResults.read(view).budgets.items()
    )


def _ranks_figure(view: StageView) -> str:
    results = RanksResults.read(view)
    return f"linear kept {percent(results.linear_keep, 2)}, {results.dense_layers} dense"


def _checkpoint_figure(view: StageView) -> str:
    results = CheckpointResults.read(view)
    return f"{count_text(results.parameters)} parameters, {bytes_text(results.disk_bytes)}"


def _evaluation_figure(view: StageView) -> str:
    results = EvaluationResults.read(view)
    texts = [f"{name} {task.models[results.chosen].perplexity:,.2f}" for name, task in results.texts.items()]
    tasks = [f"{name} {task.models[results.chosen].value:.3g}" for name, task in results.harness.items()]
    chats = [
        f"{name} {chat.models[results.chosen].empty:,} of {chat.conversations:,} answers empty"
        for name, chat in results.chats.items()
    ]
    return ", ".join([*texts, *chats, *tasks])


def _comparison_figure(view: StageView) -> str:
    results = ComparisonResults.read(view)
    if results.models is not None:
        return best_in_words(results.models.values())
    methods = results.methods
    measured = (name for name, row in methods.items() if name != DENSE and row.held_out is not None)
    return "best on held-out text: " + min(measured, key=_held_out(methods), default="–")


def _report_figure(view: StageView) -> str:
    return f"of {manifest_of(view).parents[0].key}, {HTML_FILE}"


# What ``ara status`` shows of a result, by kind.
_FIGURES: dict[str, Callable[[StageView], str]] = {
    "factors": _factors_figure,
    "training": _training_figure,
    "ranks": _ranks_figure,
    "checkpoint": _checkpoint_figure,
    "evaluation": _evaluation_figure,
    "comparison": _comparison_figure,
    "benchmark": bench_figure,
    "report": _report_figure,
}


def _document(view: StageView) -> dict[str, Any]:
    manifest = manifest_of(view).model_dump(mode="json")
    kept = ("stage", "name", "id", "parents", "config", "model", "seconds", "peak_memory_bytes", "results")
    return {"path": str(view.path), **{key: manifest[key] for key in kept}}
