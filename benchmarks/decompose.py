"""Whitened decomposition: ARA compared with the textbook route, on the same matrices in one run.

    make bench-decompose            # or: python benchmarks/decompose.py --blocks 2

Textbook route (SVD-LLM, arXiv 2403.07378): Cholesky of the second moment G = L Lᵀ, full ``torch.linalg.svd`` of W L,
triangular solve for the right factor; all in float64. ARA: eigenvectors of W G Wᵀ in float64
(``ara/decomposition/subspace.py``), several layers side by side with one thread each (``parallel.py``). Measured are:

- per matrix: both routes in turn with all threads, and the difference of the truncated weights at keep 0.8 and 0.6;
- per block of seven matrices: the textbook route one matrix after the other, ARA as ``ara decompose`` runs it, and for
  fairness the textbook route in ARA's thread pool; in turn, medians over several rounds;
- memory: the peak of a process that runs one route alone, one matrix at a time.

``--busy N`` starts N processes that each keep a core busy, as on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ara.calibration.moments import collect_moments, shared_inputs
from ara.data.texts import load_documents
from ara.data.tokens import calibration_windows
from ara.decomposition.base import Factors
from ara.decomposition.parallel import map_layers
from ara.decomposition.subspace import weighted_factors
from ara.models.blocks import BlockRunner
from ara.models.placement import choose_placement, torch_dtype
from ara.models.sources import resolve
from ara.models.weights import LinearSpec, find_linears


def textbook(weight: torch.Tensor, gram: torch.Tensor) -> Factors:
    """Factor W (m, n) with G (n, n) by Cholesky, SVD and triangular solve; float64."""
    lower = torch.linalg.cholesky(gram)
    u, s, vh = torch.linalg.svd(weight @ lower, full_matrices=False)
    right = torch.linalg.solve_triangular(lower, s[:, None] * vh, upper=False, left=False)
    return Factors(a=right, b=u, spectrum=s**2)


ROUTES: dict[str, Callable[[torch.Tensor, torch.Tensor], Factors]] = {
    "ours": weighted_factors,
    "textbook": textbook,
}


def matrices(blocks: int, samples: int) -> dict[str, torch.Tensor]:
    """Collect weights and second moments of evenly spaced blocks of SmolLM2-135M, float64."""
    source = resolve("demo")
    model = source.load_model(torch_dtype(choose_placement().dtype))
    linears = find_linears(model)
    depth = linears[-1].layer + 1
    chosen = {round((i + 0.5) * depth / blocks) for i in range(blocks)}
    linears = [spec for spec in linears if spec.layer in chosen]
    documents = load_documents("python-docs", "calibration")
    windows = calibration_windows(documents, source.load_tokenizer(), samples=samples, seq_len=512, seed=0)
    owners = shared_inputs(model, linears, windows.ids[:1])
    stats = collect_moments(BlockRunner(model, windows.ids, 4), linears, owners)
    found = {}
    for spec in linears:
        found[f"{spec.name}.weight"] = spec.weight.read(model).double().contiguous()
        found[f"{spec.name}.gram"] = stats[owners[spec.name]].second_moment.double().clone()
    return found


def synthetic(shapes: list[str]) -> dict[str, torch.Tensor]:
    """Make random weights of the given shapes, with second moments of correlated inputs of falling size; float64."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for shape in shapes:
        m, n = (int(size) for size in shape.split("x"))
        inputs = torch.randn(2 * n, n, dtype=torch.float64, generator=generator)
        inputs *= torch.logspace(0, -2, n, dtype=torch.float64)
        found[f"random.0.{shape}.weight"] = torch.randn(m, n, dtype=torch.float64, generator=generator) / n**0.5
        found[f"random.0.{shape}.gram"] = inputs.T @ inputs / (2 * n)
    return found


def whitened_error(difference: torch.Tensor, gram: torch.Tensor) -> float:
    """Return ‖D G^{1/2}‖_F of D (m, n)."""
    return float(((difference @ gram) * difference).sum().clamp_min(0).sqrt())


def compare(tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Run both routes on every matrix, in alternating order."""
    rows = []
    names = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    for number, name in enumerate(names):
        weight, gram = tensors[f"{name}.weight"], tensors[f"{name}.gram"]
        seconds: dict[str, float] = {}
        factors: dict[str, Factors] = {}
        for route in list(ROUTES)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            factors[route] = ROUTES[route](weight, gram)
            seconds[route] = time.perf_counter() - start
        m, n = weight.shape
        norm = whitened_error(weight, gram)
        worst = 0.0
        for keep in (0.8, 0.6):
            k = int(keep * m * n / (m + n))
            ours, theirs = (factors[route].b[:, :k] @ factors[route].a[:k] for route in ("ours", "textbook"))
            worst = max(worst, whitened_error(ours - theirs, gram) / norm)
        ratio = seconds["textbook"] / seconds["ours"]
        rows.append({"name": name, "shape": [m, n], **seconds, "ratio": ratio, "difference": worst})
        print(
            f"{name:40s} {m:5d} x {n:5d}  textbook {seconds['textbook']:7.3f} s  ours {seconds['ours']:7.3f} s  "
            f"{ratio:5.1f}x  relative difference {worst:.1e}",
            flush=True,
        )
    return rows


def blocks_in_turn(tensors: dict[str, torch.Tensor], rounds: int) -> dict[str, list[float]]:
    """Time whole blocks in three ways in turn; returns seconds per block and round."""
    blocks: dict[str, list[tuple[LinearSpec, torch.Tensor]]] = {}
    for name in (key.removesuffix(".weight") for key in tensors if key.endswith(".weight")):
        m, n = tensors[f"{name}.weight"].shape
        blocks.setdefault(name.split(".")[2], []).append((LinearSpec(name, 0, "", m, n), tensors[f"{name}.gram"]))

    def work(route: str, spec: LinearSpec, gram: torch.Tensor) -> Factors:
        return ROUTES[route](tensors[f"{spec.name}.weight"], gram)

    ways: dict[str, Callable[[list[tuple[LinearSpec, torch.Tensor]]], object]] = {
        "textbook": lambda layers: [work("textbook", *layer) for layer in layers],
        "textbook in our pool": lambda layers: list(map_layers(partial(work, "textbook"), layers, "cpu")),
        "ours": lambda layers: list(map_layers(partial(work, "ours"), layers, "cpu")),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for layers in blocks.values():
            turn = number % len(ways)
            for way in [*ways][turn:] + [*ways][:turn]:
                start = time.perf_counter()
                ways[way](layers)
                seconds[way].append(time.perf_counter() - start)
    return seconds


def memory(route: str, file: Path) -> int:
    """Return by how many bytes ``route`` over all matrices raises the peak memory of a separate process (Linux)."""
    command = [sys.executable, __file__, "--measure-memory", route, "--matrices", str(file)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_memory(route: str, file: Path) -> int:
    """Child process: print the peak memory of one route over all matrices, above the memory used before."""
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    for warm_up in (False, True):
        # 5 resets the peak (VmHWM) to the present resident memory.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        for key in list(tensors)[:2] if not warm_up else tensors:
            if key.endswith(".weight"):
                ROUTES[route](tensors[key], tensors[key.removesuffix("weight") + "gram"])
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def main() -> None:
    """Print a table and, with ``--json FILE``, store it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3, help="decoder blocks to take (7 matrices each)")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 512 tokens")
    parser.add_argument("--shape", action="append", help="only compare random matrices, MxN; may be repeated")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the comparison per block")
    parser.add_argument("--busy", type=int, default=0, help="processes that keep a core busy meanwhile")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure-memory", choices=list(ROUTES), help=argparse.SUPPRESS)
    parser.add_argument("--matrices", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_memory:
        print(measure_memory(arguments.measure_memory, arguments.matrices))
        return
    tensors = synthetic(arguments.shape) if arguments.shape else matrices(arguments.blocks, arguments.samples)
    # Both routes run once on a small matrix, so that neither timing includes loading libraries.
    for route in ROUTES.values():
        route(torch.randn(60, 50, dtype=torch.float64), torch.eye(50, dtype=torch.float64))
    rows = compare(tensors)
    if arguments.shape:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "matrices.safetensors"
        save_file(tensors, file)
        peaks = {route: memory(route, file) for route in ROUTES}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.busy)]
    try:
        seconds = blocks_in_turn(tensors, arguments.rounds)
    finally:
        for process in busy:
            process.kill()
    ratios = sorted(row["ratio"] for row in rows)
    block_ratios = sorted(a / b for a, b in zip(seconds["textbook"], seconds["ours"], strict=True))
    summary = {
        "matrices": len(rows),
        "threads": torch.get_num_threads(),
        "busy_processes": arguments.busy,
        "torch": torch.__version__,
        "matrix_ratio_median": statistics.median(ratios),
        "matrix_ratio_range": [ratios[0], ratios[-1]],
        "block_seconds_median": {way: statistics.median(values) for way, values in seconds.items()},
        "block_ratio_median": statistics.median(block_ratios),
        "block_ratio_range": [block_ratios[0], block_ratios[-1]],
        "worst_relative_difference": max(row["difference"] for row in rows),
        "peak_memory_bytes": peaks,
    }
    print(
        f"per matrix, {summary['threads']} threads: ours {summary['matrix_ratio_median']:.1f}x faster in the median "
        f"({ratios[0]:.1f}x to {ratios[-1]:.1f}x)\n"
        f"per block of 7, {arguments.rounds} rounds, {arguments.busy} busy processes beside: "
        + ", ".join(f"{way} {value:.2f} s" for way, value in summary["block_seconds_median"].items())
        + f"; ours {summary['block_ratio_median']:.1f}x faster ({block_ratios[0]:.1f}x to {block_ratios[-1]:.1f}x)\n"
        f"worst relative difference of the truncated weights in the whitened norm: "
        f"{summary['worst_relative_difference']:.1e}\n"
        f"memory on top of the matrices, one at a time: textbook {peaks['textbook'] / 2**20:.0f} MiB, "
        f"ours {peaks['ours'] / 2**20:.0f} MiB"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
