"""Time of ``ara decompose`` when the second moments of all layers do not fit into memory, before and after a change.

    python benchmarks/chunks.py --before TREE --after TREE
    python benchmarks/chunks.py --before TREE --after TREE --samples 64 --rounds 5 --json FILE

``--moment-memory`` is so small that the 30 blocks of SmolLM2-135M are factored in five chunks of six. Each command
runs in its own process and in a new workspace. The trees alternate (A B A B …), so that a change of the machine's speed
affects both. The output has medians and ranges of wall seconds, processor seconds, and seconds of the stage without
imports. It also says whether the factors have the same bytes. ``--chunks 1`` measures what five chunks cost over one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parent.parent
# GiB for second moments: the two-sided method needs 36.6 MB for a block of SmolLM2-135M, so 0.21 GiB hold six of 30.
MOMENT_MEMORY = {1: 4.0, 5: 0.21, 30: 0.0001}
MEASURES = ("wall", "processor", "stage")


def main() -> None:
    """Measure both trees in turn, print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="TREE", help="root of the code before")
    parser.add_argument("--after", type=Path, required=True, metavar="TREE", help="root of the code after")
    parser.add_argument("--chunks", type=int, choices=list(MOMENT_MEMORY), default=5)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of --seq-len tokens")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tree")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    sys.path.insert(0, str(_REPOSITORY))
    trees = {"before": arguments.before.resolve(), "after": arguments.after.resolve()}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for _ in range(arguments.rounds):
        for name, tree in trees.items():
            rows[name].append(_decompose(tree, arguments))
            print(f"{name}: " + ", ".join(f"{key} {rows[name][-1][key]:.1f} s" for key in MEASURES), flush=True)
    _show(rows, arguments)


def _decompose(tree: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one command; returns its seconds by measure, and the checksums of its files."""
    from benchmarks.same_results import environment

    words = ["demo", "--text", "python-docs", "--samples", arguments.samples, "--seq-len", arguments.seq_len]
    words += ["--moment-memory", MOMENT_MEMORY[arguments.chunks], "--device", "cpu", "--dtype", "float32", "--json"]
    with tempfile.TemporaryDirectory(prefix="chunks-") as folder:
        command = [sys.executable, "-m", "ara_cli", "decompose", *map(str, words), "-w", f"{folder}/ws"]
        start, used = time.perf_counter(), os.times()
        done = subprocess.run(
            command, cwd=folder, env=environment(tree, arguments.threads), capture_output=True, text=True
        )
        wall, now = time.perf_counter() - start, os.times()
        if done.returncode:
            sys.exit(f"{tree}: {done.stderr}")
        made = json.loads((Path(folder) / "ws/decompose/two-sided/manifest.json").read_text(encoding="utf-8"))
    processor = now.children_user + now.children_system - used.children_user - used.children_system
    return {"wall": wall, "processor": processor, "stage": made["seconds"], "files": made["files"]}


def _show(rows: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    from benchmarks.same_results import processor

    table = {name: {key: _spread([row[key] for row in found]) for key in MEASURES} for name, found in rows.items()}
    print(
        f"\nchunks: {arguments.chunks}, {arguments.samples} × {arguments.seq_len} tokens of "
        f"python-docs, {arguments.rounds} runs each in turn, {arguments.threads} threads, {processor()}"
    )
    print(f"{'seconds: median (range)':24s}" + "".join(f"{name:>26s}" for name in table) + f"{'before / after':>16s}")
    for key in MEASURES:
        cells = [table[name][key] for name in table]
        shown = "".join(f"{f'{m:.1f} ({low:.1f} – {high:.1f})':>26s}" for m, low, high in cells)
        print(f"{key:24s}{shown}{cells[0][0] / cells[1][0]:>16.2f}")
    same = all(row["files"] == rows["before"][0]["files"] for found in rows.values() for row in found)
    print(f"factors: {'the same bytes' if same else 'DIFFERENT bytes'}")
    if arguments.json:
        settings = {key: getattr(arguments, key) for key in ("chunks", "samples", "seq_len", "rounds", "threads")}
        document = {"processor": processor(), **settings, "seconds": table, "same_bytes": same}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _spread(values: list[float]) -> tuple[float, float, float]:
    """Return median, smallest and largest value."""
    return statistics.median(values), min(values), max(values)


if __name__ == "__main__":
    main()
