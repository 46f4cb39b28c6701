"""The process that runs a model in vLLM for :mod:`export.vllm.runtime`.

Functions return their result and a problem, one of which is ``None``: an exception of vLLM may not survive being sent
to another process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import metadata
from typing import Any, NamedTuple

from ara.environment import peak_memory_bytes
from ara.errors import AraError, first_line
from ara.evaluation.runtime import ServiceSize, Timing
from ara.evaluation.silence import silence_lm_eval

# Bytes of the KV cache on CPUs, where vLLM would take nearly all memory of the machine.
_CPU_CACHE = 4 << 30
# Bytes of the KV cache beyond the tokens that it must hold: it is divided into blocks.
_ROOM = 64 << 20
_QUIET = {"use_tqdm_on_load": False}
# Texts that lm-eval passes to vLLM per call.
_BATCH = 256

_loaded: list[Any] = []


class Problem(NamedTuple):
    """Why something failed, in one line, and what to do about it if that is known."""

    message: str
    hint: str | None


def _reporting(function: Callable[..., Any]) -> Callable[..., tuple[Any, Problem | None]]:
    """Return a function that returns its result and ``None``, or ``None`` and its problem."""

    @wraps(function)
    def reported(*arguments: Any) -> tuple[Any, Problem | None]:
        try:
            return function(*arguments), None
        except AraError as error:
            return None, Problem(str(error), error.hint)
        except Exception as error:  # vLLM raises errors of many kinds
            return None, Problem(f"{type(error).__name__}: {first_line(error)}", None)

    return reported


@_reporting
def load_harness(folder: str, dtype: str, device: str) -> None:
    """Load a checkpoint folder for :func:`answers`; once in a process."""
    settings: dict[str, Any] = {"enforce_eager": True, "disable_log_stats": True}
    if device == "cpu" and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        settings["kv_cache_memory_bytes"] = _CPU_CACHE
    _loaded.append(_model_of_lm_eval()(pretrained=folder, dtype=dtype, batch_size=_BATCH, **_QUIET, **settings))


@_reporting
def load_service(folder: str, dtype: str, device: str, size: ServiceSize) -> int:
    """Load a checkpoint folder for :func:`timing`, once in a process; return the number of CPU threads."""
    import torch
    from vllm import LLM

    settings: dict[str, Any] = {"max_model_len": size.tokens, "max_num_seqs": size.requests}
    if device == "cpu":
        # Compilation needs a C++ compiler there. Without a size the KV cache would take nearly all memory.
        settings |= {"enforce_eager": True, "kv_cache_memory_bytes": size.cache_bytes + _ROOM}
    # Every round has new prompts, and the caches must not know the beginnings of those of the round before.
    _loaded.append(LLM(folder, dtype=dtype, disable_log_stats=False, enable_prefix_caching=False, **_QUIET, **settings))
    return torch.get_num_threads()


@_reporting
def timing(prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
    """Answer prompts of token ids at once, each by ``new_tokens`` tokens."""
    from vllm import SamplingParams

    given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    found = _loaded[0].generate(given, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    return Timing(seconds, tuple(one.metrics.first_token_latency for one in found))


@_reporting
def continuation(ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Return the greedy continuation of a prompt, without the token that ends it; after :func:`load_harness`."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_new_tokens, detokenize=False)
    (found,) = _loaded[0].model.generate([{"prompt_token_ids": list(ids)}], sampling, use_tqdm=False)
    (answer,) = found.outputs
    return list(answer.token_ids)[: -1 if answer.finish_reason == "stop" else None]


@_reporting
def peak_memory() -> int:
    """Return the peak memory of this process."""
    return peak_memory_bytes()


def _model_of_lm_eval() -> Any:
    """Return lm-eval's class for vLLM, which asks for the version of a distribution called vllm."""
    of_any = metadata.version
    try:
        of_any("vllm")
    except metadata.PackageNotFoundError:
        # The build for CPUs. vLLM itself takes this name and reads the end as "for CPUs".
        cpu = f"{of_any('vllm-cpu')}+cpu"
        metadata.version = lambda distribution_name: cpu if distribution_name == "vllm" else of_any(distribution_name)
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM


@_reporting
def answers(kind: str, requests: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return what lm-eval's model answers.

    Args:
        kind: name of a method: loglikelihood, loglikelihood_rolling or generate_until, whose requests are their
            arguments; or _loglikelihood_tokens, whose requests are keys, contexts and continuations as token ids.
        requests: texts, or token ids.
    """
    from lm_eval.api.instance import Instance

    given: list[Any] = list(requests)
    if kind != "_loglikelihood_tokens":
        given = [Instance(kind, {}, arguments, number) for number, arguments in enumerate(requests)]
    with silence_lm_eval():
        found: list[Any] = getattr(_loaded[0], kind)(given, disable_tqdm=True)
    return found
