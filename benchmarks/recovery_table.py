"""Prints the rows of ``benchmarks/recovery.py`` as Markdown tables.

python benchmarks/recovery_table.py benchmarks/results/recovery.json
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ara_cli.console import Console
from benchmarks.recovery_rows import ORDER, Row, gap_closed, reference
from benchmarks.text_losses import TEXTS


def parsed(key: str) -> Row | None:
    """Return the row with a key; ``None`` for the dense model and the reference."""
    parts = key.split("/")
    if len(parts) != 5:
        return None
    calibration, ranks, keep, seed, level = parts
    return Row(calibration, ranks, float(keep), int(seed), level)


def quality(rows: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of quality: perplexity and gap closed on every text, chat, repetition."""
    columns = ["text", "keep", "ranks", "level", "seeds"]
    columns += [word for text in TEXTS for word in (text, "gap closed")]
    columns += ["chat KL", "agreement", "empty answers", "repeating"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * 4 + "---:|" * (len(columns) - 4)]
    if "dense" in rows:
        lines.append(_line("–", "–", "dense", "–", [rows["dense"]], [[None] * len(TEXTS)]))
    for group in _groups(rows):
        first = group[0]
        closed = [[gap_closed(rows, row, text) for text in TEXTS] for row in group]
        found = [rows[row.key] for row in group]
        lines.append(_line(first.calibration, f"{first.keep:g}", first.ranks, first.level, found, closed))
    for key in sorted({reference(row.calibration, row.keep) for group in _groups(rows) for row in group} & set(rows)):
        calibration, _, keep = key.split("/")
        lines.append(_line(calibration, keep, "uniform, whitened factors", "frozen", [rows[key]], [[0.0] * len(TEXTS)]))
    return lines


def cost(rows: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of cost: divergence on held-out text, tokens, time and memory of every level."""
    lines = ["| text | keep | ranks | seed | level | held-out KL | kept | tokens | minutes | peak memory, GiB |"]
    lines.append("|" + "---|" * 5 + "---:|" * 5)
    for key, found in rows.items():
        row = parsed(key)
        if row is None or "level" not in found:
            continue
        level, memory = found["level"], found["peak_memory_bytes"] / 2**30
        figures = f"{level['before']:.3f} → {level['after']:.3f} | {'yes' if level['kept'] else 'no'}"
        figures += f" | {level['tokens']:,} | {level['seconds'] / 60:.1f} | {memory:.1f}"
        lines.append(f"| {row.calibration} | {row.keep:g} | {row.ranks} | {row.seed} | {row.level} | {figures} |")
    return lines


def show(console: Console, rows: Mapping[str, Any]) -> None:
    """Print both tables."""
    for lines in (quality(rows), cost(rows)):
        console.text("\n".join(lines))
        console.text("")


def _groups(rows: Mapping[str, Any]) -> list[list[Row]]:
    """Return the rows that differ in their seed only, in the order of budgets, ranks and levels."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in filter(None, map(parsed, rows)):
        groups.setdefault((row.calibration, -row.keep, row.ranks, ORDER.index(row.level)), []).append(row)
    return [groups[name] for name in sorted(groups)]


def _line(
    calibration: str,
    keep: str,
    ranks: str,
    level: str,
    found: Sequence[Mapping[str, Any]],
    closed: Sequence[Sequence[float | None]],
) -> str:
    cells = [calibration, keep, ranks, level, str(len(found))]
    for index, text in enumerate(TEXTS):
        cells.append(_spread([math.exp(one["texts"][text]) for one in found], "{:,.4g}"))
        shares = [one[index] for one in closed]
        known = [share for share in shares if share is not None]
        cells.append(_spread([100 * share for share in known], "{:.1f} %") if known else "–")
    for name, form in (("chat_kl", "{:.3f}"), ("agreement", "{:.1%}")):
        cells.append(_spread([one[name] for one in found], form) if name in found[0] else "–")
    cells.append(", ".join(f"{one['empty']} of {one['conversations']}" for one in found))
    cells.append(_spread([one["repeating"] for one in found], "{:.0%}"))
    return "| " + " | ".join(cells) + " |"


def _spread(values: Sequence[float], form: str) -> str:
    """Return the mean, and the range if there are several values."""
    mean = form.format(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} – {form.format(max(values))})"


if __name__ == "__main__":
    show(Console(), json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["rows"])
