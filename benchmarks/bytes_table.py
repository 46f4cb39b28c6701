"""Prints the rows of ``benchmarks/bytes.py`` as Markdown tables, and what they say.

python benchmarks/bytes_table.py bench-bytes/bytes.json
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ara.allocation.forms import FORMS, JOINT
from ara_cli.console import Console
from benchmarks.bytes_rows import DISTILLED, FROZEN, ORIGINAL, RECOVERED, TWIN, Row, level_at
from benchmarks.text_losses import TEXTS

# A difference of at least this many standard errors counts, and a gain of at least this many nats is the goal.
SURE, GAIN = 2.0, 0.05
_ON_THE_GRID = (
    "The original model was stored in 4 bits (Q4_1), so its weights lie on a 4-bit grid. Rounding them to 4 bits with "
    "zero points in blocks of 32 costs next to nothing. That is no result about 4 bits. The twin computes the same "
    "function, and its weights lie on no grid."
)

Rows = Mapping[str, Mapping[str, Any]]


def fitting(rows: Rows, size: int, level: str) -> dict[str, Mapping[str, Any]]:
    """Return form → row of the twin's models that fit a size.

    Args:
        rows: finished rows.
        size: of the linear layers, per cent of bfloat16.
        level: of forms that can have it, see :func:`benchmarks.bytes_rows.level_at`.
    """
    found = {}
    for name, form in FORMS.items():
        row = rows.get(Row(TWIN, name, size if form.sized else None, level_at(name, level)).key, {})
        if "texts" in row and row["linear_share"] <= size / 100 + 1e-9:
            found[name] = row
    return found


def best(models: Rows, text: str) -> str:
    """Return the form with the lowest loss on a text."""
    return min(models, key=lambda name: float(models[name]["texts"][text]))


def lead(models: Rows, text: str) -> tuple[float, float] | None:
    """Return the loss of joint less that of the best other form, and its paired standard error, nats per token.

    ``None`` if joint or all others are missing, or if there is a single window.
    """
    others = {name: row for name, row in models.items() if name != JOINT}
    if JOINT not in models or not others:
        return None
    pairs = zip(models[JOINT]["windows"][text], others[best(others, text)]["windows"][text], strict=True)
    differences = [ours - theirs for ours, theirs in pairs]
    if len(differences) < 2:
        return None
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def quality(rows: Rows, text: str, level: str) -> list[str]:
    """Return the lines of the table of one text: perplexity of every form at every size, the best one in bold."""
    columns = [
        "size",
        "file, MB",
        *(form.title for form in FORMS.values()),
        "best",
        "ranks and bits − best other, nats",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---:|" * (len(columns) - 2) + "---|---:|"]
    for size in sizes_of(rows, level):
        models = fitting(rows, size, level)
        if not models:
            continue
        first = best(models, text)
        cells = [f"{size} %", f"{_limit(rows, size) / 1e6:,.1f}"]
        for name in FORMS:
            shown = f"{math.exp(models[name]['texts'][text]):,.4g}" if name in models else "–"
            cells.append(f"**{shown}**" if name == first else shown)
        lines.append("| " + " | ".join([*cells, FORMS[first].title, _lead_text(lead(models, text))]) + " |")
    return lines


def files(rows: Rows) -> list[str]:
    """Return the lines of the table of files: bytes, layers by bits, low-rank layers, time; or why there is none."""
    lines = ["| model | form | size | level | linear layers | file, MB | low-rank layers | layers by bits | minutes |"]
    lines.append("|" + "---|" * 4 + "---:|" * 5)
    for key, found in rows.items():
        row = Row.parsed(key)
        asked = "–" if row.size is None else f"{row.size} %"
        if "error" in found:
            figures = [found["error"], *["–"] * 4]
        else:
            bits = ", ".join(f"{count} × {width}" for width, count in found["layers"].items())
            figures = [f"{found['linear_share']:.1%}", f"{found['file_bytes'] / 1e6:,.1f}"]
            figures += [str(found["low_rank_layers"]), bits, f"{found['seconds'] / 60:.1f}"]
        lines.append("| " + " | ".join([row.model, FORMS[row.form].title, asked, row.level, *figures]) + " |")
    return lines


def original(rows: Rows) -> list[str]:
    """Return the lines of the table of the original model, with a note on its 4 bits; none without its rows."""
    keys = {name: Row(ORIGINAL, name, None, FROZEN).key for name in FORMS}
    found = {name: rows[key] for name, key in keys.items() if "texts" in rows.get(key, {})}
    if not found:
        return []
    lines = ["| original model | " + " | ".join(TEXTS) + " |", "|---|" + "---:|" * len(TEXTS)]
    for name, row in found.items():
        values = [f"{math.exp(row['texts'][text]):,.4g}" for text in TEXTS]
        no_result = " (no result, see below)" if 4 in FORMS[name].bits else ""
        lines.append(f"| {FORMS[name].title}{no_result} | " + " | ".join(values) + " |")
    return [*lines, "", _ON_THE_GRID]


def conclusions(rows: Rows) -> Iterator[str]:
    """Yield sentences: what calibration saves at 4 bits, and where joint is worse or better than every other form."""
    yield from _calibration(rows)
    yield from _after_rounding(rows)
    for level in (FROZEN, RECOVERED, DISTILLED):
        worse, better, count = [], [], 0
        for size in sizes_of(rows, level):
            for text in TEXTS:
                found = lead(fitting(rows, size, level), text)
                if found is None:
                    continue
                count += 1
                difference, stderr = found
                worse += [f"{size} % ({text}, {difference:+.3f})"] * (difference > SURE * stderr)
                better += [f"{size} % ({text}, {difference:+.3f})"] * (difference <= -GAIN)
        if count:
            yield (
                f"{level}: joint loses to the best other form by more than {SURE:g} paired standard errors at "
                f"{', '.join(worse) or 'no size'}; it wins by at least {GAIN} nats at {', '.join(better) or 'no size'}."
            )


def _calibration(rows: Rows) -> Iterator[str]:
    names = ("dense", "int4-nearest", "int4")
    found = [rows.get(Row(TWIN, name, None, FROZEN).key, {}) for name in names]
    if all("texts" in row for row in found):
        for text in TEXTS:
            dense, nearest, calibrated = (float(row["texts"][text]) for row in found)
            lost = nearest - dense
            share = f"{(calibrated - dense) / lost:.0%} of it" if lost > 0 else "no loss to compare with"
            yield f"dense int4, {text}: calibrated loses {calibrated - dense:.3f} nats, nearest {lost:.3f} ({share})."


def _after_rounding(rows: Rows) -> Iterator[str]:
    """Yield what each repair after rounding changes."""
    for row in map(Row.parsed, rows):
        before = rows.get(Row(row.model, row.form, row.size, level_at(row.form, RECOVERED)).key, {})
        after = rows[row.key]
        if row.level == DISTILLED and "texts" in before and "texts" in after:
            found = [f"{text} {_change_text(before['windows'][text], after['windows'][text])}" for text in TEXTS]
            size = "" if row.size is None else f" at {row.size} %"
            yield f"{FORMS[row.form].title}{size}, repaired after rounding: {', '.join(found)} nats."


def _change_text(before: Sequence[float], after: Sequence[float]) -> str:
    differences = [late - early for early, late in zip(before, after, strict=True)]
    words = f"{statistics.fmean(differences):+.3f}"
    if len(differences) < 2:
        return words
    return f"{words} ± {statistics.stdev(differences) / math.sqrt(len(differences)):.3f}"


def sizes_of(rows: Rows, level: str) -> list[int]:
    """Return the sizes with a finished row of a level, largest first."""
    parsed = [Row.parsed(key) for key in rows]
    return sorted({row.size for row in parsed if row.size is not None and row.level == level}, reverse=True)


def _limit(rows: Rows, size: int) -> int:
    """Return the bytes that a file of a size may have."""
    limits = (row["limit_bytes"] for key, row in rows.items() if Row.parsed(key).size == size)
    return int(next(limits))


def _lead_text(found: tuple[float, float] | None) -> str:
    if found is None:
        return "–"
    difference, stderr = found
    sure = abs(difference) > SURE * stderr
    word = ("worse" if difference > 0 else "better") if sure else f"within {SURE:g} standard errors"
    return f"{difference:+.3f} ± {stderr:.3f}: {word}"


def show(console: Console, rows: Rows) -> None:
    """Print all tables and what they say."""
    for level in (FROZEN, RECOVERED, DISTILLED):
        for text in TEXTS if sizes_of(rows, level) else ():
            console.text(f"{text}, {level}: perplexity of the twin\n")
            console.text("\n".join(quality(rows, text, level)) + "\n")
    for lines in (original(rows), files(rows), list(conclusions(rows))):
        console.text("\n".join(lines) + "\n")


if __name__ == "__main__":
    show(Console(), json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["rows"])
