"""Time of ``ara decompose`` and ``ara train-masks`` in one process and in two, with one thread each.

    python benchmarks/processes.py
    python benchmarks/processes.py --samples 64 --rounds 5 --json FILE

Each command runs in a new workspace, started by torchrun. One and two processes alternate (1 2 1 2 …), so that a change
of the machine's speed affects both. The ratio is taken in every round. *command* is ``ara decompose`` as it was typed,
with the start of torchrun and Python. The others are the seconds that the manifests have: of the stage, of the
sensitivity table, and of the training, which begins and ends with the held-out text.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parent.parent
SIZES = (1, 2)
MEASURES = ("command", "decompose", "table", "training")


def main() -> None:
    """Measure both in turn, print and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--method", default="two-sided")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of --seq-len tokens")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4, help="of the training, of 8 windows each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    sys.path.insert(0, str(_REPOSITORY))
    rows: dict[int, list[dict[str, Any]]] = {size: [] for size in SIZES}
    for _ in range(arguments.rounds):
        for size in SIZES:
            rows[size].append(_run(size, arguments))
            shown = ", ".join(f"{key} {rows[size][-1][key]:.1f} s" for key in MEASURES)
            print(f"{size} process{'es' * (size > 1)}: {shown}", flush=True)
    _show(rows, arguments)


def _run(size: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Run both commands; returns their seconds by measure."""
    where = ["--device", "cpu", "--dtype", "float32"]
    words = [arguments.model, "--text", "python-docs", "--samples", arguments.samples, "--seq-len", arguments.seq_len]
    windows = ["--samples", arguments.samples // 2, "--held-out", 8, "--batch", 8]
    with tempfile.TemporaryDirectory(prefix="processes-") as folder:
        begun = time.perf_counter()
        made = _command(size, folder, "decompose", *words, "--method", arguments.method, *where)
        command = time.perf_counter() - begun
        trained = _command(size, folder, "train-masks", "--keep", "0.8", "--steps", arguments.steps, *windows, *where)
    results = trained["results"]
    return {
        "command": command,
        "decompose": made["seconds"],
        "table": results["table_seconds"],
        "training": results["budgets"]["0.8"]["seconds"],
    }


def _command(size: int, folder: str, *words: Any) -> dict[str, Any]:
    """Run one command and return the manifest of its result."""
    from benchmarks.same_results import environment

    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [*start, "-m", "ara_cli", *map(str, words), "-w", f"{folder}/ws", "--json"]
    done = subprocess.run(command, cwd=folder, env=environment(_REPOSITORY, 1), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    (made,) = Path(folder).glob(f"ws/{words[0]}/*/manifest.json")
    document: dict[str, Any] = json.loads(made.read_text(encoding="utf-8"))
    return document


def _show(rows: dict[int, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    from benchmarks.same_results import processor

    print(
        f"\n{arguments.model}, {arguments.method}, {arguments.samples} × {arguments.seq_len} tokens of python-docs, "
        f"{arguments.rounds} rounds in turn, one thread each, {processor()}"
    )
    print(f"{'median (range)':16s}{'1 process, s':>24s}{'2 processes, s':>24s}{'times as fast':>24s}")
    table = {}
    for key in MEASURES:
        one, two = ([row[key] for row in rows[size]] for size in SIZES)
        table[key] = [_spread(one), _spread(two), _spread([a / b for a, b in zip(one, two, strict=True)])]
        pairs = zip(table[key], (1, 1, 2), strict=True)
        cells = [f"{middle:.{d}f} ({low:.{d}f} – {high:.{d}f})" for (middle, low, high), d in pairs]
        print(f"{key:16s}" + "".join(f"{cell:>24s}" for cell in cells))
    if arguments.json:
        settings = {
            key: getattr(arguments, key) for key in ("model", "method", "samples", "seq_len", "steps", "rounds")
        }
        document = {"processor": processor(), **settings, "seconds": table}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _spread(values: list[float]) -> tuple[float, float, float]:
    """Return median, smallest and largest value."""
    return statistics.median(values), min(values), max(values)


if __name__ == "__main__":
    main()
