"""Generation of text: greedy, or with tokens drawn by a sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ara.data.chat import Message, chat_text
from ara.errors import NAN_HINT, ModelError, NumericalError
from ara.evaluation.sampling import Sampler
from ara.models.loading import forward_errors
from ara.models.vocabulary import check_tokens, end_tokens, token_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Names of the outputs and arguments that hold a model's cache.
_CACHES = ("past_key_values", "cache_params")


def check_logits(logits: torch.Tensor, who: str) -> None:
    """Check that every row of logits has a finite maximum. Single tokens may be excluded with −∞.

    Args:
        logits: (…, v), any floating dtype.
        who: model and text, for the error.

    Raises:
        NumericalError: a row holds NaN or +∞, or only −∞.
    """
    greatest = logits.amax(-1)  # NaN if one logit is NaN
    if not bool(torch.isfinite(greatest).all()):
        bad = float(greatest[~torch.isfinite(greatest)][0])
        raise NumericalError(
            f"{who}: the model gives logits of {bad}, expected finite numbers",
            NAN_HINT,
        )


class LogitsCheck:
    """Logits processor of transformers that checks every step of ``generate``; ``who`` as in :func:`check_logits`."""

    def __init__(self, who: str) -> None:
        self.who = who

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return ``scores`` (b, v) unchanged; see :func:`check_logits`."""
        check_logits(scores, self.who)
        return scores


def greedy_tokens(
    model: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int, stop: set[int], who: str = "generating"
) -> Iterator[int]:
    """Yield the most likely next tokens, one by one, until one of ``stop``, which is not yielded.

    Args:
        model: a causal language model in eval mode.
        ids: (t) int64, the prompt.
        max_new_tokens: largest number of tokens.
        stop: token ids that end the text.
        who: model and text, for the error.

    Raises:
        NumericalError: the model gives NaN; it begins with ``who``.
    """
    return next_tokens(model, ids, max_new_tokens, stop, None, who)


def next_tokens(
    model: PreTrainedModel,
    ids: torch.Tensor,
    max_new_tokens: int,
    stop: set[int],
    sampler: Sampler | None,
    who: str = "generating",
) -> Iterator[int]:
    """Yield the next tokens as ``sampler`` draws them; arguments and errors as of :func:`greedy_tokens`.

    Args:
        sampler: draws every token; ``None``: the most likely one.
    """

    def drawn(logits: torch.Tensor) -> torch.Tensor:
        assert sampler is not None
        return torch.tensor([[sampler(logits[0].float().cpu().numpy())]])

    for (token,) in _steps(model, ids[None], max_new_tokens, who, _most_likely if sampler is None else drawn):
        if token in stop:
            return
        yield token


def greedy_batch(
    model: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int, stop: set[int], who: str = "generating"
) -> list[list[int]]:
    """Return the greedy continuations of prompts of equal length, each up to its first token of ``stop``.

    A row that has ended is computed further, and its tokens are dropped, until all rows have ended. Rounding may
    differ between sizes of a batch: two tokens of nearly equal likelihood can change places.

    Args:
        model: a causal language model in eval mode.
        ids: (b, t) int64, the prompts.
        max_new_tokens: largest number of tokens per row.
        stop: token ids that end a text; they are not part of the result.
        who: model and text, for the error.

    Raises:
        NumericalError: the model gives NaN; it begins with ``who``.
    """
    found: list[list[int]] = [[] for _ in ids]
    running = dict(enumerate(found))
    for tokens in _steps(model, ids, max_new_tokens, who, _most_likely):
        running = {row: text for row, text in running.items() if tokens[row] not in stop}
        for row, text in running.items():
            text.append(tokens[row])
        if not running:
            break
    return found


def _most_likely(logits: torch.Tensor) -> torch.Tensor:
    """Return the most likely tokens (b, 1) by logits (b, v)."""
    return logits.argmax(-1, keepdim=True)


@torch.inference_mode()
def _steps(
    model: PreTrainedModel,
    ids: torch.Tensor,
    max_new_tokens: int,
    who: str,
    choose: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[list[int]]:
    """Yield the next token of every row of prompts (b, t), ``max_new_tokens`` times.

    ``choose`` takes logits (b, v) and returns tokens (b, 1) int64.
    """
    text = new = ids.to(model.device)
    cache: dict[str, Any] = {"use_cache": True}
    for _ in range(max_new_tokens):
        with forward_errors(model):
            found = model(input_ids=new, logits_to_keep=1, **cache)
        check_logits(found.logits[:, -1], who)
        new = choose(found.logits[:, -1]).to(model.device)
        yield new[:, 0].tolist()
        cache = next(({"use_cache": True, name: found[name]} for name in _CACHES if found.get(name) is not None), {})
        if not cache:  # GPT-1 has no cache; RWKV and RecurrentGemma have their own kinds
            text = new = torch.cat([text, new], 1)
            cache = {"use_cache": False}


def stop_tokens(model: PreTrainedModel) -> set[int]:
    """Return the token ids that end a text of ``model``.

    Raises:
        ModelError: its config names no valid token ids.
    """
    config = getattr(model, "generation_config", None) or model.config
    return set(end_tokens(config.eos_token_id, "the model", "correct generation_config.json, or config.json"))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Return the tokens (t) int64 of a text to continue, without a chat template.

    Raises:
        ModelError: it has no token.
    """
    return _nonempty(tokenizer(text, verbose=False)["input_ids"])


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> torch.Tensor:
    """Return the tokens (t) int64 of a conversation in the model's chat template, up to the start of an answer.

    Raises:
        ModelError: the template fails, see :func:`ara.data.chat.chat_text`; or its text has no token.
    """
    return _nonempty(tokenizer(chat_text(tokenizer, messages), add_special_tokens=False, verbose=False)["input_ids"])


def _nonempty(ids: list[int]) -> torch.Tensor:
    if not ids:
        raise ModelError("the tokenizer makes no token of the prompt", "write a longer prompt, or check the tokenizer")
    return torch.tensor(ids, dtype=torch.int64)


def text_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """Yield text as tokens arrive; a character of several tokens is yielded whole.

    Tokens are decoded together with those of the previous piece, because many tokenizers drop a leading space.
    """
    before: list[int] = []
    new: list[int] = []

    def fresh() -> str:
        shown = tokenizer.decode(before, skip_special_tokens=True)
        return str(tokenizer.decode(before + new, skip_special_tokens=True))[len(shown) :]

    for token in tokens:
        new.append(token)
        text = fresh()
        # A replacement character at the end means an incomplete character.
        if text and not text.endswith("\ufffd"):
            yield text
            before, new = new, []
    if new and (text := fresh()):
        yield text


def why_empty(tokens: int, text: str) -> str | None:
    """Return why an answer shows nothing, as the end of a sentence, or ``None`` if it shows something.

    Args:
        tokens: number of tokens before the end of the answer.
        text: the decoded answer.
    """
    if text.strip():
        return None
    if tokens == 0:
        return "the model ended its turn with the first token"
    return f"it consists of {tokens} token{'' if tokens == 1 else 's'} of white space or control"


def greedy_continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    who: str = "the continuation",
) -> str:
    """Return the greedy continuation of ``prompt``, at most ``max_new_tokens`` long.

    Only the end tokens of the model's generation config are used, no beams or penalties.

    Raises:
        NumericalError: the model gives NaN; the message begins with ``who``.
        DataError: the prompt holds a token that the model has no row for.
        ModelError: the prompt has no token, or the model's config names no valid end tokens.
    """
    ids = prompt_ids(tokenizer, prompt)
    check_tokens(ids, token_rows(model.config), tokenizer, f"the prompt of {who}")
    tokens = list(greedy_tokens(model, ids, max_new_tokens, stop_tokens(model), who))
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
