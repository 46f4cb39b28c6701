"""Valid calls of ``ara`` that read what is spoilt; all paths are those of the sandbox (:mod:`tests.fuzz.sandbox`)."""

from __future__ import annotations

import random

from tests.fuzz.sandbox import Content, Folder, Gone, Link, Pipe
from tests.fuzz.seeds import DECOMPOSE, EVAL, PLACE, RANKS, STORY, TRAIN

WS = ("-w", "../ws", "-q")
NEW = ("-w", "../out/new", "-q")
EXPORTED = (r"out/exported(/.*)?",)

STATUS = ["status"]
REPORT = ["report", "--name", "other"]
ALLOCATE = ["allocate", "--keep", "0.6", "-m", "energy"]
ALLOCATE_ARA = ["allocate", "--keep", "0.6", "-m", "ara", *PLACE]
TRUNCATE = ["truncate", "--name", "other"]
# Without the chat template: it is rendered in a process of its own, which takes as long as thirty other commands.
GENERATE = ["generate", "hello", "--max-new-tokens", "1", "--no-chat", *PLACE]
GENERATE_ONNX = ["generate", "hello", "--max-new-tokens", "1", "--no-chat", "--backend", "onnx"]
AGAIN = {
    "decompose": ["decompose", "../in/model", "--text", f"file:{STORY}", *DECOMPOSE],
    "train-masks": ["train-masks", *TRAIN, *PLACE],
    "allocate": ["allocate", "--keep", "0.7", "-m", "energy", "--name", RANKS],
    "truncate": ["truncate", "--name", RANKS],
    "eval": ["eval", *EVAL, *PLACE, "--name", RANKS],
    "export": ["export", "--name", RANKS],
    "report": ["report", "--name", RANKS],
}


def decompose(rng: random.Random, model: str = "../in/model", text: bool | None = None) -> list[str]:
    """Return a decomposition; ``text`` says whether a tokenizer is to be read, ``None`` leaves it open."""
    read = rng.random() < 0.4 if text is None else text
    method = rng.choice(("whitened", "asvd", "two-sided")) if read else "plain"
    return ["decompose", model, "-m", method, "--text", f"file:{STORY}", *DECOMPOSE, *NEW]


def generate(rng: random.Random, chat: bool | None = None) -> list[str]:
    """Return an answer by torch; ``chat`` says whether the chat template is rendered, ``None`` leaves it open."""
    plain = [] if (rng.random() < 0.1 if chat is None else chat) else ["--no-chat"]
    return ["generate", "hello", "--source", "../in/checkpoint", "--max-new-tokens", "1", *PLACE, *plain, "-q"]


def generate_onnx(chat: bool = False) -> list[str]:
    """Return an answer by ONNX Runtime."""
    plain = [] if chat else ["--no-chat"]
    words = ["generate", "hello", "--source", "../in/export", "--backend", "onnx", "--max-new-tokens", "1"]
    return [*words, *plain, "-q"]


def export_source() -> list[str]:
    return ["export", "--source", "../in/checkpoint", "--output", "../out/exported", "--no-parity", "-q"]


def no_file(rng: random.Random) -> Content:
    links = ("nowhere", "/dev/zero", "/dev/null", ".", "/proc/self/mem", "../texts/story.txt", "/etc")
    return rng.choice((Gone(), Folder(), Pipe(), Link(rng.choice(links)), b"", Link("config.json"), rng.randbytes(100)))
