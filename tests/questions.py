"""Questions of our own in the files of lm-eval's tasks, for tests that must not depend on data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_THINGS = ("bread", "water", "stone", "fire", "grain", "wool", "salt", "iron", "milk", "wood", "honey", "paper")


def _arc(i: int, things: list[str]) -> dict[str, Any]:
    return {
        "id": f"made-{i}",
        "question": f"What does the baker of street {i} need first?",
        "choices": {"text": things, "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[i % 4],
    }


def _piqa(i: int, things: list[str]) -> dict[str, Any]:
    return {"goal": f"Carry {things[0]} home", "sol1": f"use {things[1]}", "sol2": f"use {things[2]}", "label": i % 2}


def _winogrande(i: int, things: list[str]) -> dict[str, Any]:
    sentence = f"The {things[0]} did not fit beside the {things[1]} because _ was too large."
    return {"sentence": sentence, "option1": things[0], "option2": things[1], "answer": str(1 + i % 2)}


def _lambada(i: int, things: list[str]) -> dict[str, Any]:
    return {"text": f"He went to the market for {things[0]} and came back with {things[i % 4]}"}


def _wikitext(i: int, things: list[str]) -> dict[str, Any]:
    return {"page": f" = {things[0]} = \n\n {things[1]} and {things[2]} are not {things[3]} . \n"}


_FILES: dict[str, Callable[[int, list[str]], dict[str, Any]]] = {
    "arc_easy/test.jsonl": _arc,
    "arc_challenge/test.jsonl": _arc,
    "piqa/validation.jsonl": _piqa,
    "winogrande/validation.jsonl": _winogrande,
    "lambada_openai/test.jsonl": _lambada,
    "wikitext2_raw/test_documents.jsonl": _wikitext,
}


def write_questions(folder: Path, count: int = 24) -> Path:
    """Write ``count`` questions per task below ``folder``, in the layout of ``ARA_DATA_DIR``."""
    for name, make in _FILES.items():
        rows = [make(i, [_THINGS[(i * 5 + j * (1 + i // 12)) % 12] for j in range(4)]) for i in range(count)]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
