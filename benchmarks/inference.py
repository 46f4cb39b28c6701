"""Speed of exported models: dense and compressed, in ONNX Runtime and in torch, in turn in one run.

    make bench-inference
    python benchmarks/inference.py --shapes llama-7b --rounds 5

Prefill of several lengths and decoding at several context lengths, each for several batch sizes. In every round each
model is measured once, in rotating order. A figure is the median over the rounds, with the 10th and 90th percentile.
Each ratio to dense comes with a prediction: counted multiplications for prefill, bytes read (weights and caches) for
decoding.

Models: SmolLM2-135M (``--shapes demo``), or two blocks of LLaMA-7B's shape with random weights and random low-rank
layers (``--shapes llama-7b``), at uniform ranks: every layer is low-rank and needs two products. ``--shapes tiny``
tries the benchmark.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ara.evaluation.cost import Case
from ara.evaluation.speed import Runner, TorchRunner, interleaved_seconds
from ara.evaluation.timing import Spread, spread
from ara.layout_names import LAYOUT_NAMES
from ara.models.checkpoint import load
from ara.stages.common import Run
from ara_cli.console import Column, Console
from benchmarks.shapes import DEMO, SHAPES, compressed_folder, dense_folder
from export.config import ExportConfig
from export.onnx.bench_runner import OnnxRunner, count_checkpoint, parameters_of
from export.onnx.export_report import Provider, read_report
from export.onnx.stored_weights import Checkpoint
from export.stage import export_folder


@dataclass(frozen=True)
class Row:
    """One model in one case.

    Attributes:
        case: what was measured.
        runtime, model: its names.
        seconds: median per pass.
        ratio: how many times as fast as the dense model of its runtime, over the rounds.
        predicted: that ratio by multiplications (prefill) or bytes (decoding).
    """

    case: Case
    runtime: str
    model: str
    seconds: float
    ratio: Spread
    predicted: float


def onnx_runner(
    folder: Path,
    output: Path,
    precision: str,
    run: Run,
    *,
    provider: Provider = "cpu",
    last_logits: bool = False,
    threads: int | None = None,
) -> Runner:
    """Export a checkpoint, unless it is exported already, and return its runner.

    Args:
        folder: of the checkpoint.
        output: folder of the export.
        precision: of the export.
        run: reporter.
        provider: where it runs.
        last_logits: compute only the logits of the last position.
        threads: CPU threads; ONNX Runtime's choice by default.
    """
    if not (output / "ara_export.json").exists():
        settings = {"precision": precision, "execution_provider": provider, "last_logits": last_logits}
        config = ExportConfig.model_validate({**settings, "parity": False})
        export_folder(config, run, folder, output)
    checkpoint = Checkpoint(folder)
    return OnnxRunner(output, parameters_of(checkpoint), count_checkpoint(checkpoint, read_report(output)), threads)


def torch_runner(
    folder: Path, device: str = "cpu", dtype: str = "float32", *, last_logits: bool = False, compiled: bool = False
) -> Runner:
    """Return the runner of a checkpoint in torch; by default it computes the logits of all positions, as graphs do."""
    model = load(folder, device, dtype)
    call = torch.compile(model, dynamic=True) if compiled else None
    return TorchRunner(model, last_logits=last_logits, call=call)


def compared(case: Case, runners: Mapping[str, Runner], seconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """Compare each model with the dense one of its runtime.

    Args:
        case: that was measured.
        runners: by ``RUNTIME, MODEL``; the dense model of a runtime comes first.
        seconds: of every model in every round.
    """
    rows, base = [], next(iter(runners))
    for name, runner in runners.items():
        runtime, _, model = name.partition(", ")
        if model == "dense":
            base = name
        ratios = [dense / own for dense, own in zip(seconds[base], seconds[name], strict=True)]
        predicted = runner.cost.predicted_ratio(runners[base].cost, case)
        rows.append(Row(case, runtime, model, statistics.median(seconds[name]), spread(ratios), predicted))
    return rows


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print the models of one case."""
    case = rows[0].case
    cells = [
        (
            row.runtime,
            row.model,
            f"{1000 * row.seconds:.2f}",
            f"{row.ratio.median:.2f} ({row.ratio.low:.2f} – {row.ratio.high:.2f})",
            f"{row.predicted:.2f}",
            f"{row.ratio.median / row.predicted - 1:+.0%}",
        )
        for row in rows
    ]
    columns = [
        Column("runtime", "left"),
        Column("model", "left"),
        Column("ms"),
        Column("times as fast as dense"),
        Column("predicted"),
        Column("off"),
    ]
    what = f"decode at {case.past}" if case.past else f"prefill {case.new}"
    console.table(f"{what}, batch {case.batch}", columns, cells)


def main() -> None:
    """Measure all cases and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default=DEMO, help="whose shapes")
    parser.add_argument("--keep", type=float, action="append", help="budget; may be repeated [default: 0.8 and 0.6]")
    parser.add_argument("--layout", choices=LAYOUT_NAMES, action="append", help="of low-rank layers [default: all]")
    parser.add_argument("--prefill", type=int, action="append", help="tokens [default: 128, 512, 2048]; 0: none")
    parser.add_argument("--decode", type=int, action="append", help="context [default: 512, 2048]; 0: none")
    parser.add_argument("--batch", type=int, action="append", help="rows [default: 1 and 4]")
    parser.add_argument("--rounds", type=int, default=9, help="measurements per model and case")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime and torch")
    parser.add_argument("--int8", action="store_true", help="also int8")
    parser.add_argument("--torch", action="store_true", help="also torch, eager")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile (needs a C++ compiler; minutes)")
    parser.add_argument("--workspace", type=Path, help="where to work [default: bench-inference-SHAPES]")
    arguments = parser.parse_args()
    arguments.workspace = arguments.workspace or Path(f"bench-inference-{arguments.shapes}")
    console = Console()
    run = Run(arguments.workspace / "ws", "python benchmarks/inference.py", console)
    torch.set_num_threads(arguments.threads)
    dense = dense_folder(arguments.workspace, arguments.shapes)
    folders = {"dense": dense}
    for keep in arguments.keep or [0.8, 0.6]:
        for layout in arguments.layout or LAYOUT_NAMES:
            folders[f"keep {keep:g}, {layout}"] = compressed_folder(
                arguments.workspace, arguments.shapes, run, dense, keep, layout
            )
    runners: dict[str, Runner] = {}
    for precision in ["fp32", *(["int8"] if arguments.int8 else [])]:
        for name, path in folders.items():
            output = arguments.workspace / "onnx" / f"{path.name}-{precision}"
            runners[f"ONNX {precision}, {name}"] = onnx_runner(path, output, precision, run, threads=arguments.threads)
    if arguments.torch:
        runners |= {f"torch, {name}": torch_runner(path) for name, path in folders.items()}
    if arguments.compiled:
        runners |= {f"torch.compile, {name}": torch_runner(path, compiled=True) for name, path in folders.items()}
    batches = arguments.batch or [1, 4]
    cases = [Case(b, 0, n) for n in arguments.prefill or [128, 512, 2048] for b in batches if n]
    cases += [Case(b, n, 1) for n in arguments.decode or [512, 2048] for b in batches if n]
    for case in cases:
        show(console, compared(case, runners, interleaved_seconds(runners, case, arguments.rounds)))


if __name__ == "__main__":
    main()
