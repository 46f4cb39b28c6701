"""Models of ``benchmarks/bytes.py`` in ONNX Runtime: losses against torch, sizes, and speed in one run.

    ARA_DATA_DIR=... make bench-bytes-exported               # after make bench-bytes, in the same folder
    python benchmarks/bytes_exported.py --model twin/joint/33/frozen --model twin/int4/-/frozen

Each checkpoint is exported twice and compared with torch as usual: in fp32, where the inputs of products are exact, and
in int8, where they are rounded to 8 bits. The losses are those of the stored weights in torch, of the fp32 graph and of
the int8 graph, on the same windows of WikiText-2. Then all int8 graphs are timed in turn, round by round; the dense
model stays in float32. Rows are stored as soon as they are measured, and an interrupted run continues.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from ara.allocation.forms import FORMS
from ara.artifacts.checkpoint import CHECKPOINT
from ara.data.texts import load_documents
from ara.data.tokens import evaluation_windows
from ara.evaluation.cost import Case
from ara.evaluation.speed import interleaved_seconds
from ara.evaluation.timing import spread
from ara.models.checkpoint import checkpoint_bytes, load
from ara.models.likelihood import nll_of_windows
from ara.models.scores import Whole
from ara.stages.common import Run
from ara_cli.console import Column, Console
from benchmarks.bytes_rows import FROZEN, Row
from benchmarks.row_file import RowFile
from export.config import ExportConfig
from export.onnx.bench_runner import OnnxRunner, count_checkpoint, parameters_of
from export.onnx.export_report import DATA_FILE, read_report
from export.onnx.runner import OnnxDecoder
from export.onnx.stored_weights import Checkpoint
from export.onnx.torch_like import TorchLike
from export.stage import export_folder

# Losses of the weights in torch, and of the graphs.
TORCH, EXACT, ROUNDED = "torch", "fp32", "int8"
MODELS = (
    "twin/dense/-/frozen",
    "twin/int8/-/frozen",
    "twin/int4/-/frozen",
    "twin/joint/33/frozen",
    "twin/joint/25/frozen",
)
# A perplexity of the exact graph may differ from torch by this share (the goal).
GOAL = 0.005
# What others are compared with.
BASES = ("twin/int8/-/frozen", "twin/int4/-/frozen")
SETTINGS = ("windows", "seq_len", "threads", "rounds", "prefill", "decode")


class Exports:
    """The checkpoints of a run of ``benchmarks/bytes.py``, and their graphs."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self.arguments, self.console = arguments, console
        self.rows = [Row.parsed(key) for key in arguments.model or MODELS]

    def checkpoint(self, row: Row) -> Path:
        """Return the checkpoint of a row.

        Raises:
            SystemExit: it is not there.
        """
        key = f"quantise/{row.rounded(FROZEN)}" if FORMS[row.form].rounds else f"truncate/{row.allocation}"
        folder = self.arguments.workspace / row.model / key / CHECKPOINT
        if row.level != FROZEN or not folder.is_dir():
            sys.exit(f"error: {folder} is not there\nhint: run benchmarks/bytes.py --only '{row.key}' first")
        return Path(folder)

    def graph(self, row: Row, precision: str) -> Path:
        """Return the folder of a graph; it is written and compared with torch if it is not there."""
        output = Path(self.arguments.workspace / "onnx" / f"{row.key.replace('/', '-')}-{precision}")
        if not output.exists():
            config = ExportConfig.model_validate({"precision": precision, "execution_provider": "cpu"})
            run = Run(self.arguments.workspace / "onnx", "python benchmarks/bytes_exported.py", self.console)
            export_folder(config, run, self.checkpoint(row), output)
        return output

    def fastest(self, row: Row) -> Path:
        """Return the graph that is timed."""
        return self.graph(row, ROUNDED if FORMS[row.form].rounds else EXACT)

    @cached_property
    def windows(self) -> torch.Tensor:
        """The first windows of WikiText-2 (w, t) int64."""
        a = self.arguments
        tokenizer = AutoTokenizer.from_pretrained(self.checkpoint(self.rows[0]), trust_remote_code=False)
        documents = load_documents("wikitext2", "evaluation")
        return evaluation_windows(documents, tokenizer, seq_len=a.seq_len, max_windows=a.windows).ids

    @torch.inference_mode()
    def loss(self, row: Row, how: str) -> float:
        """Return the mean loss of a model, nats per token."""
        folder = self.checkpoint(row)
        if how == TORCH:
            model: Any = load(folder, "cpu", "float32")
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = TorchLike(OnnxDecoder(self.graph(row, how)), config).eval()
        label = f"{row.key}, {how}"
        losses = nll_of_windows(
            lambda ids: Whole(model(input_ids=ids).logits), self.windows, torch.device("cpu"), 1, self.console, label
        )
        return float(losses.mean())

    def figures(self, row: Row) -> dict[str, Any]:
        """Return losses and sizes of a row."""
        graph, rounded = self.fastest(row), [ROUNDED] if FORMS[row.form].rounds else []
        about = read_report(graph)
        return {
            "losses": {how: self.loss(row, how) for how in (TORCH, EXACT, *rounded)},
            "checkpoint_bytes": checkpoint_bytes(self.checkpoint(row)),
            "graph_bytes": (graph / DATA_FILE).stat().st_size,
            "exact_products": len(about.fallback.matrices) if about.fallback else 0,
        }

    def seconds(self, case: Case) -> dict[str, list[float]]:
        """Return the seconds of every graph in every round of a case."""
        runners = {}
        for row in self.rows:
            graph, checkpoint = self.fastest(row), Checkpoint(self.checkpoint(row))
            cost = count_checkpoint(checkpoint, read_report(graph))
            runners[row.key] = OnnxRunner(graph, parameters_of(checkpoint), cost, self.arguments.threads)
        return interleaved_seconds(runners, case, self.arguments.rounds)


def show_losses(console: Console, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print losses as perplexities, and sizes."""
    cells = []
    for key, row in rows.items():
        perplexities = {how: math.exp(loss) for how, loss in row["losses"].items()}
        off = perplexities[EXACT] / perplexities[TORCH] - 1
        rounded = f"{perplexities[ROUNDED]:.2f}" if ROUNDED in perplexities else ""
        sizes = (f"{row[name] / 1e6:.1f}" for name in ("checkpoint_bytes", "graph_bytes"))
        shown = f"{off:+.3%}{'' if abs(off) <= GOAL else ' (misses)'}"
        cells.append((key, f"{perplexities[TORCH]:.2f}", shown, rounded, str(row["exact_products"]), *sizes))
    columns = [
        Column("model", "left"),
        Column("torch"),
        Column("fp32 graph"),
        Column("int8 graph"),
        Column("exact products"),
        Column("checkpoint, MB"),
        Column("graph, MB"),
    ]
    console.table("perplexity on WikiText-2, and sizes", columns, cells)


def show_times(console: Console, case: str, seconds: Mapping[str, Sequence[float]]) -> None:
    """Print the times of a case, and how many times as fast each graph is as dense int8 and dense int4."""
    cells = []
    for key, own in seconds.items():
        ratios = []
        for base in BASES:
            if base in seconds:
                found = spread([other / mine for other, mine in zip(seconds[base], own, strict=True)])
                ratios.append(f"{found.median:.2f} ({found.low:.2f} – {found.high:.2f})")
        cells.append((key, f"{1000 * statistics.median(own):.2f}", *ratios))
    bases = [Column(f"times as fast as {Row.parsed(base).form}") for base in BASES if base in seconds]
    console.table(case, [Column("model", "left"), Column("ms"), *bases], cells)


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", help=f"key of a row; may be repeated [default: {', '.join(MODELS)}]"
    )
    parser.add_argument("--windows", type=int, default=8, help="windows of WikiText-2")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window")
    parser.add_argument("--prefill", type=int, default=128, help="tokens of a timed prompt")
    parser.add_argument("--decode", type=int, default=128, help="context of a timed token")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    parser.add_argument("--workspace", type=Path, default=Path("bench-bytes"), help="that of benchmarks/bytes.py")
    parser.add_argument("--results", type=Path, help="file of the rows [default: exported.json in the workspace]")
    arguments = parser.parse_args(words)
    if "ARA_DATA_DIR" not in os.environ:
        sys.exit("error: ARA_DATA_DIR is not set\nhint: point it at a folder with wikitext2_raw/")
    console = Console()
    exports = Exports(arguments, console)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    file = RowFile(arguments.results or arguments.workspace / "exported.json", {"settings": settings})
    for row in exports.rows:
        if row.key not in file.rows:
            console.step(f"Measuring {row.key}")
            file.keep(row.key, exports.figures(row))
    # Times of one run alone can be compared.
    names = [row.key for row in exports.rows]
    cases = {
        f"prefill {arguments.prefill}, {' '.join(names)}": Case(1, 0, arguments.prefill),
        f"decode at {arguments.decode}, {' '.join(names)}": Case(1, arguments.decode, 1),
    }
    for key, case in cases.items():
        if key not in file.rows:
            console.step(f"Timing {key}")
            file.keep(key, {"seconds": exports.seconds(case)})
    show_losses(console, {name: file.rows[name] for name in names})
    for key in cases:
        show_times(console, key.partition(",")[0], file.rows[key]["seconds"])


if __name__ == "__main__":
    main()
