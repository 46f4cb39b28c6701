"""Manifests of a whole workspace, made up: all kinds of results, with names and texts that want to be markup."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ara.models.weights import LinearSpec
from ara.reporting.gather import Made, Sources
from ara.solver.problem import Allocation, Module
from ara.workspace.manifest import FORMAT_VERSION, Manifest

MODEL = {
    "requested": "work/llama",
    "kind": "folder",
    "location": "/home/me/work/llama",
    "revision": None,
    "fingerprint": "f" * 64,
    "architecture": "LlamaForCausalLM",
}
EVIL = "<script>alert(1)</script> & <b>bold</b>"
NAME = "ara-0.80"
SHAPES = {
    "self_attn.q_proj": (84, 60),
    "self_attn.k_proj": (28, 60),
    "mlp.up_proj": (92, 60),
    "mlp.down_proj": (60, 92),
}
SPECS = [
    LinearSpec(f"model.layers.{layer}.{kind}", layer, kind, m, n)
    for layer in range(5)
    for kind, (m, n) in SHAPES.items()
]
KEEPS = {"dense": 1.0, "uniform": 0.79, NAME: 0.8}
WINDOWS = 8


def manifest(stage: str, name: str, results: Mapping[str, Any], **changes: Any) -> Manifest:
    """Return a manifest; ``changes`` go over what all have in common."""
    values: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "stage": stage,
        "name": name,
        "id": hashlib.sha256(f"{stage}/{name}".encode()).hexdigest(),
        "created": "2026-01-02T03:04:05+00:00",
        "command": f"ara {stage} -w /home/me/ws --name {name}",
        "config": {},
        "model": MODEL,
        "versions": {"ara": "0.1.0", "torch": "2.13.0"},
        "seconds": 12.5,
        "peak_memory_bytes": 123 << 20,
        "files": {},
        "results": dict(results),
    }
    return Manifest(**{**values, **changes})


def modules() -> list[Module]:
    """Return layers whose spectra fall at different rates; one is zero behind its 40th component."""
    found = []
    for number, spec in enumerate(SPECS):
        spectrum = torch.arange(1, spec.full_rank + 1, dtype=torch.float64) ** -(1 + number / 10)
        if number == 2:
            spectrum[40:] = 0
        found.append(Module(spec, spectrum))
    return found


def ranks() -> Allocation:
    """Return ranks with dense layers among them."""
    return Allocation.of_ranks(SPECS, {spec.name: None if i % 4 == 1 else 5 + i for i, spec in enumerate(SPECS)})


def decomposition() -> Manifest:
    config = {"method": "two-sided", "text": "c4", "dtype": "bfloat16", "device": "cpu"}
    config |= {"samples": 256, "seq_len": 512, "seed": 0}
    layers = [{"name": s.name, "layer": s.layer, "kind": s.kind, "m": s.m, "n": s.n} for s in SPECS]
    results = {"modules": layers, "model_parameters": 123_457, "linear_parameters": 100_000}
    results |= {"windows": [256, 512], "text": "file /home/me/data/c4_rp1.jsonl"}
    return manifest("decompose", "two-sided", results, config=config, seed=0)


def allocation(name: str = NAME, method: str = "ara", keep: float = 0.8, **config: Any) -> Manifest:
    low = {"layers": 5, "rank_min": 5, "rank_mean": 9.5, "rank_max": 21, "keep": keep}
    kinds = {kind: {**low, "shape": list(shape), "dense": 1} for kind, shape in SHAPES.items()}
    dense = {**low, "shape": [9, 11], "dense": 5, "rank_min": None, "rank_mean": None, "rank_max": None, "keep": 1.0}
    results = {
        "linear_parameters_dense": 100_000,
        "linear_parameters": int(100_000 * keep),
        "linear_keep": keep,
        "model_parameters_dense": 123_457,
        "model_parameters": 23_457 + int(100_000 * keep),
        "model_keep": (23_457 + int(100_000 * keep)) / 123_457,
        "dense_layers": 5,
        "kinds": {**kinds, "all.dense": dense},
        "guard": {
            "winner": "ara",
            "held_out": {"dense": 3.1, "ara": 3.21, "uniform": 3.5},
            "stderr": {"ara": 0.0, "uniform": 0.02},
        },
    }
    settings = {"method": method, "keep": keep, "rank_multiple": 1, "min_rank": 1, "min_keep": 0.0, "exclude": []}
    return manifest("allocate", name, results, config={**settings, **config})


def truncated(name: str = NAME, **results: Any) -> Manifest:
    figures = {
        "linear_keep": 0.8,
        "model_keep": 0.84,
        "parameters": 103_457,
        "weight_bytes": 200 << 20,
        "low_rank_layers": 15,
        "dense_layers": 5,
        "dense_weight_bytes": 250 << 20,
        "disk_bytes": 200 << 20,
        "densified": False,
        **results,
    }
    return manifest("truncate", name, figures, config={"dtype": "bfloat16"})


def text_rows(chosen: str, level: float = 3.4, divergence: bool = True) -> dict[str, dict[str, Any]]:
    """Return rows of one text as ``ara eval`` writes them; the chosen model is better than uniform ranks."""
    rows = {}
    for number, (name, mean) in enumerate({"dense": 3.0, "uniform": 3.8, chosen: level}.items()):
        windows = [mean + 0.1 * math.sin(i) + 0.001 * number * (i % 3) for i in range(WINDOWS)]
        nll = sum(windows) / WINDOWS
        rows[name] = {
            "nll": nll,
            "perplexity": math.exp(nll),
            "windows": WINDOWS,
            "tokens": WINDOWS * 2047,
            "seq_len": 2048,
            "nll_stderr": 0.025,
            "window_nlls": windows,
            "tokens_per_second": {"median": 700.0 + 10 * number, "low": 650.0, "high": 740.0 + number},
        }
        distance = {"kl": 0.11 * number, "kl_stderr": 0.01, "agreement": 1 - 0.2 * number}
        rows[name]["divergence"] = distance if divergence and name != "dense" else None
    return rows


def evaluation(chosen: str = NAME, keep: float = 0.8, level: float = 3.4) -> Manifest:
    """Return an evaluation with all that one can have."""
    keeps = {"dense": 1.0, "uniform": keep - 0.001, chosen: keep}
    values = {"dense": 0.61, "uniform": 0.48, chosen: 0.57}
    harness = {
        name: {"value": v, "stderr": 0.02, "retained": v / 0.61, "metrics": {}, "stderrs": {}}
        for name, v in values.items()
    }
    against = {
        "dense": {"difference": -0.04, "p": 0.012, "test": "McNemar"},
        "uniform": {"difference": 0.09, "p": 1e-4, "test": "McNemar"},
    }
    task = {"kind": "harness", "text": "piqa.jsonl", "metric": "acc", "examples": 400, "of": 2376, "seed": 0}
    text = {"kind": "text", "text": "file /home/me/data/test.jsonl", "windows": WINDOWS, "seq_len": 2048}
    chat = {"kind": "chat", "text": "file /home/me/secret/said.jsonl", "conversations": 24, "of": 252, "seed": 0}
    chat |= {"too_long": 2, "seq_len": 2048, "dense_answers": 3, "answer_tokens": 1234, "max_new_tokens": 40}
    answers = {
        name: {"divergence": {"kl": 1.479, "kl_stderr": 0.12, "agreement": 0.413} if empty else None, "empty": empty}
        for name, empty in {"dense": 0, "uniform": 23, chosen: 17}.items()
    }
    results = {
        "chosen": chosen,
        "variants": {
            name: {
                "parameters": int(123_457 * share),
                "weight_bytes": int((250 << 20) * share),
                "linear_keep": share,
                "model_keep": (23_457 + 100_000 * share) / 123_457,
                **({"disk_bytes": 200 << 20} if name == chosen else {}),
            }
            for name, share in keeps.items()
        },
        "tasks": {
            "wikitext2": {**text, "models": text_rows(chosen, level)},
            "file:/home/me/secret/story.jsonl": {**text, "models": text_rows(chosen, level + 0.2, False)},
            "piqa": {**task, "models": harness, "compared": against},
            "arc_easy": {**task, "models": harness, "compared": {}},
            "chat:/home/me/secret/said.jsonl": {**chat, "models": answers},
        },
        "zero_shot": {
            "tasks": ["piqa", "arc_easy"],
            "models": {
                name: {"mean": value, "stderr": 0.014, "retained": value / 0.61} for name, value in values.items()
            },
            "compared": against,
        },
        "continuations": [{"prompt": "1 < 2 &", "models": {"dense": " yes\n\n</p>", "uniform": "", chosen: EVIL}}],
        "interleaved": True,
    }
    checksums = {"wikitext2": "a" * 64, "file:/home/me/secret/story.jsonl": "b" * 64}
    return manifest(
        "eval", f"{chosen}-all", results, config={"device": "cpu", "dtype": "bfloat16", "text_sha256": checksums}
    )


def bench(chosen: str = NAME, ratio: float = 1.15) -> Manifest:
    """Return a benchmark of reading and generating."""
    size = {"parameters": 123_457, "weight_bytes": 250 << 20, "disk_bytes": 250 << 20, "peak_memory_bytes": 400 << 20}
    speeds = {"dense": 1.0, chosen: ratio}

    def row(speed: float) -> dict[str, Any]:
        seconds = 0.02 / speed
        return {
            "seconds": {"median": seconds, "p10": 0.9 * seconds, "p90": 1.2 * seconds},
            "tokens_per_second": {"median": 1 / seconds, "p10": 0.8 / seconds, "p90": 1.1 / seconds},
            "ratio": {"median": speed, "low": speed - 0.05, "high": speed + 0.05},
            "predicted": speed + 0.01,
            "macs": int(68_765_432_100 / speed),
            "bytes_read": 270.5 * 2**20 / speed,
        }

    cases = [
        {"kind": kind, "batch": batch, "past": past, "new": new, "models": {n: row(s) for n, s in speeds.items()}}
        for kind, batch, past, new in [("prefill", 1, 0, 512), ("decode", 1, 512, 1), ("decode", 4, 512, 1)]
    ]
    results = {
        "chosen": chosen,
        "backend": "torch",
        "device": "cpu",
        "precision": "bfloat16",
        "models": dict.fromkeys(speeds, size),
        "cases": cases,
        "interleaved": True,
        "last_logits": False,
        "threads": 2,
        "machine": {"system": "Linux x86_64", "processor": "A & B", "cores": 2, "memory_bytes": 24 << 30, "gpus": []},
    }
    return manifest("bench", chosen, results, config={"device": "cpu", "dtype": "bfloat16", "rounds": 20})


def training() -> Manifest:
    """Return a training at two budgets; two steps have no loss."""
    log = [
        {"step": step, "loss": None if step in (0, 3) else 0.4 / step, "keep": 0.8, "dense": 9}
        | {"seconds": 2.0 * step, "held_out": 3.9 - 0.02 * step if step % 2 == 0 else None}
        for step in range(7)
    ]
    figures = {"start_held_out": 3.9, "held_out": 3.78, "best_step": 6, "steps": 6, "seconds": 61.0}
    budget = {**figures, "backward_passes": 96, "ranks": {}}
    results = {"budgets": {"0.8": budget, "0.6": {**budget, "held_out": 3.8}}, "log": {"0.8": log, "0.6": log[:5]}}
    results |= {"table_seconds": 2.0, "table_windows": 4}
    config = {"objective": "priced", "loss": "kl", "samples": 128, "held_out": 32, "keep": [0.8, 0.6]}
    return manifest("train-masks", "priced", results, config=config, seed=0)


def comparison() -> Manifest:
    """Return a comparison in which one allocator failed."""
    figures = {"nll": 3.4, "perplexity": 29.96, "gap_closed": 0.5, "window_nlls": []}
    row = {"held_out": 3.3, "tasks": {"wikitext2": figures}, "dense_layers": 5, "seconds": 1.5, "backward_passes": 8}
    dense = {"ranks": {}, "held_out": 3.1, "tasks": {"wikitext2": {**figures, "gap_closed": None}}}
    methods = {"dense": dense, "uniform": {**row, "held_out": 3.5}, "ara": row, "tanh": {"error": "the loss is nan"}}
    return manifest("compare", "0.80", {"methods": methods, "training": "priced"}, config={"keep": 0.8})


def export(**changes: Any) -> Manifest:
    """Return an export with its comparison; ``changes`` replace results."""
    case = {"tokens": 120, "difference": 0.0123, "scale": 20.0, "agreement": 0.995, "kl": 1.2e-6}
    case |= {"nll_torch": 3.4011, "nll_onnx": 3.4012}
    proof = {"text": "help", "tolerance": {}, "cases": [{"case": name, **case} for name in ("prefill", "decode")]}
    files = {"model.onnx": {"bytes": 1 << 20, "sha256": "0" * 64}}
    results = {"precision": "fp32", "execution_provider": "cpu", "last_logits": False, "files": files, "parity": proof}
    return manifest("export", f"{NAME}-fp32", {**results, **changes})


def sources(**changes: Any) -> Sources:
    """Return a workspace with everything, and another budget of the same factors."""
    other = Made(
        truncated("ara-0.60", disk_bytes=150 << 20),
        allocation("ara-0.60", keep=0.6),
        (evaluation("ara-0.60", 0.6, 4.0),),
        (bench("ara-0.60", 1.4),),
    )
    whole = Sources(
        decomposition=decomposition(),
        current=Made(truncated(), allocation(), (evaluation(),), (bench(),)),
        others=(other,),
        modules=modules(),
        ranks=ranks(),
        training=training(),
        comparisons=(comparison(),),
        exports=(export(),),
        place=("-w", "/home/me/ws"),
    )
    return replace(whole, **changes)


def bare() -> Sources:
    """Return a workspace with a checkpoint of which nothing was measured."""
    return Sources(decomposition(), Made(truncated(), allocation(method="energy")), modules=modules(), ranks=ranks())
