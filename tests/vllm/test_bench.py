"""``ara bench --backend vllm``: both models answer requests, each in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ara.artifacts.benchmark import BenchmarkResults
from ara.workspace.store import Workspace
from tests.commands import done

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
pytestmark = pytest.mark.timeout(900)


def test_requests_to_both_models(root: Path) -> None:
    words: list[Any] = ["--concurrency", "1,3", "--prompt-tokens", 20, "--new-tokens", 4, "--rounds", 6]
    done("bench", "--backend", "vllm", *words, "--dtype", "float32", "-w", root)
    (view,) = Workspace(root).views("benchmark")
    results = BenchmarkResults.read(view)
    assert results.serving is not None and [case.requests for case in results.serving] == [1, 3]
    for case in results.serving:
        for row in case.models.values():
            seconds = case.requests * case.new / row.output_tokens_per_second.median
            assert 0 < row.first_token_seconds.median <= seconds
    assert all((row.peak_memory_bytes or 0) > row.weight_bytes for row in results.models.values())
