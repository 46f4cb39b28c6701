"""Speed of exported models: dense and compressed, in ONNX Runtime and in torch, in turn in one run.

    make bench-inference
    python benchmarks/inference.py --shapes llama-7b --rounds 5

Prefill of several lengths and decoding behind several contexts, each for several batch sizes. All models do one
measurement after the other, in rotating order, round after round; a figure is the median over the rounds, with the
10th and 90th percentile. Beside each ratio to dense stands what the arithmetic predicts: counted multiplications for
prefill, bytes read (weights and caches) for decoding.

Models: SmolLM2-135M (``--shapes demo``), or blocks of LLaMA-7B's shape with random weights (``--shapes llama-7b``), at
uniform ranks: every layer is low-rank, so no layer is spared the second product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ara.allocation.budget import Budget
from ara.allocation.uniform import Uniform
from ara.config import DecomposeConfig, Layout
from ara.models.checkpoint import apply_factors, load, save_checkpoint
from ara.models.quiet import quiet_transformers
from ara.stages.allocate import load_modules
from ara.stages.common import Run, factor_files, model_of
from ara.stages.decompose import decompose
from ara_cli.console import Column, Console
from export.config import ExportConfig
from export.runner import OnnxDecoder
from export.stage import export_folder
from export.weights import Checkpoint

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
LAYOUTS: tuple[Layout, ...] = ("factors", "pivoted")


@dataclass(frozen=True)
class Case:
    """One measurement: ``new`` tokens behind ``past`` ones, for ``batch`` rows."""

    name: str
    batch: int
    past: int
    new: int


@dataclass(frozen=True)
class Contender:
    """One model in one runtime.

    Attributes:
        name: of the row.
        run: does a case once, prepared by its first call.
        macs: multiplications of a case.
        read: bytes read in a case.
    """

    name: str
    run: Callable[[Case], None]
    macs: Callable[[Case], float]
    read: Callable[[Case], float]


class Counted:
    """What a checkpoint computes and reads, from the shapes of its tensors."""

    def __init__(self, folder: Path, bytes_per_weight: float) -> None:
        checkpoint, config = Checkpoint(folder), json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = [name for name in checkpoint.names() if "layers" in name and name.endswith(".weight")]
        self.linear = sum(np.prod(checkpoint.shape(name)) for name in names if len(checkpoint.shape(name)) == 2)
        self.head = config["vocab_size"] * config["hidden_size"]
        self.bytes = bytes_per_weight
        heads, self.layers = config["num_attention_heads"], config["num_hidden_layers"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        self.attention = heads * width
        self.cache = 2 * config["num_key_value_heads"] * width * 4

    def macs(self, case: Case) -> float:
        """Return multiplications: weights and head for every new token, scores and sums for every pair."""
        pairs = case.new * case.past + case.new * (case.new + 1) / 2
        return float(case.batch * (case.new * (self.linear + self.head) + 2 * self.layers * self.attention * pairs))

    def read(self, case: Case) -> float:
        """Return bytes: weights and head once, caches of every row."""
        return float((self.linear + self.head) * self.bytes + case.batch * self.layers * self.cache * case.past)


def dense_folder(arguments: argparse.Namespace, run: Run) -> Path:
    """Return a folder with the dense model, made if need be."""
    folder: Path = arguments.workspace / "dense"
    if (folder / "config.json").exists():
        return folder
    with quiet_transformers():
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


def compressed_folder(arguments: argparse.Namespace, run: Run, dense: Path, keep: float, layout: Layout) -> Path:
    """Return a folder with the model at uniform ranks, made if need be; plain SVD does for a question of speed."""
    folder: Path = arguments.workspace / f"keep-{keep:g}-{layout}"
    if (folder / "config.json").exists():
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


def onnx_contender(name: str, folder: Path, precision: str, arguments: argparse.Namespace, run: Run) -> Contender:
    """Export a checkpoint and return how to run it."""
    output: Path = arguments.workspace / "onnx" / f"{folder.name}-{precision}"
    if not (output / "ara_export.json").exists():
        config = ExportConfig(precision=precision, execution_provider="cpu", parity=False)
        export_folder(config, run, folder, output)
    decoder = OnnxDecoder(output, threads=arguments.threads)
    prepared: dict[Case, tuple[Any, np.ndarray, np.ndarray]] = {}

    def step(case: Case) -> None:
        if case not in prepared:
            ids = np.random.default_rng(0).integers(4, 900, (case.batch, case.new))
            mask = np.ones((case.batch, case.past + case.new), np.int64)
            prepared.clear()  # the caches of the case before
            prepared[case] = decoder.bind(case.batch, mask.shape[1]), ids, mask
        decoder.step(*prepared[case])

    counted = Counted(folder, 1 + 4 / 32 if precision == "int8" else 4)
    return Contender(name, step, counted.macs, counted.read)


def torch_contender(name: str, folder: Path, compiled: bool) -> Contender:
    """Load a checkpoint in torch and return how to run it."""
    from transformers import DynamicCache

    model: Any = load(folder, "cpu", "float32")
    config = model.config
    call = torch.compile(model, dynamic=True) if compiled else model
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    prepared: dict[Case, tuple[torch.Tensor, Any]] = {}

    @torch.inference_mode()
    def step(case: Case) -> None:
        if case not in prepared:
            prepared.clear()
            past = DynamicCache()
            if case.past:
                shape = (case.batch, config.num_key_value_heads, case.past, width)
                for layer in range(config.num_hidden_layers):
                    past.update(torch.zeros(shape), torch.zeros(shape), layer)
            prepared[case] = torch.randint(4, 900, (case.batch, case.new)), past
        ids, past = prepared[case]
        call(ids, past_key_values=past, use_cache=True)
        past.crop(case.past)

    counted = Counted(folder, 4)
    return Contender(name, step, counted.macs, counted.read)


def measure(contenders: list[Contender], case: Case, rounds: int) -> dict[str, list[float]]:
    """Return seconds per contender and round."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(rounds + 1):
        shift = turn % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            begun = time.perf_counter()
            contender.run(case)
            if turn:  # the first round warms up
                seconds[contender.name].append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    """Measure all cases and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=["demo", "llama-7b"], default="demo", help="whose shapes")
    parser.add_argument("--keep", type=float, action="append", help="budget; may be repeated [default: 0.8 and 0.6]")
    parser.add_argument("--prefill", type=int, action="append", help="tokens [default: 128, 512, 2048]")
    parser.add_argument("--decode", type=int, action="append", help="context [default: 512, 2048]")
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
        for layout in LAYOUTS:
            folders[f"keep {keep:g}, {layout}"] = compressed_folder(arguments, run, dense, keep, layout)
    contenders = [onnx_contender(f"ONNX fp32, {name}", path, "fp32", arguments, run) for name, path in folders.items()]
    if arguments.int8:
        contenders += [onnx_contender(f"ONNX int8, {n}", path, "int8", arguments, run) for n, path in folders.items()]
    if arguments.torch:
        contenders += [torch_contender(f"torch, {name}", path, False) for name, path in folders.items()]
    if arguments.compiled:
        contenders += [torch_contender(f"torch.compile, {name}", path, True) for name, path in folders.items()]
    batches = arguments.batch or [1, 4]
    cases = [Case(f"prefill {n}", b, 0, n) for n in arguments.prefill or [128, 512, 2048] for b in batches]
    cases += [Case(f"decode behind {n}", b, n, 1) for n in arguments.decode or [512, 2048] for b in batches]
    for case in cases:
        show(console, case, contenders, measure(contenders, case, arguments.rounds))


def show(console: Console, case: Case, contenders: list[Contender], seconds: dict[str, list[float]]) -> None:
    """Print one case: each contender against the dense one of its runtime."""
    rows = []
    base = contenders[0]
    for contender in contenders:
        runtime, _, model = contender.name.partition(", ")
        if model == "dense":
            base = contender
        ratios = [d / c for d, c in zip(seconds[base.name], seconds[contender.name], strict=True)]
        low, _, high = np.percentile(ratios, [10, 50, 90])
        count = contender.macs if case.new > 1 else contender.read
        predicted = (base.macs if case.new > 1 else base.read)(case) / count(case)
        rows.append(
            (
                runtime,
                model,
                f"{1000 * statistics.median(seconds[contender.name]):.1f}",
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
    console.table(f"{case.name}, batch {case.batch}", columns, rows)


if __name__ == "__main__":
    main()
