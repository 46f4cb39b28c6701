"""Memory of an export: a synthetic checkpoint of LLaMA-2-7B's shape, written once, exported in a separate process.

    make bench-export-memory
    python benchmarks/export_memory.py --workspace bench-export --layers 32

Ranks are uniform at keep 0.8, weights are random, float16; checkpoint and export take about 11 GB each. The limit is
three times the largest tensor and 300 MB, whatever the depth.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ara.models.weights import find_linears
from ara_cli.console import Console
from ara_cli.formatting import bytes_text, seconds_text
from benchmarks.random_models import empty_model, uniform_rank, write_model

if TYPE_CHECKING:
    from transformers import LlamaConfig

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 4096, 11008, 32, 32000
KEEP = 0.8
# Memory that an export may use besides three times the largest tensor.
ALLOWANCE = 300 * 10**6


def llama(layers: int) -> LlamaConfig:
    """Return the config of a model of LLaMA-2-7B's widths."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )


def write_checkpoint(folder: Path, layers: int) -> None:
    """Write random factors of every layer."""
    write_model(folder, llama(layers), torch.float16, KEEP)


def main() -> None:
    """Write and export the checkpoint; compare the peak with the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="blocks of the model")
    parser.add_argument("--precision", default="fp16", help="of the export: fp16, fp32 or int8")
    parser.add_argument("--workspace", type=Path, default=Path("bench-export"), help="where to work")
    parser.add_argument("--keep-files", action="store_true", help="leave the checkpoint and the export on the disk")
    arguments = parser.parse_args()
    console = Console()
    source, output = arguments.workspace / f"checkpoint-{arguments.layers}", arguments.workspace / "export"
    if not (source / "config.json").exists():
        console.step(f"Writing a checkpoint of {arguments.layers} blocks")
        shutil.rmtree(source, ignore_errors=True)
        # In a separate process, because Linux includes the memory of a parent in the peak of its children.
        writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(source, arguments.layers))
        writer.start()
        writer.join()
    command = [sys.executable, "-m", "ara_cli", "export", "--onnx", "--precision", arguments.precision, "--no-parity"]
    command += ["--execution-provider", "cpu", "--source", str(source), "--output", str(output), "--overwrite"]
    begun = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begun
    if status:
        sys.exit("error: the export failed (its words are above)")
    peak = usage.ru_maxrss * 1024
    size = sum(path.stat().st_size for path in output.iterdir())
    largest = VOCABULARY * HIDDEN * (2 if arguments.precision == "fp16" else 4)
    limit = 3 * largest + ALLOWANCE
    factors = sum(spec.cost(uniform_rank(spec, KEEP)) for spec in find_linears(empty_model(llama(1))))
    console.text(
        f"{arguments.layers} blocks of {factors / 1e6:.0f}M parameters, {arguments.precision}: {bytes_text(size)} in "
        f"{seconds_text(seconds)}, peak memory {bytes_text(peak)}; largest tensor {bytes_text(largest)}, limit "
        f"{bytes_text(limit)}"
    )
    if not arguments.keep_files:
        shutil.rmtree(arguments.workspace)
    if peak > limit:
        sys.exit("error: the export held more than three times the largest tensor and 300 MB")


if __name__ == "__main__":
    main()
