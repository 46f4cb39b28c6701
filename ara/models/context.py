"""The context length of a model, and whether a prompt fits."""

from __future__ import annotations

from typing import Any

from ara.errors import UsageError


def context_length(model_config: Any) -> int | None:
    """Return how many tokens a model can read at once, or ``None`` if its config does not say.

    YaRN extends the context to ``factor`` times that of the pretraining, but ``max_position_embeddings`` may still be
    the original one (arXiv 2309.00071).

    Args:
        model_config: config of transformers.
    """
    text = model_config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if limit is not None and rope.get("rope_type") == "yarn" and rope.get("factor"):
        limit = max(limit, int(rope["factor"] * rope.get("original_max_position_embeddings", limit)))
    return limit


def check_room(prompt: int, new: int, context: int | None) -> None:
    """Check that a prompt and its continuation fit into a model.

    Args:
        prompt: tokens of the prompt.
        new: tokens to generate.
        context: positions of the model; ``None``: no limit.

    Raises:
        UsageError: they do not fit.
    """
    if context is not None and prompt + new > context:
        raise UsageError(
            f"{prompt} tokens of prompt and {new} new ones are more than the {context} positions of the model",
            f"use --max-new-tokens {context - prompt}" if context > prompt else "shorten the prompt",
        )
