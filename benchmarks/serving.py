"""Speed of compressed models in vLLM: reading prompts and generating, beside what arithmetic predicts.

    make bench-vllm
    .venv-vllm/bin/python benchmarks/serving.py --shapes llama-7b --rounds 7

Every model runs in a process of its own, and all answer the same requests in turn, in rotating order. A round gives two
figures: prefill is the time until all requests have their first token, decode is the mean time of the tokens after
that. Each is compared with the dense model's in the same round: the median over the rounds, with the 10th and 90th
percentile. The prediction counts multiplications for prefill, and bytes (weights and caches) for decode.

Models: SmolLM2-135M, or two blocks of LLaMA-7B's shape with random weights, at uniform ranks: every layer is low-rank
and needs two products. ``--shapes tiny`` tries the benchmark. On a machine with a GPU, where vLLM takes nearly all
memory for one model, the models run one after the other.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ara.config import BenchConfig
from ara.evaluation.cost import Case, Cost, cache_bytes, count_model
from ara.evaluation.runtime import ServiceSize, Timing
from ara.layout_names import LAYOUT_NAMES
from ara.models.checkpoint import load
from ara.models.placement import choose_placement, torch_dtype
from ara.stages.bench_serving import in_turn
from ara.stages.common import Run
from ara_cli.console import Column, Console
from benchmarks.shapes import DEMO, SHAPES, compressed_folder, dense_folder
from export.vllm.runtime import VllmRuntime

BASE = "dense"


def main() -> None:
    """Measure all lengths and numbers of requests, and print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default=DEMO, help="whose shapes")
    parser.add_argument("--keep", type=float, action="append", help="budget; may be repeated [default: 0.8 and 0.6]")
    parser.add_argument("--layout", choices=LAYOUT_NAMES, action="append", help="of low-rank layers [default: all]")
    parser.add_argument("--prompt", type=int, action="append", help="tokens of a prompt [default: 512 and 2048]")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--requests", type=int, action="append", help="requests at once [default: 1 and 8]")
    parser.add_argument("--rounds", type=int, default=7, help="measurements per model and case")
    parser.add_argument("--dtype", default="auto", help="of weights and activations")
    parser.add_argument("--workspace", type=Path, help="where to work [default: bench-vllm-SHAPES]")
    arguments = parser.parse_args()
    workspace: Path = arguments.workspace or Path(f"bench-vllm-{arguments.shapes}")
    console = Console()
    run = Run(workspace / "ws", "python benchmarks/serving.py", console)
    folders = {BASE: dense_folder(workspace, arguments.shapes)}
    for keep in arguments.keep or [0.8, 0.6]:
        for layout in arguments.layout or LAYOUT_NAMES:
            name = f"keep {keep:g}, {layout}"
            folders[name] = compressed_folder(workspace, arguments.shapes, run, folders[BASE], keep, layout)
    runtime = VllmRuntime()
    placement = choose_placement(runtime.device(), arguments.dtype)
    prompts, numbers = arguments.prompt or [512, 2048], arguments.requests or [1, 8]
    configs = [BenchConfig(prompt_tokens=n, new_tokens=arguments.new, rounds=arguments.rounds) for n in prompts]
    cases = [(config, number) for config in configs for number in numbers]
    costs, models = {}, {}
    for name, folder in folders.items():
        model = load(folder, "cpu", placement.dtype)
        costs[name], models[name] = count_model(model, last_logits=True), model.config
        del model
    most = max(numbers) * (max(prompts) + arguments.new)
    size = ServiceSize(
        max(numbers),
        max(prompts) + arguments.new,
        cache_bytes(models[BASE], most, torch_dtype(placement.dtype).itemsize),
    )
    timings: list[dict[str, list[Timing]]] = [{} for _ in cases]
    together = runtime.several_at_once(placement.device)
    for group in [list(folders)] if together else [[name] for name in folders]:
        console.step(f"Loading {', '.join(group)}")
        with ExitStack() as stack:
            services = {
                name: stack.enter_context(runtime.serve(folders[name], placement.dtype, size)) for name in group
            }
            for found, (config, number) in zip(timings, cases, strict=True):
                found |= in_turn(services, number, config, models[BASE].vocab_size, lambda: None)
    order = "in turn" if together else "one after the other"
    for found, (config, number) in zip(timings, cases, strict=True):
        title = f"{number} at once, prompts of {config.prompt_tokens} tokens, {placement.dtype}, {order}"
        show(console, title, config, number, found, costs)


def show(
    console: Console,
    title: str,
    config: BenchConfig,
    number: int,
    timings: Mapping[str, Sequence[Timing]],
    costs: Mapping[str, Cost],
) -> None:
    """Print one case: prefill and decode of each model against the dense one."""
    prefill = {name: [max(one.first_tokens) for one in found] for name, found in timings.items()}
    decode = {
        name: [(one.seconds - max(one.first_tokens)) / (config.new_tokens - 1) for one in found]
        for name, found in timings.items()
    }
    # The caches grow while tokens are generated.
    middle = config.prompt_tokens + config.new_tokens // 2
    rows = []
    for name in timings:
        cells = [name]
        for seconds, case in (
            (prefill, Case(number, 0, config.prompt_tokens)),
            (decode, Case(number, middle, 1)),
        ):
            ratios = [base / own for base, own in zip(seconds[BASE], seconds[name], strict=True)]
            low, high = np.percentile(ratios, [10, 90])
            predicted = costs[name].predicted_ratio(costs[BASE], case)
            median = statistics.median(ratios)
            cells += [
                f"{1000 * statistics.median(seconds[name]):.1f}",
                f"{median:.2f} ({low:.2f} – {high:.2f})",
                f"{predicted:.2f}",
                f"{median / predicted:.2f}",
            ]
        rows.append(cells)
    columns = [Column("model", "left")]
    for what in ("prefill, ms", "decode, ms/token"):
        columns += [Column(what), Column("times as fast as dense"), Column("predicted"), Column("of predicted")]
    console.table(title, columns, rows)


if __name__ == "__main__":
    main()
