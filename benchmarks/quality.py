"""Perplexity on WikiText-2 of SmolLM2-135M, dense and compressed, and an independent check of the dense row.

    ARA_DATA_DIR=... make bench-quality        # or: python benchmarks/quality.py --keep 0.8 --keep 0.6

Calibrated on C4 (256 windows of 512 tokens, seed 0); evaluated on the WikiText-2 test split in windows of 2048 tokens,
as the compression papers do. Uniform ranks and the energy allocator are cut from the same factors and read the same
windows in the same run. The dense perplexity is computed once more, on the first windows, by a few lines that share no
code with ARA's evaluation (:func:`independent_perplexity`); both must agree. Everything is kept in the workspace, so an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from ara.config import AllocateConfig, DecomposeConfig, EvalConfig, TruncateConfig
from ara.pipeline import run_pipeline
from ara.stages.common import Run, model_of
from ara_cli.console import Column, Console

TASK = "wikitext2"


def independent_perplexity(model: Any, tokenizer: Any, rows: list[str], seq_len: int, windows: int) -> float:
    """Compute perplexity as the GPTQ and SVD-LLM scripts describe it, with torch's own cross-entropy."""
    import torch

    ids = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids
    losses = []
    for i in range(windows):
        window = ids[:, i * seq_len : (i + 1) * seq_len]
        with torch.no_grad():
            logits = model(window).logits.to(torch.float64)
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:]).item())
    return math.exp(sum(losses) / len(losses))


def rows_of(data_dir: Path) -> list[str]:
    """Read the rows of the WikiText-2 test split."""
    with (data_dir / "wikitext2_raw" / "test.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def main() -> None:
    """Run, print the table, store it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="model to compress")
    parser.add_argument("--keep", type=float, action="append", help="budget; may be repeated [default: 0.8 and 0.6]")
    parser.add_argument("--samples", type=int, default=256, help="calibration windows of 512 tokens")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per evaluation window")
    parser.add_argument("--windows", type=int, help="evaluate only the first N windows [default: all]")
    parser.add_argument("--check-windows", type=int, default=16, help="windows of the independent computation")
    parser.add_argument("--workspace", type=Path, default=Path("bench-quality"), help="where to work")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if "ARA_DATA_DIR" not in os.environ:
        sys.exit("error: ARA_DATA_DIR is not set\nhint: point it at a folder with wikitext2_raw/ and c4_sample/")

    console = Console()
    run = Run(arguments.workspace, "python benchmarks/quality.py", console)
    decompose = DecomposeConfig(model=arguments.model, text="c4", samples=arguments.samples)
    evaluation = EvalConfig(tasks=(TASK,), seq_len=arguments.seq_len, max_windows=arguments.windows)
    keeps = arguments.keep or [0.8, 0.6]
    budgets = [AllocateConfig(keep=keep, method="energy") for keep in keeps]
    views = run_pipeline(decompose, budgets, TruncateConfig(), evaluation, run)

    found: dict[tuple[float, str], dict[str, Any]] = {}
    for keep, view in zip(keeps, [view for view in views if view.stage == "eval"], strict=True):
        assert view.manifest is not None
        results = view.manifest.results
        for name, figures in results["variants"].items():
            method = name if name in ("dense", "uniform") else "energy"
            task = results["tasks"][TASK]["models"][name]
            key = (1.0, "dense") if method == "dense" else (keep, method)
            wanted = ("perplexity", "nll", "nll_stderr", "windows", "seq_len", "window_nlls", "tokens_per_second")
            found[key] = {**figures, **{k: task[k] for k in wanted}}
    source = model_of(views[0], run)
    assert views[-1].manifest is not None
    import torch

    model = source.load_model(getattr(torch, views[-1].manifest.config["dtype"]))
    dense = found[(1.0, "dense")]["window_nlls"][: arguments.check_windows]
    rows_read = rows_of(Path(os.environ["ARA_DATA_DIR"]))
    check = independent_perplexity(model, source.load_tokenizer(), rows_read, arguments.seq_len, len(dense))
    show(console, found)
    agrees = compare(console, check, math.exp(sum(dense) / len(dense)), len(dense))
    if arguments.json:
        rows = [{"keep": keep, "method": method, **figures} for (keep, method), figures in found.items()]
        document = {"rows": rows, "independent_dense_perplexity": check, "check_windows": len(dense)}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if not agrees:
        sys.exit("error: the dense row disagrees with the independent computation by more than 0.01 %")


def show(console: Console, found: dict[tuple[float, str], dict[str, Any]]) -> None:
    """Print the table."""
    titles = ("perplexity", "NLL (nats/token)", "linear kept", "model kept", "parameters")
    columns = [Column("keep", "left"), Column("allocation", "left"), *(Column(title) for title in titles)]
    rows = [
        (
            f"{keep:g}",
            method,
            f"{row['perplexity']:.2f}",
            f"{row['nll']:.4f} ± {row['nll_stderr'] or float('nan'):.4f}",
            f"{row['linear_keep']:.2%}",
            f"{row['model_keep']:.2%}",
            f"{row['parameters']:,}",
        )
        for (keep, method), row in found.items()
    ]
    dense = found[(1.0, "dense")]
    console.table(f"WikiText-2 test, {dense['windows']} windows of {dense['seq_len']} tokens", columns, rows)


def compare(console: Console, check: float, ours: float, windows: int) -> bool:
    """Print both dense perplexities of the first windows and tell whether they agree to 0.01 %."""
    off = abs(check / ours - 1)
    console.text(
        f"dense, first {windows} windows: {ours:.4f}, computed independently {check:.4f}; relative difference {off:.1e}"
    )
    return off <= 1e-4


if __name__ == "__main__":
    main()
