"""Greedy tokens of compressed checkpoints in vLLM are those of transformers.

In every checkpoint the keys of the first block are dense, and every other layer has a rank of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ara.layouts.grid import Grid
from tests.vllm.greedy import by_transformers, by_vllm

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

# Starting vLLM takes most of the time.
pytestmark = pytest.mark.timeout(900)
Folder = Callable[..., Path]
EVERYTHING_ROUNDED = {"grid": Grid(8, 16, True), "embedding": Grid(8, 16, True)}


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
@pytest.mark.parametrize(
    "family",
    [
        "llama",  # grouped queries, head of its own
        "qwen2",  # biases
        "gemma",  # tied head
        "phi3",  # q, k, v stored as one matrix, gate and up as another
    ],
)
def test_tokens_are_those_of_transformers(folder: Folder, family: str, layout: str) -> None:
    source = folder(family, layout)
    assert by_vllm(source) == by_transformers(source)


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_further_families(folder: Folder, family: str) -> None:
    source = folder(family, "factors")
    assert by_vllm(source) == by_transformers(source)


@pytest.mark.parametrize(
    ("family", "layout", "grids"),
    [
        ("llama", "factors", EVERYTHING_ROUNDED),
        ("qwen2", "pivoted", {"grid": Grid(4, 32)}),
    ],
)
def test_matrices_of_few_bits_are_the_ordinary_ones_with_the_same_numbers(
    folder: Folder, family: str, layout: str | None, grids: dict[str, Grid]
) -> None:
    source = folder(family, layout, **grids)
    assert by_vllm(source) == by_transformers(source)


@pytest.mark.parametrize(
    ("family", "layout", "options"),
    [("llama", "pivoted", {}), ("qwen2", "factors", {}), ("gemma", None, EVERYTHING_ROUNDED)],
)
def test_transformers_code_within_vllm(
    folder: Folder, family: str, layout: str | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # In a process of its own: vLLM changes the classes of transformers.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    source = folder(family, layout, **options)
    assert by_vllm(source, model_impl="transformers") == by_transformers(source)


def test_compiled(folder: Folder) -> None:
    source = folder("llama", "pivoted")
    assert by_vllm(source, enforce_eager=False) == by_transformers(source)


@pytest.mark.parametrize(
    ("family", "layout", "options"),
    [
        ("qwen2", "factors", {}),
        ("llama", "pivoted", {}),
        ("phi3", "pivoted", {}),
        ("llama", "factors", EVERYTHING_ROUNDED),
    ],
)
def test_two_processes(folder: Folder, family: str, layout: str, options: dict[str, Any]) -> None:
    source = folder(family, layout, **options)
    assert by_vllm(source, tensor_parallel_size=2) == by_transformers(source)


def test_more_processes_than_key_heads(folder: Folder) -> None:
    source = folder("llama", "pivoted", hidden_size=128, num_attention_heads=4, num_key_value_heads=1)
    assert by_vllm(source, tensor_parallel_size=2) == by_transformers(source)
