"""Token ids and the rows of the embedding: a tokenizer may have more tokens than the model has rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ara.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_rows(model_config: Any) -> int | None:
    """Return the rows of the embedding, or ``None`` if the config does not say.

    Args:
        model_config: config of transformers.
    """
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    rows: int | None = getattr(text, "vocab_size", None)
    return rows


def end_tokens(value: Any, where: str, hint: str) -> tuple[int, ...]:
    """Return the end-of-text tokens of a config's ``eos_token_id``: one, several or none.

    Args:
        value: of the entry.
        where: its place, for the error.
        hint: what to do.

    Raises:
        ModelError: not token ids.
    """
    found = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    if not all(type(token) is int and token >= 0 for token in found):
        raise ModelError(f"eos_token_id of {where} is {str(value)[:40]!r}, expected tokens or none", hint)
    return found


def has_row(token: int | None, rows: int | None) -> bool:
    """Tell whether ``token`` exists and has a row in the embedding; with unknown ``rows`` every token has."""
    return token is not None and (rows is None or token < rows)


def check_tokens(
    ids: torch.Tensor, rows: int | None, tokenizer: PreTrainedTokenizerBase, where: str, hint: str | None = None
) -> None:
    """Refuse tokens without an embedding row, for which torch would raise an index error or read foreign memory.

    Args:
        ids: token ids of any shape, int64.
        rows: of the embedding; ``None``: no check.
        tokenizer: gives the names of tokens.
        where: description of the ids, such as ``the prompt``.
        hint: replaces the hint below.

    Raises:
        DataError: an id is not below ``rows``.
    """
    if rows is None or ids.numel() == 0 or int(ids.max()) < rows:
        return
    beyond = sorted({int(token) for token in ids[ids >= rows].tolist()})
    more = f", and {len(beyond) - 1} other such tokens" if len(beyond) > 1 else ""
    raise DataError(
        f"{where} holds the token {tokenizer.convert_ids_to_tokens(beyond[0])!r} (id {beyond[0]}){more}; the model's "
        f"embedding has {rows:,} rows, the tokenizer {len(tokenizer):,} tokens",
        hint
        or "the tokenizer was extended and the model was not: remove the token from the text, or add rows to the model "
        "(resize_token_embeddings) and train them",
    )


def padded_with_row(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> PreTrainedTokenizerBase:
    """Return ``tokenizer``, or a copy with another padding token if the model has no row for its own.

    Padding is masked, so any token does.
    """
    import copy

    if tokenizer.pad_token_id is None or has_row(tokenizer.pad_token_id, rows):
        return tokenizer
    other = copy.deepcopy(tokenizer)
    other.pad_token = (
        tokenizer.eos_token if has_row(tokenizer.eos_token_id, rows) else tokenizer.convert_ids_to_tokens(0)
    )
    return other
