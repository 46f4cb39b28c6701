"""What compression does to the answers of a chat model.

Two measures over held-out conversations, each of which counts the same:

    distance       KL(dense ‖ model) and agreement of the most likely token over the tokens of the answers. All models
                   read the same answers ("teacher-forced").
    empty answers  how many answers show nothing. The model continues the prompt greedily. An answer is empty if its
                   first token ends the turn, or if its text is blank.

The first measure does not show the second: a small shift of the first token's probabilities can silence a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from ara.distributed.group import ALONE, Group
from ara.errors import NAN_HINT, NumericalError
from ara.evaluation.divergence import DivergenceSum
from ara.evaluation.generation import check_logits, greedy_tokens, why_empty
from ara.models.loading import forward_errors
from ara.models.scores import Head, Place, Scores
from ara.progress import SILENT, Reporter


def is_silent(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: torch.Tensor,
    max_new_tokens: int,
    stop: set[int],
    who: str,
) -> bool:
    """Tell whether the greedy answer to a prompt is empty; generation ends with the first visible character.

    Args:
        model: a causal language model in eval mode.
        tokenizer: of the model.
        prompt: (t) int64, up to the start of the answer.
        max_new_tokens: an answer that is blank up to here is empty.
        stop: token ids that end a turn.
        who: model and conversation, for the error.

    Raises:
        NumericalError: the model gives NaN.
    """
    answer: list[int] = []
    for token in greedy_tokens(model, prompt, max_new_tokens, stop, who):
        answer.append(token)
        if why_empty(len(answer), tokenizer.decode(answer, skip_special_tokens=True)) is None:
            return False
    return True


def whole_answer(
    model: torch.nn.Module, prompt: torch.Tensor, max_new_tokens: int, stop: set[int], who: str
) -> list[int]:
    """Return the tokens of the greedy answer to a prompt, with the one that ends the turn.

    Arguments and errors as of :func:`is_silent`.
    """
    answer: list[int] = []
    for token in greedy_tokens(model, prompt, max_new_tokens, set(), who):
        answer.append(token)
        if token in stop:
            break
    return answer


def answer_distances(
    models: Mapping[str, torch.nn.Module],
    conversations: Sequence[tuple[torch.Tensor, torch.Tensor]],
    reference: str,
    report: Reporter = SILENT,
    label: str = "Answers",
    group: Group = ALONE,
) -> dict[str, list[tuple[float, float]]]:
    """Return the distance from the reference model on the answers of every conversation.

    Args:
        models: causal language models in eval mode, by name.
        conversations: (t) int64 ids, and (t) bool, true for the tokens of answers, at least one after the first token.
        reference: name of the dense model.
        report: receives progress.
        label: of the progress bar.
        group: processes that share the conversations; each has all models.

    Returns:
        For every model except the reference, per conversation, the figures of
        :meth:`ara.evaluation.divergence.DivergenceSum.mean` over the tokens of its answers. In other processes than the
        first, no figures.

    Raises:
        NumericalError: a model gives logits that are not finite, or an infinite divergence.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models if name != reference}
    mine = group.in_turn(len(conversations))
    heads = {name: Head(model) for name, model in models.items()}
    with report.bar(label, len(mine) * len(models)) as bar:
        for number in mine:
            ids, answers = conversations[number]
            dense = _answers(heads[reference], ids, answers, f"{label}, {reference}, conversation {number + 1}")
            bar.advance()
            for name, distances in found.items():
                who = f"{label}, {name}, conversation {number + 1}"
                distances.append(_distance(dense, _answers(heads[name], ids, answers, who)))
                if not math.isfinite(distances[-1][0]):
                    raise NumericalError(
                        f"{who}: the KL divergence from {reference} is {distances[-1][0]}, expected a finite number",
                        NAN_HINT,
                    )
                bar.advance()
    return {name: group.in_order(distances, len(conversations)) for name, distances in found.items()}


@dataclass(frozen=True)
class _Answers:
    """What a model says of one conversation.

    Attributes:
        scores: of the conversation.
        rows: (t − 1) bool, the positions that predict a token of an answer.
        who: model and conversation, for errors.
    """

    scores: Scores
    rows: torch.Tensor
    who: str

    def at(self, place: Place) -> torch.Tensor:
        """Return those logits (a, v) at a place that predict a token of an answer."""
        logits = self.scores.at(place)[0]
        found = logits[self.rows[place.positions].to(logits.device)]
        check_logits(found, self.who)
        return found


@torch.inference_mode()
def _answers(head: Head, ids: torch.Tensor, answers: torch.Tensor, who: str) -> _Answers:
    """Run a model over one conversation (t) and return its scores where ``answers`` (t) is true."""
    device = next(head.model.parameters()).device
    with forward_errors(head.model):
        # Position i predicts token i + 1.
        return _Answers(head.scores(ids[None].to(device)), answers[1:], who)


@torch.inference_mode()
def _distance(dense: _Answers, other: _Answers) -> tuple[float, float]:
    total = DivergenceSum()
    for place in max(dense.scores.places(), other.scores.places(), key=len):
        if dense.rows[place.positions].any():
            total.add(dense.at(place), other.at(place))
    return total.mean()
