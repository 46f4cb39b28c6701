"""How much a continuation repeats itself.

    seq-rep-4 = 1 − (distinct 4-grams) / (4-grams)        of one sequence of tokens

(Welleck et al., "Neural Text Generation with Unlikelihood Training", ICLR 2020, arXiv 1908.04319.) A sequence of t
tokens has t − 3 4-grams. Each 4-gram that occurred before in the sequence adds one to the repeats, so seq-rep-4 is the
share of 4-grams that occurred before.
"""

from __future__ import annotations

from collections.abc import Sequence

# Tokens of an n-gram.
NGRAM = 4
# From this share on, a continuation of 128 tokens falls into repetition. A loop of p tokens that starts after s tokens
# repeats 125 − s − p of its 125 4-grams: at least half of them if s + p is at most 62.
FALLS_INTO_REPETITION = 0.5


def repeated_share(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Return the share of n-grams of ``tokens`` that occurred before in it: seq-rep-n.

    Args:
        tokens: (t) token ids of a continuation, without its prompt.
        n: tokens of an n-gram.

    Returns:
        From 0 to below 1; 0 if there are fewer than n tokens.
    """
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def falls_into_repetition(tokens: Sequence[int]) -> bool:
    """Tell whether at least half of the 4-grams of a continuation occurred before in it.

    The threshold :data:`FALLS_INTO_REPETITION` is meant for continuations of up to 128 tokens.

    Args:
        tokens: (t) token ids of a continuation, without its prompt.
    """
    return repeated_share(tokens) >= FALLS_INTO_REPETITION
