"""The context length of a model, and whether a window or a prompt fits."""

from __future__ import annotations

from typing import Any

from ara.errors import UsageError

# Tokens per window in the evaluations of compression papers.
_DEFAULT_SEQ_LEN = 2048


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


def check_window(seq_len: int, model_config: Any, flag: str = "--seq-len", *, spare: int = 0) -> int | None:
    """Return how many positions of the model a window may have, or ``None`` if its config has no limit.

    Args:
        seq_len: requested tokens per window.
        model_config: of transformers.
        flag: the option, for the error.
        spare: positions that must stay free.

    Raises:
        UsageError: ``seq_len`` is more than that.
    """
    positions = context_length(model_config)
    if positions is None:
        return None
    if seq_len > positions - spare:
        free = f", of which {spare} must stay free" if spare else ""
        raise UsageError(
            f"{flag} {seq_len} is more than the {positions} positions of the model{free}",
            f"use at most {positions - spare}",
        )
    return positions - spare


def window_length(asked: int | None, model_config: Any, spare: int = 0) -> int:
    """Return the tokens per window: ``asked``, else 2048 or the model's limit if that is less.

    Args:
        asked: by the user.
        model_config: of transformers.
        spare: positions of the model that a window must leave.

    Raises:
        UsageError: ``asked`` exceeds the limit.
    """
    limit = check_window(asked or 0, model_config, spare=spare)
    return asked or min(_DEFAULT_SEQ_LEN, limit or _DEFAULT_SEQ_LEN)


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
