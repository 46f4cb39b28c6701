"""Tables and the figure from finished rows of ``benchmarks/quality.py``; needs no model and no text.

    python benchmarks/quality_table.py                       # the published rows, as tables on the terminal
    python benchmarks/quality_table.py --markdown            # the table of docs/measurements/quality.md
    python benchmarks/quality_table.py --summary             # the table of the README
    python benchmarks/quality_table.py --curves              # held-out loss by step, for docs/measurements/quality.md
    python benchmarks/quality_table.py --figure docs/quality.svg

Gap closed = (ln ppl_uniform − ln ppl) / (ln ppl_uniform − ln ppl_dense), where uniform means whitened factors at
uniform ranks. Rows with several seeds show means, with the range.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ara.reporting.figures import keep_curves
from ara_cli.console import Column, Console
from ara_cli.formatting import percent, seconds_text

TASKS = ("wikitext2", "c4")
# Budgets of the tables in README and docs.
TABLE_KEEPS = (0.8, 0.6)
PUBLISHED = Path(__file__).parent / "results" / "quality.json"
# Factors in the order in which tables show them.
FACTORS = ("whitened", "two-sided", "two-sided, pivoted")
# Rows of the README's table: factors, method, how the README names method and layout.
SUMMARY = (
    ("whitened", "uniform", "uniform", "factors"),
    ("two-sided", "ara", "**ARA**", "factors"),
    ("two-sided, pivoted", "ara", "**ARA**", "pivoted"),
)
# Longer names of some methods.
NAMES = {"ara": "**ara**", "ara-paper": "the paper's form"}

Rows = Mapping[str, Mapping[str, Any]]


def keeps_of(rows: Rows) -> list[float]:
    """Return the budgets that rows were measured at, largest first."""
    return sorted({float(key.split("/")[2]) for key in rows if key.count("/") == 3}, reverse=True)


def groups_of(rows: Rows, keep: float) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Return (factors, method) → its rows at one budget, one per seed; sorted by factors, then from worst to best."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for key, row in rows.items():
        parts = key.split("/")
        if len(parts) == 4 and float(parts[2]) == keep and "error" not in row:
            groups.setdefault((parts[0], parts[1]), []).append(row)

    def place(name: tuple[str, str]) -> tuple[int, float]:
        found = groups[name]
        return FACTORS.index(name[0]), -sum(row["wikitext2"] for row in found) / len(found)

    return {name: groups[name] for name in sorted(groups, key=place)}


def share_closed(rows: Rows, row: Mapping[str, Any], keep: float, task: str) -> float:
    """Return the share of the gap between whitened uniform ranks and the dense model that ``row`` closes."""
    from ara.stages.compare import gap_closed

    found = gap_closed(row[task], rows[f"whitened/uniform/{keep:g}/0"][task], rows["dense"][task])
    assert found is not None, "uniform ranks lose nothing: there is no gap"
    return found


def mean_and_range(values: Sequence[float], text: Callable[[float], str], unit: str = "") -> str:
    """Return the mean, with the range of several values."""
    mean = f"{text(sum(values) / len(values))}{unit}"
    low, high = text(min(values)), text(max(values))
    return mean if low == high else f"{mean} ({low} – {high})"


def perplexity_text(value: float) -> str:
    """Return a perplexity with its significant digits."""
    return f"{value:.1f}" if value < 200 else f"{value:.0f}"


def cells_of(rows: Rows, found: Sequence[Mapping[str, Any]], keep: float) -> list[str]:
    """Return perplexity and gap closed for each text, then the number of dense layers."""
    cells = []
    for task in TASKS:
        cells.append(mean_and_range([math.exp(row[task]) for row in found], perplexity_text))
        closed = [100 * share_closed(rows, row, keep, task) for row in found]
        cells.append(mean_and_range(closed, lambda value: f"{value:.1f}", " %"))
    cells.append(mean_and_range([row["dense_layers"] for row in found], lambda value: f"{value:.0f}"))
    return cells


def show(console: Console, rows: Rows) -> None:
    """Print one table per budget."""
    dense = ", ".join(f"{task} {math.exp(rows['dense'][task]):.2f}" for task in TASKS)
    console.text(f"dense perplexity: {dense}")
    columns = [Column("factors", "left"), Column("allocation", "left")]
    for task in TASKS:
        columns += [Column(f"{task} perplexity"), Column("gap closed")]
    columns += [Column("dense layers"), Column("time"), Column("backward passes"), Column("seeds"), Column("kept")]
    for keep in keeps_of(rows):
        table = []
        for name, found in groups_of(rows, keep).items():
            costs = [
                seconds_text(sum(row["seconds"] for row in found) / len(found)),
                str(round(sum(row["backward_passes"] for row in found) / len(found))),
                str(len(found)),
                percent(found[0]["linear_keep"], 2),
            ]
            table.append([*name, *cells_of(rows, found, keep), *costs])
        console.table(f"keep {keep:g}", columns, table)
    for key, row in rows.items():
        if "error" in row:
            console.warn(f"{key}: {row['error']}")


def markdown(rows: Rows, keeps: Sequence[float]) -> str:
    """Return the table of all methods, for docs/measurements/quality.md."""
    lines = [
        "| keep | factors | ranks | seeds | WikiText-2 | gap closed | C4 | gap closed | dense layers |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for keep in keeps:
        for number, ((factors, method), found) in enumerate(groups_of(rows, keep).items()):
            first = f"{keep:g}" if number == 0 else ""
            cells = [factors, NAMES.get(method, method), str(len(found)), *cells_of(rows, found, keep)]
            lines.append(" | ".join([f"| {first}" if first else "|", *cells]) + " |")
    return "\n".join(lines) + "\n"


def summary(rows: Rows, keeps: Sequence[float]) -> str:
    """Return the table of the README: uniform ranks and ARA, means over seeds."""
    lines = ["| keep | ranks | layout | WikiText-2 | gap closed | C4 |", "|---|---|---|---:|---:|---:|"]
    for keep in keeps:
        groups = groups_of(rows, keep)
        for factors, method, name, layout in SUMMARY:
            found = [cell.partition(" (")[0] for cell in cells_of(rows, groups[factors, method], keep)]
            lines.append(f"| {keep:g} | {name} | {layout} | {found[0]} | {found[1]} | {found[2]} |")
    return "\n".join(lines) + "\n"


def curves(rows: Rows, keeps: Sequence[float]) -> str:
    """Return held-out loss over the steps of ARA's trainings, seed 0, for docs/measurements/quality.md."""
    lines: list[str] = []
    for keep in keeps:
        for factors, label in (("two-sided", ""), ("two-sided, pivoted", ", pivoted")):
            curve = dict(rows.get(f"{factors}/ara/{keep:g}/0", {}).get("curve", ()))
            if curve and not lines:
                lines = ["| step | " + " | ".join(map(str, curve)) + " |", "|---|" + "---:|" * len(curve)]
            best = min(curve.values(), default=None)
            cells = [f"**{loss:.4f}**" if loss == best else f"{loss:.4f}" for loss in curve.values()]
            lines += [f"| keep {keep:g}{label} | " + " | ".join(cells) + " |"] if cells else []
    return "\n".join(lines) + "\n"


def draw(rows: Rows) -> bytes:
    """Draw WikiText-2 perplexity against keep: uniform ranks, ARA, and the rival that is best on average."""

    def curve(factors: str, method: str) -> dict[float, float]:
        found = {keep: rows.get(f"{factors}/{method}/{keep:g}/0", {}) for keep in keeps_of(rows)}
        return {keep: math.exp(row["wikitext2"]) for keep, row in found.items() if "wikitext2" in row}

    ours = ("uniform", "sensitivity", "ara")
    methods = dict.fromkeys(key.split("/")[1] for key in rows if key.startswith("two-sided/"))
    rivals = {name: curve("two-sided", name) for name in methods if name not in ours}
    most = max((len(points) for points in rivals.values()), default=0)
    whole = {name: points for name, points in rivals.items() if len(points) == most}
    best = min(whole, key=lambda name: sum(math.log(value) for value in whole[name].values()))
    curves = {
        "uniform ranks, whitened factors": curve("whitened", "uniform"),
        f"{best}, two-sided factors": rivals[best],
        "ARA, two-sided factors": curve("two-sided", "ara"),
        "ARA, two-sided factors, pivoted": curve("two-sided, pivoted", "ara"),
    }
    return keep_curves(curves, math.exp(rows["dense"]["wikitext2"]), "SmolLM2-135M, WikiText-2")


def main() -> None:
    """Print or draw what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=PUBLISHED, help="file of finished rows")
    parser.add_argument("--markdown", action="store_true", help="print the table of all methods for the docs instead")
    parser.add_argument("--summary", action="store_true", help="print the table of the README instead")
    parser.add_argument("--curves", action="store_true", help="print held-out loss over the steps of ARA's trainings")
    parser.add_argument("--figure", type=Path, help="draw WikiText-2 perplexity against keep into this SVG file")
    arguments = parser.parse_args()
    rows = json.loads(arguments.results.read_text(encoding="utf-8"))["rows"]
    if arguments.figure:
        arguments.figure.write_bytes(draw(rows))
    elif arguments.markdown:
        print(markdown(rows, TABLE_KEEPS), end="")
    elif arguments.summary:
        print(summary(rows, TABLE_KEEPS), end="")
    elif arguments.curves:
        print(curves(rows, TABLE_KEEPS), end="")
    else:
        show(Console(), rows)


if __name__ == "__main__":
    main()
