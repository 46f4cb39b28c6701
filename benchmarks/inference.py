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
from pathlib import Path

import numpy as np
import torch

from ara.evaluation.cost import Case
from ara.evaluation.speed import Runner, TorchRunner, interleaved_seconds
from ara.layout_names import LAYOUT_NAMES
from ara.models.checkpoint import load
from ara.stages.common import Run
from ara_cli.console import Column, Console
from benchmarks.shapes import DEMO, SHAPES, compressed_folder, dense_folder
from export.config import ExportConfig
from export.onnx.bench_runner import OnnxRunner, count_checkpoint, parameters_of
from export.onnx.export_report import read_report
from export.onnx.stored_weights import Checkpoint
from export.stage import export_folder


def onnx_runner(folder: Path, precision: str, arguments: argparse.Namespace, run: Run) -> Runner:
    """Export a checkpoint and return its runner."""
    output: Path = arguments.workspace / "onnx" / f"{folder.name}-{precision}"
    if not (output / "ara_export.json").exists():
        config = ExportConfig(precision=precision, execution_provider="cpu", parity=False)
        export_folder(config, run, folder, output)
    checkpoint = Checkpoint(folder)
    cost = count_checkpoint(checkpoint, read_report(output))
    return OnnxRunner(output, parameters_of(checkpoint), cost, arguments.threads)


def torch_runner(folder: Path, compiled: bool) -> Runner:
    """Return the runner of a checkpoint in torch; like the graphs it computes the logits of all positions."""
    model = load(folder, "cpu", "float32")
    call = torch.compile(model, dynamic=True) if compiled else None
    return TorchRunner(model, last_logits=False, call=call)


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
    runners = {f"ONNX fp32, {name}": onnx_runner(path, "fp32", arguments, run) for name, path in folders.items()}
    if arguments.int8:
        runners |= {f"ONNX int8, {name}": onnx_runner(path, "int8", arguments, run) for name, path in folders.items()}
    if arguments.torch:
        runners |= {f"torch, {name}": torch_runner(path, False) for name, path in folders.items()}
    if arguments.compiled:
        runners |= {f"torch.compile, {name}": torch_runner(path, True) for name, path in folders.items()}
    batches = arguments.batch or [1, 4]
    cases = [Case(b, 0, n) for n in arguments.prefill or [128, 512, 2048] for b in batches if n]
    cases += [Case(b, n, 1) for n in arguments.decode or [512, 2048] for b in batches if n]
    for case in cases:
        show(console, case, runners, interleaved_seconds(runners, case, arguments.rounds))


def show(console: Console, case: Case, runners: dict[str, Runner], seconds: dict[str, list[float]]) -> None:
    """Print one case: each model against the dense one of its runtime."""
    rows = []
    base = next(iter(runners))
    for name, runner in runners.items():
        runtime, _, model = name.partition(", ")
        if model == "dense":
            base = name
        ratios = [d / c for d, c in zip(seconds[base], seconds[name], strict=True)]
        low, _, high = np.percentile(ratios, [10, 50, 90])
        predicted = runner.cost.predicted_ratio(runners[base].cost, case)
        rows.append(
            (
                runtime,
                model,
                f"{1000 * statistics.median(seconds[name]):.1f}",
                f"{statistics.median(ratios):.2f} ({low:.2f} – {high:.2f})",
                f"{predicted:.2f}",
                f"{statistics.median(ratios) / predicted - 1:+.0%}",
            )
        )
    columns = [
        Column("runtime", "left"),
        Column("model", "left"),
        Column("ms"),
        Column("times as fast as dense"),
        Column("predicted"),
        Column("off"),
    ]
    what = f"decode at {case.past}" if case.past else f"prefill {case.new}"
    console.table(f"{what}, batch {case.batch}", columns, rows)


if __name__ == "__main__":
    main()
