"""Greedy continuations by vLLM and by transformers, as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# Token ids below 260; the prompts have different lengths, so that batches are ragged.
PROMPTS = [[1, 70, 40, 90, 33], [1, 200, 5], [1, *range(50, 80)]]
NEW_TOKENS = 12
# A tiny cache, and no compilation: starting is what takes time.
_SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 96,
    "max_num_seqs": 4,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 26,
    "disable_log_stats": True,
}


def by_vllm(folder: Path, **settings: Any) -> list[list[int]]:
    """Return the continuation of every prompt by vLLM."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    model = LLM(str(folder), **{**_SETTINGS, **settings})
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    found = model.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
    tokens = [list(one.outputs[0].token_ids) for one in found]
    del model
    cleanup_dist_env_and_memory()
    return tokens


def by_transformers(folder: Path) -> list[list[int]]:
    """Return the continuation of every prompt by transformers, in float32."""
    import ara

    model = ara.load(folder, "cpu", "float32")
    found = []
    for ids in PROMPTS:
        prompt = torch.tensor([ids])
        with torch.no_grad():
            whole = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
        found.append(whole[0, len(ids) :].tolist())
    return found
