"""Writes ``data/``: checkpoints and a workspace of today's formats, for later versions to read.

    PYTHONPATH=TREE python tests/old_formats/make.py

What is there already is replaced, so this is run once per format, with the code that writes it. The work is done in the
folder ``PLACE``, so that the files hold no path of a particular machine.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, LlamaConfig

DATA = Path(__file__).resolve().parent / "data"
PLACE = Path("/tmp/old-ara")
TOKENS = (1, 40, 77, 130, 200)
# Folder of a checkpoint, below DATA → name of its logits in expected.safetensors.
CHECKPOINTS = {
    "workspace/truncate/energy-0.70/checkpoint": "llama-factors",
    "workspace/truncate/energy-0.70-pivoted/checkpoint": "llama-pivoted",
    "gpt2-factors": "gpt2-factors",
    "gpt2-pivoted": "gpt2-pivoted",
}
_CPU = "--device cpu --dtype float32"
_DECOMPOSE = f"--text file:story.jsonl --samples 8 --seq-len 24 {_CPU}"
_LEARN = f"--samples 4 --held-out 2 {_CPU}"
_EVAL = f"--tasks file:story.jsonl --seq-len 32 --max-windows 4 --max-new-tokens 4 --continuations 1 {_CPU}"
# What is done to the llama in ``workspace``, and to the GPT-2 in a workspace of which only the checkpoints are kept.
COMMANDS = (
    f"decompose model {_DECOMPOSE}",
    f"train-masks --keep 0.8 --steps 2 --batch 2 {_LEARN}",
    f"allocate --keep 0.8 --method ara {_LEARN}",
    f"allocate --keep 0.8 --method sensitivity {_LEARN}",
    f"allocate --keep 0.7 --method energy --layout pivoted {_LEARN}",
    f"allocate --keep 0.7 --method energy {_LEARN}",
    "truncate --allocation energy-0.70-pivoted",
    "truncate --allocation energy-0.70",
    f"eval --checkpoint energy-0.70 {_EVAL}",
    f"bench --checkpoint energy-0.70 --prefill 8 --decode 8 --batch 1 --rounds 6 --threads 1 {_CPU}",
)
_GPT2_COMMANDS = (
    f"decompose gpt2 {_DECOMPOSE}",
    f"allocate --keep 0.6 --method energy {_LEARN}",
    f"allocate --keep 0.6 --method energy --layout pivoted {_LEARN}",
    "truncate --allocation energy-0.60",
    "truncate --allocation energy-0.60-pivoted",
)


def _models(folder: Path) -> None:
    """Save both dense models: biases in the attention of the llama, Conv1D layers in the GPT-2."""
    from tests.tiny import VOCABULARY, random_model, save_with_tokenizer

    ids: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes: dict[str, Any] = {"hidden_size": 18, "intermediate_size": 26, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 3, "num_key_value_heads": 1, "attention_bias": True}
    shared: dict[str, Any] = {"tie_word_embeddings": True, "initializer_range": 0.2}
    llama = LlamaConfig(**ids, **sizes, **heads, **shared, max_position_embeddings=64)
    gpt2 = GPT2Config(**ids, **shared, n_embd=18, n_head=3, n_layer=2, n_inner=26, n_positions=64)
    for name, config in (("model", llama), ("gpt2", gpt2)):
        save_with_tokenizer(folder / name, random_model(config))


def _run(commands: tuple[str, ...], workspace: str) -> None:
    from ara_cli.app import main as ara

    for line in commands:
        sys.argv = ["ara", *line.split(), "-w", workspace, "-q"]
        with suppress(SystemExit), redirect_stdout(io.StringIO()):
            ara()


def main() -> None:
    """Make everything in ``PLACE``, then put it in the place of ``data/``."""
    sys.path.append(str(DATA.parents[2]))
    torch.set_num_threads(1)
    PLACE.mkdir()
    os.chdir(PLACE)
    try:
        _make(PLACE)
        shutil.rmtree(DATA, ignore_errors=True)
        shutil.copytree(PLACE, DATA)
    finally:
        shutil.rmtree(PLACE)


def _make(folder: Path) -> None:
    import ara
    from tests.tiny import tiny_texts

    rows = "".join(json.dumps({"text": text}) + "\n" for text in tiny_texts(60))
    (folder / "story.jsonl").write_text(rows, encoding="utf-8")
    _models(folder)
    _run(COMMANDS, "workspace")
    _run(_GPT2_COMMANDS, "other")
    for name, made in (("gpt2-factors", "energy-0.60"), ("gpt2-pivoted", "energy-0.60-pivoted")):
        (folder / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(folder / "other" / "truncate" / made / "checkpoint" / file, folder / name / file)
    for other in ("other", "gpt2"):
        shutil.rmtree(folder / other)
    (folder / "workspace" / ".lock").unlink()
    ids = torch.tensor([TOKENS])
    with torch.inference_mode():
        logits = {name: ara.load(folder / place, "cpu")(input_ids=ids).logits for place, name in CHECKPOINTS.items()}
    save_file(logits, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
