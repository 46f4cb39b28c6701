"""Calls of every command with option values that few programs expect; the options are those that the program has."""

from __future__ import annotations

import importlib
import random
from functools import cache
from typing import Any, get_args, get_type_hints

from tests.fuzz import mutate
from tests.fuzz.calls import AGAIN, ALLOCATE, ALLOCATE_ARA, GENERATE, GENERATE_ONNX, REPORT, TRUNCATE, WS
from tests.fuzz.harness import Case
from tests.fuzz.registry import target
from tests.fuzz.sandbox import Content, Link, Pipe
from tests.fuzz.seeds import DECOMPOSE, EVAL, PLACE, RANKS, STORY, TRAIN
from tests.fuzz.workspaces import Seeds

# Command → its share, and a valid call: most strange values are refused at once, those that are taken run it.
_CALLS: dict[str, tuple[int, list[str]]] = {
    "decompose": (6, ["../in/model", "--text", f"file:{STORY}", *DECOMPOSE, "-w", "../out/new", "-q"]),
    "train-masks": (4, [*TRAIN, *PLACE, "--name", "other", *WS]),
    "allocate": (6, ["--keep", "0.6", "-m", "energy", *WS]),
    "truncate": (3, ["--name", "other", *WS]),
    "eval": (2, [*EVAL, *PLACE, "--name", "other", *WS]),
    "compare": (
        2,
        [
            "--keep",
            "0.6",
            "--methods",
            "uniform",
            "--tasks",
            f"file:{STORY}",
            "--max-windows",
            "1",
            "--eval-seq-len",
            "24",
            "--samples",
            "2",
            "--held-out",
            "1",
            *PLACE,
            *WS,
        ],
    ),
    "bench": (2, ["--prefill", "2", "--decode", "2", "--batch", "1", "--rounds", "6", "--name", "other", *PLACE, *WS]),
    "export": (2, ["--no-parity", "--name", "other", *WS]),
    "report": (1, ["--name", RANKS, *WS]),
    "generate": (4, ["hello", "--max-new-tokens", "1", *PLACE, *WS]),
    "chat": (1, ["--max-new-tokens", "1", *PLACE, *WS]),
    "run": (
        2,
        [
            "../in/model",
            "--keep",
            "0.7",
            "-m",
            "energy",
            "--text",
            f"file:{STORY}",
            "--samples",
            "2",
            "--seq-len",
            "16",
            "--no-eval",
            *PLACE,
            "-w",
            "../out/new",
            "-q",
        ],
    ),
    "plan": (1, ["../in/model", "--no-probe", "--seq-len", "16", *PLACE, *WS]),
    "status": (1, [*WS]),
    "models": (1, ["-q"]),
    "methods": (1, ["-q"]),
}
# More of these is more work, and not a fault.
_LABOUR = (
    "steps",
    "batch",
    "rounds",
    "continuations",
    "conversations",
    "max_new_tokens",
    "samples",
    "rank_samples",
    "held_out",
    "max_windows",
)
_FILES = ("output", "model_card", "rewrite", "source", "ranks")
_WORDS: dict[str, tuple[str, ...]] = {
    "device": ("cpu", "cuda", "cuda:7", "cuda:-1", "mps", "meta", "cpu:3", "xpu"),
    "dtype": ("float64", "int8", "FLOAT32", "bf16", "float16", "bfloat16"),
    "method": (
        "plain",
        "whitened",
        "asvd",
        "energy",
        "uniform",
        "sensitivity",
        "dp-kl",
        "tanh",
        "strs",
        "gumbel",
        "optimum",
        "ENERGY",
    ),
    "option": ("alpha=0.5", "alpha=", "=1", "alpha", "alpha=nan", "alpha=inf", "targets=x", "steps=1", "a=b=c"),
    "exclude": ("*", "*.down_proj", "[", "[!", "**", "model.layers.0.*", "(a+)+$", "*" * 60),
    "tasks": (
        "file:",
        "file:../in",
        "file:/dev/null",
        "file:../in/texts/story.txt",
        ",",
        "python-docs",
        "nosuchtask",
        "a,b,a",
    ),
    "text": (
        "file:",
        "file:../in",
        "file:/dev/null",
        "file:../in/texts/story.txt",
        "python-docs",
        "nosuchtext",
        "FILE:x",
    ),
    "keep": ("0.7", "1", "1.0", "1e-9", "0.999999999", "0,7", "70%", "1/2"),
    "layout": ("factors", "pivoted"),
    "max_shard_size": (
        "5KB",
        "1KB",
        "0KB",
        "0.000001KB",
        "5",
        "5 GB",
        "-5GB",
        "1e3MB",
        "٣MB",
        "99999999999999999999TB",
    ),
    "prefill": ("1,2", "", ",", "1,,2", "0", "-1", "1.5", "9999999", "1" * 5000),
    "decode": ("1,2", "", ",", "0", "9999999"),
    "batch": ("1,2", "", "0"),
    "model": (
        "no-such-alias",
        "qwen3-0.6b",
        "a/b",
        "a//b",
        "../in/tiny.gguf",
        "../in",
        "../in/texts/story.txt",
        "gpt2",
    ),
    "backend": ("onnx", "torch", "ONNX"),
    "precision": ("fp32", "fp16", "int8", "int4"),
    "objective": ("paper", "priced"),
    "methods": ("uniform", "all", "uniform,,energy", ",", "nosuch", "uniform,uniform"),
    "revision": ("main", "0" * 40),
}


@cache
def _parameters(command: str) -> tuple[Any, ...]:
    import typer

    from ara_cli.app import app

    group = typer.main.get_command(app)
    return tuple(group.get_command(None, command).params)  # type: ignore[attr-defined,arg-type]


@cache
def _numbers(command: str) -> frozenset[str]:
    """Return the parameters of a command that are numbers."""
    from ara_cli.app import COMMANDS

    module, _, function = COMMANDS[command][0].partition(":")
    hints = get_type_hints(getattr(importlib.import_module(f"ara_cli.commands.{module}"), function))
    return frozenset(name for name, hint in hints.items() if {int, float} & {hint, *get_args(hint), *_inner(hint)})


def _inner(hint: Any) -> list[Any]:
    return [inner for outer in get_args(hint) for inner in get_args(outer)]


@target("value", 16)
def _spoilt_value(rng: random.Random, seeds: Seeds) -> Case:
    """Return a call of any command with one or two options of strange value."""
    name = rng.choice([name for name, (weight, _) in _CALLS.items() for _ in range(weight)])
    argv = [name, *_CALLS[name][1]]
    for _ in range(rng.choice((1, 1, 1, 2))):
        _spoil(rng, name, argv)
    if rng.random() < 0.04:
        argv.append(mutate.string(rng)[:200])
    return Case(argv)


def _spoil(rng: random.Random, command: str, argv: list[str]) -> None:
    parameters = [one for one in _parameters(command) if one.name not in ("help", *_FILES, "workspace", "overwrite")]
    one = rng.choice(parameters)
    if one.param_type_name == "argument":
        text = _value(rng, command, one)
        argv[1] = text if not text.startswith("-") else "--"
        return
    flags = [flag for flag in (*one.opts, *one.secondary_opts)]
    if getattr(one, "is_flag", False):
        argv.append(rng.choice(flags))
        return
    flag = rng.choice(flags)
    given = next((flag for flag in one.opts if flag in argv), None)
    text = _value(rng, command, one)
    if given is not None and rng.random() < 0.9 and not text.startswith("-"):
        argv[argv.index(given) + 1] = text
    elif flag.startswith("--"):
        argv.append(f"{flag}={text}")
    else:
        argv += [flag, text]


def _value(rng: random.Random, command: str, parameter: Any) -> str:
    words = _WORDS.get(parameter.name, ())
    if words and rng.random() < 0.6:
        return rng.choice(words)
    if parameter.name in _numbers(command):
        return _number(rng, bounded=parameter.name in _LABOUR)
    return rng.choice((mutate.string(rng), mutate.string(rng), _number(rng, True)))[:5000]


def _number(rng: random.Random, bounded: bool) -> str:
    kind = rng.random()
    if kind < 0.15:
        return rng.choice(
            (
                "nan",
                "inf",
                "-inf",
                "1_0",
                "0x10",
                "1e3",
                " 1",
                "1 ",
                "+1",
                "٣",
                "½",
                "",
                "1.",
                ".5",
                "1e-400",
                "--1",
                "1,5",
                "0b1",
                "True",
            )
        )
    if kind < 0.2:
        return mutate.string(rng)[:300]
    if kind < 0.25 and not bounded:
        return "9" * rng.choice((20, 400, 5000))
    found = rng.choice([one for one in mutate.NUMBERS if not bounded or not one > 9])
    return repr(found) if isinstance(found, float) or rng.random() < 0.9 else f"{found}.0"


_PLACES = (
    "../in/model/config.json", "../in/model", "../in/texts", "../in/pipe", "../in/loop", "../in/dangling",
    "../in/tiny.gguf", "../out", "../out/a", "../out/a/b/c", "../out/" + "x" * 255, "../out/" + "x" * 300, "../out/é",
    "../out/a b", "../out/a\nb", "../out/\udcff", "../out/-x", "../out/.x", "../out/x.html", "../out/missing/x.html",
    "../ws", "../ws/report/x.html", "../ws/x.md", "../half", ".", "..", "", " ", "../out/" + "y/" * 100 + "z",
    "../out/" + "y" * 200 + "/" + "z" * 200, "../ws/workspace.json", "../out/x/../y", "{root}/out/absolute",
    "../in/checkpoint", "../in/export", "../in/linked", "../out/%s", "../out/[red]",
)  # fmt: skip
_PATH_CALLS = (
    (["status"], "--workspace", ()),
    (["allocate", "--keep", "0.6", "-m", "energy"], "--workspace", ()),
    (["decompose", "../in/model", "-m", "plain", *DECOMPOSE], "--workspace", (r"(out|in|cwd)(/.*)?",)),
    (["report", "-w", "../ws"], "--output", (r"(out|cwd)/.*|in/(dangling|loop)",)),
    (["report", "-w", "../ws"], "--model-card", (r"(out|cwd)/.*|in/(dangling|loop)",)),
    (["export", "--source", "../in/checkpoint", "--no-parity"], "--output", (r"(out|cwd)/.*",)),
    (["export", "--no-parity", "--output", "../out/new"], "--source", (r"out/new(/.*)?",)),
    (
        ["export", "--source", "../in/checkpoint", "--output", "../out/new", "--no-parity"],
        "--rewrite",
        (r"out/new(/.*)?",),
    ),
    (["generate", "hello", "--max-new-tokens", "1", *PLACE], "--source", ()),
    (["generate", "hello", "--max-new-tokens", "1", "--backend", "onnx"], "--source", ()),
    (["allocate", "-w", "../ws"], "--ranks", ()),
)


@target("path", 4)
def _spoilt_path(rng: random.Random, seeds: Seeds) -> Case:
    """Return a call with a path that is no such thing as the command expects; whatever it writes goes below ``out``."""
    argv, flag, outputs = rng.choice(_PATH_CALLS)
    files: dict[str, Content] = {
        "in/pipe": Pipe(),
        "in/loop": Link("loop"),
        "in/dangling": Link("../out/nothing"),
        "in/linked": Link("model"),
    }
    return Case([*argv, f"{flag}={rng.choice(_PLACES)}", "-q"], files, outputs=outputs)


@target("name", 6)
def _name(rng: random.Random, seeds: Seeds) -> Case:
    name = rng.choice(
        (
            mutate.string(rng),
            mutate.string(rng),
            "a" * rng.choice((1, 199, 200, 201, 255, 5000)),
            RANKS + mutate.string(rng)[:300],
        )
    )
    command, flag = rng.choice(
        (
            (ALLOCATE, "--name"),
            (TRUNCATE[:1], "--name"),
            (TRUNCATE, "--allocation"),
            (ALLOCATE, "--factors"),
            (ALLOCATE_ARA, "--masks"),
            (GENERATE, "--checkpoint"),
            (GENERATE_ONNX, "--export"),
            (REPORT, "--checkpoint"),
            (AGAIN["eval"], "--checkpoint"),
            (AGAIN["export"], "--checkpoint"),
            (AGAIN["train-masks"], "--factors"),
            (["decompose", "../in/model", "-m", "plain", *DECOMPOSE], "--name"),
            (["allocate", "--ranks", f"../ws/allocate/{RANKS}/ranks.json"], "--name"),
        ),
    )
    return Case([*command, f"{flag}={name}", *WS])
