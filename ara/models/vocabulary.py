"""Tokens and the rows of the embedding: a tokenizer may know more of them than the model has rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ara.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_rows(model_config: Any) -> int | None:
    """Return the rows of the embedding, or ``None`` if the config does not say.

    Args:
        model_config: of transformers.
    """
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    rows: int | None = getattr(text, "vocab_size", None)
    return rows


def end_tokens(value: Any, where: str, hint: str) -> tuple[int, ...]:
    """Return the tokens that end a text, as ``eos_token_id`` of a config gives them: one, several or none.

    Args:
        value: as it was read.
        where: it was read, for the error.
        hint: what to do.

    Raises:
        ModelError: it is something else.
    """
    found = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    if not all(type(token) is int and token >= 0 for token in found):
        raise ModelError(f"eos_token_id of {where} is {str(value)[:40]!r}, expected tokens or none", hint)
    return found


def has_row(token: int | None, rows: int | None) -> bool:
    """Tell whether there is such a token and the embedding has a row for it; it has where ``rows`` is not known."""
    return token is not None and (rows is None or token < rows)


def check_tokens(
    ids: torch.Tensor, rows: int | None, tokenizer: PreTrainedTokenizerBase, where: str, hint: str | None = None
) -> None:
    """Refuse tokens without a row: torch would stop with an index error, or read memory that is not the embedding's.

    Args:
        ids: token ids of any shape, int64.
        rows: of the embedding; ``None`` checks nothing.
        tokenizer: names the token.
        where: what the ids are, such as ``the prompt``.
        hint: what to do, if more helps than to do without the token.

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
        or "the tokenizer was extended and the model was not: take the token out of the text, or give the model rows "
        "for it (resize_token_embeddings) and train them",
    )


def padded_with_row(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> PreTrainedTokenizerBase:
    """Return ``tokenizer``, or a copy that fills up with another token if its own one for that has no row.

    What fills up a batch is masked, so that any token does.
    """
    import copy

    if tokenizer.pad_token_id is None or has_row(tokenizer.pad_token_id, rows):
        return tokenizer
    other = copy.deepcopy(tokenizer)
    other.pad_token = (
        tokenizer.eos_token if has_row(tokenizer.eos_token_id, rows) else tokenizer.convert_ids_to_tokens(0)
    )
    return other
