"""Tables of results; each function draws one stage's figures from its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ara.errors import CorruptedError
from ara.pipeline import STAGES
from ara.workspace.following import next_command
from ara.workspace.store import Workspace
from ara.workspace.view import StageView
from ara_cli.console import Column, Console
from ara_cli.formatting import bytes_text, count_text, percent, seconds_text
from ara_cli.render_bench import figure
from ara_cli.render_eval import show_evaluation
from ara_cli.shown import shown, shows_results

_LEFT: Literal["left"] = "left"


def show_decomposition(console: Console, view: StageView) -> None:
    """Show the factored layers by kind."""
    results = _manifest(view)["results"]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for module in results["modules"]:
        kinds.setdefault(module["kind"], []).append(module)
    rows = []
    for kind, modules in kinds.items():
        m, n = modules[0]["m"], modules[0]["n"]
        rows.append(
            (kind, len(modules), f"{m} × {n}", min(m, n), (m * n - 1) // (m + n), count_text(len(modules) * m * n))
        )
    columns = [
        Column("layers", _LEFT),
        Column("count"),
        Column("shape (out × in)"),
        Column("full rank"),
        Column("highest paying rank (factors)"),
        Column("parameters"),
    ]
    linear, model = count_text(results["linear_parameters"]), count_text(results["model_parameters"])
    count = len(results["modules"])
    console.table(f"Factored {count} layers, {linear} of the model's {model} parameters", columns, rows)


@shows_results
def show_allocation(console: Console, view: StageView) -> None:
    """Show kept ranks by kind, and what is kept of linear layers and of the whole model."""
    results = _manifest(view)["results"]
    rows = []
    for kind, row in results["kinds"].items():
        ranks = "–" if row["rank_mean"] is None else f"{row['rank_min']} / {row['rank_mean']:.0f} / {row['rank_max']}"
        m, n = row["shape"]
        rows.append((kind, f"{m} × {n}", f"{row['dense']} of {row['layers']}", ranks, percent(row["keep"])))
    columns = [
        Column("layers", _LEFT),
        Column("shape (out × in)"),
        Column("dense"),
        Column("rank min / mean / max"),
        Column("kept"),
    ]
    title = (
        f"{view.name}: {percent(results['linear_keep'], 2)} of the linear layers' parameters kept, "
        f"{percent(results['model_keep'], 2)} of the whole model's"
    )
    console.table(title, columns, rows)
    guard = results.get("guard")
    if guard is not None:
        losses, winner = guard["held_out"], guard["winner"]
        # What JSON cannot say, NaN and infinity, is stored as null.
        told = {name: "not finite" if loss is None else f"{loss:.4f}" for name, loss in losses.items()}
        for name, stderr in guard["stderr"].items():
            if name != winner and losses[name] is not None:
                told[name] += f" (+{losses[name] - losses[winner]:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
                told[name] += ")"
        each = ", ".join(f"{name} {told[name]}" for name in losses if name != "dense")
        console.text(f"guard, held-out loss in nats per token (dense {told['dense']}): {each}; {winner} won")


def show_training(console: Console, view: StageView) -> None:
    """Show what the training has won at each budget."""
    rows = [
        (
            keep,
            f"{row['start_held_out']:.4f}",
            f"{row['held_out']:.4f}",
            f"{row['start_held_out'] - row['held_out']:.4f}",
            f"{row['best_step']} of {row['steps']}",
            sum(rank == "dense" for rank in row["ranks"].values()),
            row["backward_passes"],
            seconds_text(row["seconds"]),
        )
        for keep, row in _manifest(view)["results"]["budgets"].items()
    ]
    columns = [
        Column("keep", _LEFT),
        Column("held-out loss of the start (nats/token)"),
        Column("of the best"),
        Column("won"),
        Column("best step"),
        Column("dense layers"),
        Column("backward passes"),
        Column("time"),
    ]
    console.table(f"{view.name}: trained masks", columns, rows)


@shows_results
def show_comparison(console: Console, view: StageView) -> None:
    """Show all allocators, best held-out loss first, the dense model on top."""
    rows_by_name = _manifest(view)["results"]["methods"]
    dense = rows_by_name["dense"]
    tasks = list(dense["tasks"])
    measured = {name: row for name, row in rows_by_name.items() if "tasks" in row}
    order = ["dense", *sorted((n for n in measured if n != "dense"), key=lambda name: measured[name]["held_out"])]
    rows = [
        (
            name,
            f"{row['held_out']:.4f}",
            *(_perplexity(row["tasks"][task]) for task in tasks),
            percent(row.get("linear_keep", 1.0), 2),
            percent(row.get("model_keep", 1.0), 2),
            row.get("dense_layers"),
            None if name == "dense" else seconds_text(row["seconds"]),
            row.get("backward_passes"),
        )
        for name in order
        for row in (measured[name],)
    ]
    columns = [
        Column("allocator", _LEFT),
        Column("held-out loss (nats/token)"),
        *(Column(f"{task} perplexity (gap closed)") for task in tasks),
        Column("linear kept"),
        Column("model kept"),
        Column("dense layers"),
        Column("time"),
        Column("backward passes"),
    ]
    console.table(f"{view.name}: gap closed = (ln uniform − ln x) / (ln uniform − ln dense)", columns, rows)
    for name, row in rows_by_name.items():
        if "error" in row:
            console.text(f"{name} failed: {row['error']}")


def _perplexity(figures: dict[str, Any]) -> str:
    closed = figures.get("gap_closed")
    return f"{figures['perplexity']:,.2f}" + ("" if closed is None else f" ({closed:.0%})")


def show_checkpoint(console: Console, view: StageView) -> None:
    """Show the size of a checkpoint beside the dense one."""
    results = _manifest(view)["results"]
    dense, disk = results["dense_weight_bytes"], results["disk_bytes"]
    rows = [
        ("linear layers kept", percent(results["linear_keep"], 2)),
        ("whole model kept", percent(results["model_keep"], 2)),
        ("parameters", count_text(results["parameters"])),
        ("low-rank / dense layers", f"{results['low_rank_layers']} / {results['dense_layers']}"),
        ("weights on disk", f"{bytes_text(disk)} (dense {bytes_text(dense)}, {percent(disk / dense)})"),
    ]
    console.table(f"{view.name}", [Column("", _LEFT), Column("")], rows)


def show_export(console: Console, about: dict[str, Any]) -> None:
    """Show how far the graph is from the checkpoint."""
    if about["parity"] is None:
        console.warn("the graph was not compared with the checkpoint (--no-parity)")
        return
    cases = about["parity"]["cases"]
    rows = [
        (
            case["case"],
            case["tokens"],
            f"{case['difference']:.2g}",
            percent(case["agreement"], 2),
            f"{case['kl']:.2g}",
            f"{case['nll_torch']:.4f}",
            f"{case['nll_onnx']:.4f}",
        )
        for case in cases
    ]
    columns = [
        Column("run as", _LEFT),
        Column("tokens"),
        Column("largest difference of a logit"),
        Column("same token"),
        Column("KL, nats"),
        Column("NLL torch"),
        Column("NLL ONNX"),
    ]
    console.table(f"{about['precision']} graph in ONNX Runtime against torch", columns, rows)


@shows_results
def show_report(console: Console, view: StageView, root: Path, copies: Sequence[Path]) -> None:
    """Show the sentence of a report, what it lacks, and where it is."""
    results = _manifest(view)["results"]
    console.text(results["verdict"])
    for item in results["missing"]:
        console.fact(f"without {item['what']}: {item['command']}")
    console.saved(view.path / "report.html")
    for path in copies:
        console.saved(path)
    console.next_command(next_command(Workspace.open(root)))
    console.result(_document(view))


def show_end(console: Console, view: StageView, root: Path) -> None:
    """Say what was written and what comes next; in JSON mode, print the manifest."""
    manifest = _manifest(view)
    console.fact(f"{seconds_text(manifest['seconds'])}, peak memory {bytes_text(manifest['peak_memory_bytes'])}")
    console.saved(view.path)
    console.next_command(next_command(Workspace.open(root), view))
    console.result(_document(view))


def show_pipeline(console: Console, views: Sequence[StageView], root: Path) -> None:
    """Show the figures of a whole run."""
    for view in views:
        if view.stage == "train-masks":
            show_training(console, view)
        elif view.stage == "allocate":
            show_allocation(console, view)
        elif view.stage == "eval":
            show_evaluation(console, view)
    for view in views:
        manifest = _manifest(view)
        console.fact(
            f"{view.key}: {seconds_text(manifest['seconds'])}, {bytes_text(manifest['peak_memory_bytes'])} peak"
        )
    console.saved(views[-1].path)
    console.next_command(next_command(Workspace.open(root), views[-1]))
    console.result({"stages": [_document(view) for view in views]})


def show_status(console: Console, workspace: Workspace) -> None:
    """Show every result of a workspace with its state, the missing stages, and the next command."""
    views = workspace.views()
    rows: list[tuple[str, ...]] = []
    for stage in STAGES:
        found = [view for view in views if view.stage == stage.name]
        rows += [_status_row(view) for view in found]
        if not found:
            rows.append((stage.name, "–", "optional" if stage.optional else "missing", "", "", stage.title))
    known = {stage.name for stage in STAGES}
    rows += [_status_row(view) for view in views if view.stage not in known]
    model = (workspace.model or {}).get("requested", "no model yet")
    titles = ("stage", "name", "state", "made", "took", "what")
    console.table(f"{workspace.root}: {model}", [Column(title, _LEFT) for title in titles], rows)
    following = next_command(workspace)
    console.next_command(following)
    console.result(
        {
            "workspace": str(workspace.root),
            "model": workspace.model,
            "stages": [
                {"stage": v.stage, "name": v.name, "state": v.state, "why": v.why, "remedy": v.remedy} for v in views
            ],
            "missing": [s.name for s in STAGES if not any(v.stage == s.name for v in views)],
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
    """Return what a result's figures say in one line; one of another form is named, and does not end the list."""
    try:
        with shown(view):
            return _figure(view)
    except CorruptedError as error:
        return f"written in another form ({error.hint})"


def _figure(view: StageView) -> str:
    if view.manifest is None:
        return ""
    results = view.manifest.results
    if view.stage == "decompose":
        return f"{len(results['modules'])} layers, {count_text(results['linear_parameters'])} parameters"
    if view.stage == "train-masks":
        won = (f"keep {k}: {b['start_held_out'] - b['held_out']:.4f} nats won" for k, b in results["budgets"].items())
        return ", ".join(won)
    if view.stage == "compare":
        losses = {name: row["held_out"] for name, row in results["methods"].items() if "held_out" in row}
        return "best on held-out text: " + min((n for n in losses if n != "dense"), key=losses.__getitem__, default="–")
    if view.stage == "allocate":
        return f"linear kept {percent(results['linear_keep'], 2)}, {results['dense_layers']} dense"
    if view.stage == "truncate":
        return f"{count_text(results['parameters'])} parameters, {bytes_text(results['disk_bytes'])}"
    if view.stage == "report":
        return f"of truncate/{results['checkpoint']}, report.html"
    if view.stage == "eval":
        chosen = results["chosen"]
        return ", ".join(
            f"{name} {row['perplexity']:,.2f}" if task["kind"] == "text" else f"{name} {row['value']:.3g}"
            for name, task in results["tasks"].items()
            for row in [task["models"][chosen]]
        )
    if view.stage == "bench":
        return figure(results)
    return ""


def _manifest(view: StageView) -> dict[str, Any]:
    if view.manifest is None:  # what it was made from is not what it seemed
        raise CorruptedError(view.why, view.remedy or None)
    return view.manifest.model_dump(mode="json")


def _document(view: StageView) -> dict[str, Any]:
    manifest = _manifest(view)
    kept = ("stage", "name", "id", "parents", "config", "model", "seconds", "peak_memory_bytes", "results")
    return {"path": str(view.path), **{key: manifest[key] for key in kept}}
