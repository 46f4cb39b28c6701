"""vLLM's server on a checkpoint folder, as ``ara serve`` starts it, and requests of the ``openai`` client."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers import free_port, served
from tests.vllm.greedy import NEW_TOKENS, PROMPTS, by_transformers

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
# Seconds for the server to start; it imports torch and vLLM in three processes.
START = 1200


@pytest.mark.timeout(START + 300)
def test_a_folder_is_served_without_options_of_ours(folder: Callable[..., Path], tmp_path: Path) -> None:
    """With small caches and no compilation."""
    from openai import OpenAI

    source, port = folder("llama", "pivoted"), free_port()
    sizes = {"max-model-len": 96, "max-num-seqs": 4, "kv-cache-memory-bytes": 1 << 26, "dtype": "float32"}
    options = ["--enforce-eager", *(word for name, value in sizes.items() for word in (f"--{name}", str(value)))]
    command = [sys.executable, "-m", "ara_cli", "serve", "--source", str(source), "--port", str(port), "--", *options]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with served(command, port, tmp_path / "log", seconds=START, env=env) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        (model,) = client.models.list()
        answer = client.completions.create(
            model=model.id,
            prompt=PROMPTS,
            max_tokens=NEW_TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    assert model.id == str(source)
    # A field of vLLM's own.
    assert [choice.model_extra["token_ids"] for choice in answer.choices] == by_transformers(source)
