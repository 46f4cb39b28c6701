"""Loss from rounding weights to 8 and 4 bits: dense, factors and pivoted layers; to nearest, in blocks of 16.

    make bench-quantised
    python benchmarks/quantised.py --source dense=FOLDER --source factors=FOLDER

The weights of linear layers are rounded in torch; embeddings and head are not. The text is the evaluation part of
Python's documentation. Without --source the folders of bench-inference are used (uniform ranks, plain SVD).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ara.data.texts import load_documents
from ara.data.tokens import evaluation_windows
from ara.models.checkpoint import load
from ara.models.likelihood import window_nll
from ara.models.weights import find_blocks
from ara_cli.console import Column, Console
from export.onnx.quantize import rounded

BITS = (8, 4)


def main() -> None:
    """Measure every folder in every precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", action="append", help="NAME=FOLDER of a checkpoint; may be repeated")
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens")
    arguments = parser.parse_args()
    console = Console()
    default = Path("bench-inference-demo")
    given = [source.partition("=")[::2] for source in arguments.source or []]
    sources = {name: Path(folder) for name, folder in given} or {
        path.name: path for path in sorted(default.iterdir()) if (path / "config.json").exists()
    }
    tokenizer = AutoTokenizer.from_pretrained(next(iter(sources.values())), trust_remote_code=False)
    documents = load_documents("python-docs", "evaluation")
    windows = evaluation_windows(documents, tokenizer, seq_len=512, max_windows=arguments.windows).ids
    rows = []
    for name, folder in sources.items():
        console.step(name)
        found = [nll(folder, windows, bits) for bits in (None, *BITS)]
        rows.append((name, f"{found[0]:.4f}", *(f"{loss:.4f} ({loss - found[0]:+.4f})" for loss in found[1:])))
    columns = [Column("checkpoint", "left"), Column("NLL, nats/token"), *(Column(f"{bits} bits") for bits in BITS)]
    console.table(f"{len(windows)} windows of 512 tokens of Python's documentation", columns, rows)


@torch.inference_mode()
def nll(folder: Path, windows: torch.Tensor, bits: int | None) -> float:
    """Return the loss of a checkpoint whose linear layers are rounded to ``bits`` bits."""
    model = load(folder, "cpu", "float32")
    for module in find_blocks(model)[1].modules():
        if isinstance(module, torch.nn.Linear) and bits is not None:
            module.weight.copy_(rounded(module.weight, bits))
    losses = [window_nll(model(input_ids=window[None]).logits, window[None]) for window in windows]
    return float(torch.cat(losses).mean())


if __name__ == "__main__":
    main()
