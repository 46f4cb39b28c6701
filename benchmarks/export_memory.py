"""Memory of an export: a synthetic checkpoint of LLaMA-2-7B's shape, written once, exported in a separate process.

    make bench-export-memory
    python benchmarks/export_memory.py --workspace bench-export --layers 32

Ranks are uniform at keep 0.8, weights are random, float16; checkpoint and export take about 11 GB each. The limit is
three times the largest tensor and 300 MB, whatever the depth.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from ara.layouts.modeling_ara import LAYERS, AraConfig
from ara.models.weights import LinearSpec
from ara_cli.console import Console
from ara_cli.formatting import bytes_text, seconds_text

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY = 4096, 11008, 32, 32000
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
KEEP = 0.8
# Memory that an export may use besides three times the largest tensor.
ALLOWANCE = 300 * 10**6


def write_checkpoint(folder: Path, layers: int) -> None:
    """Write random factors of every layer, a shard per block."""
    from transformers import LlamaConfig

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.rand(*shape, generator=generator) - 0.01).half()

    folder.mkdir(parents=True)
    ranks: dict[str, int] = {}
    weights: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weights.update(dict.fromkeys(tensors, name))

    ends = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "lm_head.weight": random(VOCABULARY, HIDDEN)}
    shard("model-ends.safetensors", {**ends, "model.norm.weight": torch.ones(HIDDEN).half()})
    for layer in range(layers):
        block = f"model.layers.{layer}"
        tensors = {f"{block}.{n}_layernorm.weight": torch.ones(HIDDEN).half() for n in ("input", "post_attention")}
        for kind, (m, n) in SHAPES.items():
            rank = int(KEEP * m * n / (m + n))
            ranks[f"{block}.{kind}"] = rank
            tensors |= {f"{block}.{kind}.A.weight": random(rank, n), f"{block}.{kind}.B.weight": random(m, rank)}
        shard(f"model-{layer:03d}.safetensors", tensors)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        dtype="float16",
    ).to_dict()
    config["quantization_config"] = AraConfig(ranks, LAYERS["factors"].since).to_dict()
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


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
    factors = sum(LinearSpec("", 0, "", m, n).cost(int(KEEP * m * n / (m + n))) for m, n in SHAPES.values())
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
