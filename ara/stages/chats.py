"""Conversations of ``ara eval``: which ones, what is asked about them, and the figures of all models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from ara.artifacts.evaluation import (
    DENSE,
    ChatFigures,
    ChatResults,
    DistancesPiece,
    DivergenceFigures,
    OpeningsPiece,
)
from ara.config import EvalConfig
from ara.data.conversations import (
    ANSWERING,
    Conversations,
    ConversationTokens,
    conversation_tokens,
    prompt_tokens,
    require_template,
)
from ara.distributed.group import ALONE, Group
from ara.errors import DataError, ModelError
from ara.evaluation.chat import is_silent, whole_answer
from ara.evaluation.divergence import summarise_divergence
from ara.evaluation.generation import stop_tokens, why_empty
from ara.evaluation.tasks import chosen_documents
from ara.models.vocabulary import check_tokens
from ara.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Name under which conversations are drawn: the same ones wherever a file lies.
_DRAW = "chat"


@dataclass(frozen=True, eq=False)
class ChatQuestion:
    """One conversation.

    Attributes:
        prompt: (p) int64, up to the start of the last answer.
        whole: the whole conversation; ``None`` if it has no answer.
    """

    prompt: torch.Tensor
    whole: ConversationTokens | None


@dataclass(frozen=True, eq=False)
class Chat:
    """Conversations that all models are asked; see :class:`ara.artifacts.evaluation.ChatResults`."""

    name: str
    origin: str
    of: int
    too_long: int
    questions: tuple[ChatQuestion, ...]

    @property
    def distances_piece(self) -> str:
        """Name of the piece with distances from the dense model."""
        return self.name

    @property
    def openings_piece(self) -> str:
        """Name of the piece with generated answers."""
        return f"{self.name} answers"

    def readings(self, dense: OpeningsPiece) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return what all models read: ids (t), and (t) bool, true for answers; ``dense`` has the missing answers."""
        found = []
        for question, answer in zip(self.questions, dense.answers, strict=True):
            if question.whole is not None:
                found.append((question.whole.ids, question.whole.answers))
            else:
                assert answer is not None
                ids = torch.cat([question.prompt, torch.tensor(answer, dtype=torch.int64)])
                found.append((ids, torch.arange(len(ids)) >= len(question.prompt)))
        return found

    def fits(self, openings: OpeningsPiece, name: str) -> bool:
        """Tell whether a piece of model ``name`` answers these questions."""
        missing = [name == DENSE and question.whole is None for question in self.questions]
        return len(openings.empty) == len(missing) and [bool(answer) for answer in openings.answers] == missing


def choose_chat(
    conversations: Conversations,
    tokenizer: PreTrainedTokenizerBase,
    config: EvalConfig,
    rows: int | None,
    report: Reporter,
) -> Chat:
    """Draw conversations and tokenise them.

    Args:
        conversations: held-out ones.
        tokenizer: of the model.
        config: number of conversations, seed, ``seq_len`` (resolved), ``max_new_tokens``.
        rows: of the models' embedding, if known.
        report: says how many conversations are left out, and for how many the dense model's answer stands in.

    Raises:
        DataError: the model has no chat template, no conversation fits, or a token has no row in the embedding.
        ModelError: the chat template fails.
    """
    assert config.seq_len is not None, "not resolved"
    name, everything = conversations.name, conversations.conversations
    require_template(tokenizer, name)
    numbers = chosen_documents(_DRAW, len(everything), config.conversations, config.seed)
    drawn = everything if numbers is None else [everything[number] for number in numbers]
    answered = [any(message.role == ANSWERING for message in one.messages) for one in drawn]
    prompts = prompt_tokens(tokenizer, drawn)
    tokens = iter(conversation_tokens(tokenizer, [one for one, has in zip(drawn, answered, strict=True) if has]))
    questions = []
    for one, prompt, has in zip(drawn, prompts, answered, strict=True):
        whole = next(tokens) if has else None
        if whole is not None and not bool(whole.answers[1:].any()):
            raise ModelError(
                f"{one.where}: the chat template gives no token of the answer", "leave that conversation out"
            )
        length = max(len(prompt) + config.max_new_tokens, 0 if whole is None else len(whole.ids))
        if length > config.seq_len:
            continue
        check_tokens(prompt if whole is None else whole.ids, rows, tokenizer, one.where)
        questions.append(ChatQuestion(prompt, whole))
    too_long = len(drawn) - len(questions)
    limit = f"{config.seq_len} tokens with room for an answer of {config.max_new_tokens}"
    if not questions:
        raise DataError(
            f"no conversation of {name} fits into {limit} ({len(drawn)} tried)",
            "use a larger --seq-len or a smaller --max-new-tokens",
        )
    if too_long:
        report.warn(f"{too_long} of {len(drawn)} conversations of {name} are left out: longer than {limit}")
    without = sum(question.whole is None for question in questions)
    if without:
        report.fact(
            f"{without} of {len(questions)} conversations of {name} have no answer: the dense model's greedy answer of "
            f"at most {config.max_new_tokens} tokens stands in"
        )
    return Chat(name, conversations.origin, len(everything), too_long, tuple(questions))


def openings(
    chat: Chat,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    report: Reporter,
    group: Group = ALONE,
) -> OpeningsPiece:
    """Return which answers of one model are empty; of the dense model, also the answers that stand in.

    Args:
        chat: the conversations.
        name: of the model.
        model: in eval mode.
        tokenizer: of the model.
        max_new_tokens: largest length of an answer.
        report: receives progress.
        group: processes that share the conversations; the result of process 0 is that of all.

    Raises:
        NumericalError: the model gives NaN.
    """
    stop = stop_tokens(model)
    found: list[tuple[bool, tuple[int, ...] | None]] = []
    label = f"{chat.name}, answers, {name}"
    mine = group.in_turn(len(chat.questions))
    with report.bar(label, len(mine)) as bar:
        for number in mine:
            question, who = chat.questions[number], f"{label}, conversation {number + 1}"
            if name == DENSE and question.whole is None:
                answer = whole_answer(model, question.prompt, max_new_tokens, stop, who)
                shown = [token for token in answer if token not in stop]
                blank = why_empty(len(shown), tokenizer.decode(shown, skip_special_tokens=True)) is not None
                found.append((blank, tuple(answer)))
            else:
                found.append((is_silent(model, tokenizer, question.prompt, max_new_tokens, stop, who), None))
            bar.advance()
    all_found = group.in_order(found, len(chat.questions))
    return OpeningsPiece(tuple(blank for blank, _ in all_found), tuple(answer for _, answer in all_found))


def chat_results(
    chat: Chat, opened: Mapping[str, OpeningsPiece], distances: Mapping[str, DistancesPiece], config: EvalConfig
) -> ChatResults:
    """Return the figures of all models.

    Args:
        chat: the conversations.
        opened: model → its answers.
        distances: model → its distances from the dense model.
        config: settings of the evaluation.
    """
    assert config.seq_len is not None, "not resolved"
    models = {}
    for name, piece in opened.items():
        windows = distances[name].distances
        found = None if windows is None else DivergenceFigures(**asdict(summarise_divergence(windows)))
        models[name] = ChatFigures(found, sum(piece.empty))
    return ChatResults(
        kind="chat",
        text=chat.origin,
        conversations=len(chat.questions),
        of=chat.of,
        seed=config.seed,
        too_long=chat.too_long,
        seq_len=config.seq_len,
        dense_answers=sum(question.whole is None for question in chat.questions),
        answer_tokens=sum(int(answers[1:].sum()) for _ids, answers in chat.readings(opened[DENSE])),
        max_new_tokens=config.max_new_tokens,
        models=models,
    )
