"""Greedy continuations by vLLM and by transformers, as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ara.layouts.modeling_ara import densify

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

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


def by_vllm(folder: Path, *, adapter: Path | None = None, **settings: Any) -> list[list[int]]:
    """Return the continuation of every prompt by vLLM, with the adapter in a folder if there is one."""
    if adapter is not None:
        settings |= {"enable_lora": True, "max_lora_rank": 8}
    with engine(folder, **settings) as model:
        return [list(one.outputs[0].token_ids) for one in answers(model, PROMPTS, adapter)]


@contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[LLM]:
    """Run vLLM on a checkpoint inside the block."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    model = LLM(str(folder), **{**_SETTINGS, **settings})
    try:
        yield model
    finally:
        # An error's traceback keeps the engine alive, and its end would then disturb the next one.
        model.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def answers(model: LLM, prompts: Sequence[list[int]], adapter: Path | None = None) -> list[RequestOutput]:
    """Return vLLM's answers to prompts."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
    return model.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False, lora_request=lora)


def by_transformers(
    folder: Path, *, adapter: Path | None = None, prompts: Sequence[list[int]] = PROMPTS
) -> list[list[int]]:
    """Return the continuation of every prompt by transformers, in float32.

    An adapter is put by PEFT on the dense layers with the same numbers: it knows ordinary linear layers alone.
    """
    import ara

    model = ara.load(folder, "cpu", "float32")
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(densify(model), adapter)
    found = []
    for ids in prompts:
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
