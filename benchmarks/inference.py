"""Speed of exported models: dense and compressed, in ONNX Runtime and in torch, in turn in one run.

    make bench-inference
    python benchmarks/inference.py --shapes llama-7b --rounds 5

Prefill of several lengths and decoding at several context lengths, each for several batch sizes. In every round each
model is measured once, in rotating order. A figure is the median over the rounds, with the 10th and 90th percentile.
Each ratio to dense comes with a prediction: counted multiplications for prefill, bytes read (weights and caches) for
decoding.

Models: SmolLM2-135M (``--shapes demo``), or two blocks of LLaMA-7B's shape with random weights and random low-rank
layers (``--shapes llama-7b``), at uniform ranks: every layer is low-rank and needs two products.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ara.allocation.uniform import Uniform
from ara.artifacts.factors import factor_files
from ara.config import DecomposeConfig
from ara.evaluation.cost import Case
from ara.evaluation.speed import Runner, TorchRunner, interleaved_seconds
from ara.layout_names import LAYOUT_NAMES, LayoutName
from ara.layouts import layout_named
from ara.layouts.modeling_ara import replace_linear
from ara.models.checkpoint import load, save_checkpoint
from ara.models.low_rank import apply_factors
from ara.models.silence import silence_transformers
from ara.models.weights import find_linears
from ara.solver.problem import Budget, Module
from ara.stages.common import Run, model_of
from ara.stages.decompose import decompose
from ara.stages.modules import load_modules
from ara_cli.console import Column, Console
from export.config import ExportConfig
from export.onnx.bench_runner import OnnxRunner, count_checkpoint, parameters_of
from export.onnx.export_report import read_report
from export.onnx.stored_weights import Checkpoint
from export.stage import export_folder

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}


def dense_folder(arguments: argparse.Namespace, run: Run) -> Path:
    """Return a folder with the dense model; it is made if it does not exist."""
    folder: Path = arguments.workspace / "dense"
    if (folder / "config.json").exists():
        return folder
    with silence_transformers():
        if arguments.shapes == "demo":
            from ara.models.sources import resolve

            source = resolve("demo")
            source.load_model(torch.float32).save_pretrained(folder)
            source.load_tokenizer().save_pretrained(folder)
            return folder
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(**LLAMA_7B, num_hidden_layers=2, vocab_size=1000, max_position_embeddings=4096)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        from ara.models.sources import resolve

        resolve("demo").load_tokenizer().save_pretrained(folder)
    return folder


def compressed_folder(arguments: argparse.Namespace, run: Run, dense: Path, keep: float, layout: LayoutName) -> Path:
    """Return a folder with the model at uniform ranks; it is made if it does not exist, by plain SVD."""
    folder: Path = arguments.workspace / f"keep-{keep:g}-{layout}"
    if (folder / "config.json").exists():
        return folder
    if arguments.shapes == "llama-7b":
        draw_layers(dense, folder, keep, layout)
        return folder
    view = decompose(DecomposeConfig(model=str(dense), method="plain", device="cpu", dtype="float32"), run)
    modules = load_modules(view, layout)
    specs = [module.spec for module in modules]
    ranks = Uniform().allocate(modules, Budget.for_keep(specs, keep)).low_rank()
    source = model_of(view, run)
    model = source.load_model(torch.float32)
    apply_factors(model, ranks, factor_files(view, specs), layout, run.report)
    save_checkpoint(model, source.load_tokenizer(), folder, ranks=ranks, provenance={}, layout=layout)
    return folder


def draw_layers(dense: Path, folder: Path, keep: float, layout: LayoutName) -> None:
    """Write a random model's checkpoint with random low-rank layers; factoring it would take minutes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    specs = [replace(spec, layout=layout) for spec in find_linears(model)]
    flat = [Module(spec, torch.ones(spec.full_rank, dtype=torch.float64)) for spec in specs]
    ranks = Uniform().allocate(flat, Budget.for_keep(specs, keep)).low_rank()
    for spec in (spec for spec in specs if spec.name in ranks):
        # A new layer has random weights, but its indices are in order, which would be faster than in a real layer.
        layer = layout_named(layout).module(spec.n, spec.m, ranks[spec.name], bias=False)
        for indices in layer.buffers(recurse=False):
            indices.copy_(torch.randperm(len(indices)))
        replace_linear(model, spec.name, layer)
    save_checkpoint(model, AutoTokenizer.from_pretrained(dense), folder, ranks=ranks, provenance={}, layout=layout)


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
    parser.add_argument("--shapes", choices=["demo", "llama-7b"], default="demo", help="whose shapes")
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
    dense = dense_folder(arguments, run)
    folders = {"dense": dense}
    for keep in arguments.keep or [0.8, 0.6]:
        for layout in arguments.layout or LAYOUT_NAMES:
            folders[f"keep {keep:g}, {layout}"] = compressed_folder(arguments, run, dense, keep, layout)
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
