"""Memory of a model with a large vocabulary: the peak of the stages that read logits.

    python benchmarks/vocabulary.py                  # 262,144 tokens, as many as Gemma 3 has

The model has LLaMA's architecture, random bfloat16 weights and a tied head; nearly all of its parameters are the
embedding. Every stage is a process of its own, and its peak is that of memory which cannot be dropped (RssAnon).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from ara.models.sources import resolve
from ara_cli.console import Column, Console
from ara_cli.formatting import bytes_text, seconds_text
from benchmarks.memory import llama, run_stage
from benchmarks.random_models import write_model


def main() -> None:
    """Run decompose and eval, and what lies between them, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=262_144, help="tokens")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model, a multiple of 256")
    parser.add_argument("--layers", type=int, default=4, help="blocks")
    parser.add_argument("--batch-size", type=int, default=4, help="windows per pass")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window")
    parser.add_argument("--workspace", type=Path, default=Path("bench-vocabulary"), help="where to work")
    arguments = parser.parse_args()
    console, folder = Console(), arguments.workspace / "model"
    shutil.rmtree(arguments.workspace, ignore_errors=True)
    size = write_model(folder, llama(arguments.hidden, arguments.layers, arguments.vocabulary), torch.bfloat16)
    # SmolLM2's, for the text: it has fewer tokens than the model.
    resolve("demo").load_tokenizer().save_pretrained(folder)
    batch = ["--batch-size", str(arguments.batch_size)]
    windows = ["--samples", str(2 * arguments.batch_size)]
    placed = ["--device", "cpu", "--dtype", "float32"]
    text = ["--text", "python-docs", *windows, "--seq-len", str(arguments.seq_len)]
    tasks = ["--tasks", "python-docs", "--max-windows", "4", "--seq-len", str(arguments.seq_len)]
    stages = {
        "decompose": [str(folder), *placed, *text, *batch],
        "allocate": ["--keep", "0.8", "--method", "uniform"],
        "truncate": [],
        "eval": [*tasks, *placed, *batch],
    }
    rows = []
    for name, options in stages.items():
        seconds, peak, _ = run_stage([name, *options, "-w", str(arguments.workspace / "ws")], None)
        rows.append([name, "killed" if peak is None else bytes_text(peak), seconds_text(seconds)])
    shutil.rmtree(arguments.workspace)
    title = f"{bytes_text(size)} of weights, batches of {arguments.batch_size} × {arguments.seq_len} tokens"
    console.table(title, [Column("stage", "left"), Column("peak"), Column("time")], rows)


if __name__ == "__main__":
    main()
