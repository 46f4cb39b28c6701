"""A compressed model that answers, in torch or in an export's runtime; ``ara generate`` and ``ara chat`` share it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ara.bounds import SEED_LIMIT
from ara.config import AnswerConfig
from ara.data.chat import Message, has_template, message
from ara.errors import UsageError
from ara.evaluation.generation import chat_ids, prompt_ids, text_pieces, why_empty
from ara.evaluation.sampling import Sampler
from ara.models.checkpoint import load_tokenizer
from ara.models.context import check_room
from ara.models.silence import silence_transformers
from ara.models.vocabulary import check_tokens
from ara.progress import Reporter
from ara.stages.common import Run
from export.base import TextDecoder
from export.sources import model_folder
from export.targets import target_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# What to do about an empty answer.
_REPAIR = "calibrate with conversations (ara decompose --text c4:0.8,chat:0.2), or repair the checkpoint (ara recover)"
_NO_ROW = "take it out of the prompt; if the chat template put it there: ara generate --no-chat"


class Answerer:
    """A model and its tokenizer. The weights are read for the first answer, so that what needs none is checked before.

    Args:
        config: backend, length, sampling, system prompt, placement.
        run: workspace and reporter.
        checkpoint: which one, as NAME or STAGE/NAME; the latest by default.
        source: a checkpoint folder or an exported folder to run instead of a result of the workspace.
        export: which export of the checkpoint; the latest by default.

    Attributes:
        tokenizer: of the model.
        seed: of the tokens that are drawn; ``None`` if none is drawn.

    Raises:
        AraError: no checkpoint, no export, or no tokenizer.
        UsageError: a system prompt for a model without a chat template.
    """

    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        config: AnswerConfig,
        run: Run,
        *,
        checkpoint: str | None = None,
        source: Path | None = None,
        export: str | None = None,
    ) -> None:
        self._config, self._report = config, run.report
        self._target = target_of(config.backend)
        self._folder = model_folder(self._target, run, checkpoint=checkpoint, export=export, source=source)
        self._report.step(f"{config.backend}: {self._folder}")
        self.seed = _seed(config)
        if self.seed is not None:
            self._report.fact(f"temperature {config.temperature:g}, top-p {config.top_p:g}, seed {self.seed}")
        self.forget()
        with silence_transformers():
            self.tokenizer = load_tokenizer(self._folder)
        if config.system is not None and not has_template(self.tokenizer):
            raise UsageError("the model has no chat template, which --system needs", "say it in the prompt")

    def forget(self) -> None:
        """Begin the random numbers of the seed anew, as for a new conversation."""
        config = self._config
        self._sampler = None if self.seed is None else Sampler(config.temperature, config.top_p, self.seed)

    def prompt_ids(self, prompt: str, chat: bool) -> torch.Tensor:
        """Return the tokens (t) int64 of one prompt, in the chat template if ``chat`` is set and the model has one.

        Raises:
            ModelError: the template fails, or the prompt has no token.
        """
        if chat and has_template(self.tokenizer):
            return self.conversation_ids([message("user", prompt)])
        return prompt_ids(self.tokenizer, prompt)

    def conversation_ids(self, messages: Sequence[Message]) -> torch.Tensor:
        """Return the tokens (t) int64 of a conversation after the system prompt, in the model's chat template.

        Raises:
            ModelError: the template fails; see :func:`ara.data.chat.chat_text`.
        """
        first = [] if self._config.system is None else [message("system", self._config.system)]
        return chat_ids(self.tokenizer, [*first, *messages])

    def load(self) -> None:
        """Read the weights now instead of for the first answer."""
        _ = self._decoder

    def has_room(self, ids: torch.Tensor) -> bool:
        """Tell whether a prompt (t) and the longest answer fit into the context of the model."""
        context = self._decoder.context
        return context is None or len(ids) + self._config.max_new_tokens <= context

    def answer(self, ids: torch.Tensor) -> Answer:
        """Return the answer to a prompt (t) int64, which is computed while it is read.

        Raises:
            UsageError: the prompt is too long.
            DataError: a token of it has no row in the embedding.
        """
        decoder, new = self._decoder, self._config.max_new_tokens
        check_tokens(ids, decoder.vocabulary, self.tokenizer, "the prompt", _NO_ROW)
        check_room(len(ids), new, decoder.context)
        tokens = decoder.generate(ids.numpy(), new, sampler=self._sampler)
        return Answer(self.tokenizer, tokens, self._report, new)

    @cached_property
    def _decoder(self) -> TextDecoder:
        """The loaded model."""
        with silence_transformers():
            if self._target is not None:
                return self._target.for_generate(self._folder)
            from export.torch_decoder import TorchDecoder

            return TorchDecoder(self._folder, self._config.device, self._config.dtype)


class Answer:
    """An answer that is computed while it is read, once: iterate over its pieces of text.

    At its end an answer that shows nothing is reported as a warning.

    Attributes:
        text: the pieces so far.
        tokens: number of tokens so far.
        limit: largest number of tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tokens: Iterator[int],
        report: Reporter,
        limit: int,
    ) -> None:
        self._tokenizer, self._computed, self._report = tokenizer, tokens, report
        self.text, self.tokens, self.limit = "", 0, limit

    def __iter__(self) -> Iterator[str]:
        with silence_transformers():
            for piece in text_pieces(self._tokenizer, self._counted()):
                self.text += piece
                yield piece
        if (why := why_empty(self.tokens, self.text)) is not None:
            self._report.warn(f"the answer is empty: {why}; {_REPAIR}")

    @property
    def is_empty(self) -> bool:
        """Whether the pieces so far show nothing."""
        return not self.text.strip()

    def _counted(self) -> Iterator[int]:
        for token in self._computed:
            self.tokens += 1
            yield token


def _seed(config: AnswerConfig) -> int | None:
    """Return the seed of the tokens that are drawn, a new one if none is given; ``None`` if none is drawn."""
    if config.temperature == 0:
        return None
    return secrets.randbelow(SEED_LIMIT) if config.seed is None else config.seed
