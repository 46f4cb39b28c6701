"""The models that ``same_results.py`` compresses, and the commands that it runs on them.

A case is one working folder: its commands run one after the other, each with the folder as current directory. All paths
are relative, so that the folder may be anywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.questions import write_questions
from tests.tiny import random_model, save_with_tokenizer, tiny_config, tiny_texts

# Sizes that ONNX Runtime's fused attention accepts: heads are a multiple of 16 wide.
TINY: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 102, "head_dim": 16},  # grouped-query attention: 6 heads, 2 for keys and values
    "gpt2": {},  # Conv1D, biases everywhere, packed q, k and v
    "qwen2": {"hidden_size": 96},  # biases on q, k and v
}
CASES = (*TINY, "demo")
MODEL, TEXT = "model", "file:story.jsonl"
_Line = tuple[str, ...]
_CPU = "--device cpu --dtype float32"
_TUNING = f"--factors two-sided --samples 8 --held-out 4 {_CPU} -w ws --json"


def prepare(case: str, folder: Path) -> None:
    """Put the model, the text and the questions of ``case`` into a new ``folder``."""
    folder.mkdir(parents=True)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in tiny_texts())
    (folder / "story.jsonl").write_text(rows, encoding="utf-8")
    write_questions(folder / "data")
    if case in TINY:
        _save_model(folder / MODEL, case, TINY[case])


def commands(case: str) -> list[list[str]]:
    """Return the arguments of every command of ``case``, without the program's name."""
    lines = {"llama": [*_NAMES, *_FULL, *_EXPORT], "gpt2": _SHORT, "qwen2": [*_SHORT, *_EXPORT], "demo": _DEMO}[case]
    return [" ".join(parts).split() for parts in lines]


def _save_model(folder: Path, family: str, changes: dict[str, Any]) -> None:
    plain = tiny_config(family).to_dict()
    values = {key: value for key, value in plain.items() if key not in ("rope_parameters", "layer_types")}
    save_with_tokenizer(folder, random_model(type(tiny_config(family))(**{**values, **changes})))


def _decompose(options: str) -> _Line:
    return f"decompose {MODEL} --text {TEXT} --samples 16 --seq-len 48 {options}", f"{_CPU} -w ws --json"


def _tune(options: str) -> _Line:
    return options, _TUNING


def _do(options: str) -> _Line:
    return options, "-w ws --json"


def _measure(options: str) -> _Line:
    return options, f"{_CPU} -w ws --json"


_EVAL = f"eval --tasks {TEXT} --seq-len 64 --max-windows 4 --max-new-tokens 8"
_COMPARE = f"compare --keep 0.7 --tasks {TEXT} --eval-seq-len 64 --max-windows 4"
_BENCH = "bench --prefill 16 --decode 16 --batch 1,2 --rounds 6 --threads 1"
_NAMES = [("models --json",), ("methods --json",), _do("status")]

_FULL = [
    _decompose(""),
    _decompose(""),  # is there already
    # Two blocks at a time, then one: only the names of results may depend on that.
    _decompose("--moment-memory 0.0008 --name two-chunks"),
    _decompose("--moment-memory 0.00001 --name one-each"),
    _decompose("-O targets=text -O gradient_share=0.25 --name text-targets --batch-size 3"),
    _decompose("--method whitened"),
    _decompose("--method plain"),
    _decompose("--method asvd --exclude *.down_proj"),
    _tune("train-masks --keep 0.8 --keep 0.6 --steps 3 --batch 4"),
    _tune("train-masks --keep 0.7 --steps 3 --batch 4 --loss ce --start uniform --name ce"),
    _tune("train-masks --keep 0.7 --steps 3 --batch 4 --optimiser adam --atoms 16 --name adam"),
    _tune("train-masks --keep 0.7 --steps 3 --batch 4 --objective paper"),
    _tune("train-masks --keep 0.7 --steps 2 --batch 4 --layout pivoted"),
    _tune("train-masks --keep 0.7 --steps 2 --batch 4 --rank-multiple 4 --exclude *.k_proj --name multiple"),
    _tune("allocate --keep 0.8 --method uniform"),
    _tune("allocate --keep 0.8 --method energy"),
    _tune("allocate --keep 0.8 --method sensitivity"),
    _tune("allocate --keep 0.8 --method sensitivity --no-guard -O targets=text -O sums=window --name sums"),
    _tune("allocate --keep 0.8 --method ara"),
    _tune("allocate --keep 0.7 --method ara --masks ce --name from-ce"),
    _tune("allocate --keep 0.7 --method ara --masks paper-0.70 --name from-paper"),
    _tune("allocate --keep 0.8 --method strs"),
    _tune("allocate --keep 0.8 --method dp-kl"),
    _tune("allocate --keep 0.8 --method gumbel -O steps=4"),
    _tune("allocate --keep 0.8 --method tanh -O steps=4"),
    _tune(
        "allocate --remove 0.4 --method sensitivity --rank-multiple 4 --min-rank 6 --min-keep 0.1 --exclude *.k_proj"
    ),
    _tune("allocate --keep 0.7 --method uniform --layout pivoted"),
    _tune("allocate --keep 0.7 --method energy --layout pivoted"),
    _tune("allocate --keep 0.7 --method sensitivity --layout pivoted"),
    _tune("allocate --keep 0.7 --method ara --layout pivoted"),
    _tune("allocate --keep 0.7 --method dp-kl --layout pivoted"),
    _tune("allocate --keep 0.7 --method strs --layout pivoted"),
    _tune("allocate --keep 0.7 --method tanh --layout pivoted -O steps=4"),
    _do("allocate --ranks ws/allocate/energy-0.80/ranks.json --factors two-sided --name edited"),
    _do("allocate --keep 1.5"),  # refused
    _do("truncate --allocation energy-0.80"),
    _do("truncate --allocation sensitivity-0.80"),
    _do("truncate --allocation sensitivity-0.80 --densify --name dense-again"),
    _do("truncate --allocation sensitivity-0.80 --dtype bfloat16 --max-shard-size 100KB --name half"),
    _do("truncate --allocation sensitivity-0.70-pivoted"),
    _do("truncate --allocation sensitivity-0.70-pivoted --densify --name pivoted-dense"),
    _do("truncate --allocation ara-0.80"),
    _do("truncate --allocation absent"),  # refused
    _measure(f"{_EVAL} --checkpoint sensitivity-0.80"),
    _measure(f"{_EVAL} --checkpoint sensitivity-0.70-pivoted"),
    _measure(f"eval --tasks {TEXT},piqa,arc_easy --limit 8 --checkpoint ara-0.80 --max-windows 2 --max-new-tokens 4"),
    _tune(f"{_COMPARE} --methods uniform,energy,sensitivity,ara"),
    _tune(f"{_COMPARE} --layout pivoted --methods uniform,sensitivity"),
    _measure(f"{_BENCH} --checkpoint sensitivity-0.80"),
    _measure("generate baker --checkpoint sensitivity-0.80 --max-new-tokens 12 --no-chat"),
    _measure("generate baker --checkpoint sensitivity-0.70-pivoted --max-new-tokens 12"),
    _do("report --checkpoint sensitivity-0.80 --output page.html --model-card card.md"),
    _do("report --checkpoint sensitivity-0.70-pivoted"),
    _do("status"),
    (
        f"run {MODEL} --keep 0.9 --keep 0.6 --method sensitivity --text {TEXT} --samples 16 --seq-len 48",
        f"--rank-samples 8 --held-out 4 --tasks {TEXT} --eval-seq-len 64 --max-windows 2 -w pipeline --json",
    ),
    ("status -w pipeline --json",),
]

_SHORT = [
    _decompose(""),
    _decompose("--moment-memory 0.0003 --name chunked"),
    _decompose("--method whitened"),
    _tune("train-masks --keep 0.8 --steps 2 --batch 4"),
    _tune("allocate --keep 0.8 --method uniform"),
    _tune("allocate --keep 0.8 --method sensitivity"),
    _tune("allocate --keep 0.8 --method ara"),
    _tune("allocate --keep 0.8 --method dp-kl"),
    _tune("allocate --keep 0.8 --method gumbel -O steps=2"),
    _tune("allocate --keep 0.7 --method sensitivity --layout pivoted"),
    _do("truncate --allocation sensitivity-0.80"),
    _do("truncate --allocation sensitivity-0.80 --densify --name dense-again"),
    _do("truncate --allocation sensitivity-0.70-pivoted"),
    _measure(f"{_EVAL} --checkpoint sensitivity-0.80"),
    _measure(f"{_EVAL} --checkpoint sensitivity-0.70-pivoted"),
    _measure("generate baker --checkpoint sensitivity-0.80 --max-new-tokens 12"),
    _do("report --checkpoint sensitivity-0.80"),
    _do("export --checkpoint sensitivity-0.80 --execution-provider cpu"),  # refused where the family is unknown
    _do("status"),
]

_PROVIDER = "--execution-provider cpu"
_EXPORT = [
    # Random weights must be cut little: --rewrite refuses factors that are far from the dense weight.
    _do("allocate --keep 0.95 --method uniform --factors two-sided --name plain"),
    _do("truncate --allocation plain"),
    _do(f"export --checkpoint sensitivity-0.80 {_PROVIDER}"),
    _do(f"export --checkpoint sensitivity-0.80 {_PROVIDER} --precision int8"),
    _do(f"export --checkpoint sensitivity-0.80 {_PROVIDER} --merge-shared-inputs --last-logits --name merged"),
    _do(f"export --checkpoint sensitivity-0.70-pivoted {_PROVIDER}"),
    (f"export --source {MODEL} --output dense-graph {_PROVIDER} --json",),
    _do(f"export --checkpoint plain {_PROVIDER} --rewrite dense-graph/model.onnx --name rewritten"),
    _measure(f"{_EVAL} --checkpoint sensitivity-0.80 --backend onnx --export sensitivity-0.80-fp32 --name graph"),
    _do(f"{_BENCH} --checkpoint sensitivity-0.80 --backend onnx --export sensitivity-0.80-fp32 --name graph"),
    _do(
        "generate baker --backend onnx --checkpoint sensitivity-0.80 --export sensitivity-0.80-fp32 --max-new-tokens 12"
    ),
    _do("report --checkpoint sensitivity-0.80"),
    _do("status"),
]

_PYTHON_DOCS = "--text python-docs --samples 16"
_DEMO = [
    (f"decompose demo {_PYTHON_DOCS}", f"{_CPU} -w ws --json"),
    _tune("train-masks --keep 0.8 --steps 2 --batch 4"),
    _tune("allocate --keep 0.8 --method sensitivity"),
    _tune("allocate --keep 0.8 --method ara"),
    _tune("allocate --keep 0.8 --method energy --layout pivoted"),
    _do("truncate --allocation sensitivity-0.80"),
    _do("truncate --allocation energy-0.80-pivoted"),
    _measure("eval --tasks python-docs --checkpoint sensitivity-0.80 --seq-len 512 --max-windows 4 --max-new-tokens 8"),
    _do("status"),
]
