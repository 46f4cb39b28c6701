"""Compares the graph in ONNX Runtime with the checkpoint in torch, on real text, in four cases.

The cases are prefill (all tokens at once), decode (token by token after a prompt, in the caches that generation uses),
chunks (prefill in pieces, with caches passed on), and two rows of different length, padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ara.models.likelihood import divergence, token_nll
from export.onnx.runner import OnnxDecoder
from export.onnx.tolerance import Parity

# Tokens: shortest prompt of the decode case, most tokens decoded one by one, and shortest chunk.
_PROMPT = 7
_STEPS = 90
_CHUNK = 19
# Positions that are compared at once; it limits memory.
_ROWS = 256


# Logits (n, v) float32 of n positions, and the positions: (row, place) each.
_Read = tuple[torch.Tensor, list[tuple[int, int]]]


def compare(decoder: OnnxDecoder, expected: torch.Tensor, ids: torch.Tensor) -> list[Parity]:
    """Run the graph in all four cases and return its differences from torch.

    A graph with the logits of the last position only is compared at that position, and without the padded case.

    Args:
        decoder: the exported model.
        expected: (2, t, v) float32, the checkpoint's logits in torch.
        ids: (2, t) int64, two windows of text; their last token is predicted but not read.
    """
    length = ids.shape[1] - 1
    cases: dict[str, Callable[[], _Read]] = {
        "prefill": lambda: _pieces(decoder, ids, [length]),
        "decode": lambda: _steps(decoder, ids, max(_PROMPT, length - _STEPS)),
        "chunks": lambda: _pieces(decoder, ids, _chunks(length)),
        "padded": lambda: _padded(decoder, ids),
    }
    if decoder.about.last_logits:
        del cases["padded"]
    return [_distance(case, run(), expected, ids) for case, run in cases.items()]


def _chunks(length: int) -> list[int]:
    chunk = max(_CHUNK, length // 5)
    whole, rest = divmod(length, chunk)
    return [chunk] * whole + [rest] * bool(rest)


def _steps(decoder: OnnxDecoder, ids: torch.Tensor, prompt: int) -> _Read:
    """Read a prompt of the first row, then its next tokens one by one, as generation does."""
    length = ids.shape[1] - 1
    if not decoder.about.decoder.shared_caches:
        return _pieces(decoder, ids, [prompt] + [1] * (length - prompt))
    bound, found, places = decoder.bind(1, length), [], []
    for start, stop in [(0, prompt), *((at, at + 1) for at in range(prompt, length))]:
        logits = decoder.step(bound, ids[:1, start:stop].numpy(), np.ones((1, stop), np.int64))
        found.append(torch.from_numpy(logits[0].astype(np.float32)))
        places += [(0, place) for place in range(stop - logits.shape[1], stop)]
    return torch.cat(found), places


def _pieces(decoder: OnnxDecoder, ids: torch.Tensor, lengths: list[int]) -> _Read:
    """Read the first row in pieces of these lengths."""
    past, found, places, at = None, [], [], 0
    for length in lengths:
        logits, past = decoder.forward(ids[:1, at : at + length].numpy(), None, past)
        at += length
        found.append(torch.from_numpy(logits[0]))
        places += [(0, place) for place in range(at - logits.shape[1], at)]
    return torch.cat(found), places


def _padded(decoder: OnnxDecoder, ids: torch.Tensor) -> _Read:
    """Read both rows at once, the second cut to three fifths, then one more token of each."""
    length = ids.shape[1] - 2
    counts = [length, 3 * length // 5]
    mask = np.zeros((2, length), np.int64)
    for row, count in enumerate(counts):
        mask[row, :count] = 1
    logits, past = decoder.forward(ids[:, :length].numpy() * mask, mask)
    # The next token of each row follows the last token of that row, not the padding.
    following = np.stack([ids[row, count].numpy() for row, count in enumerate(counts)])[:, None]
    after, _ = decoder.forward(following, np.concatenate([mask, np.ones((2, 1), np.int64)], 1), past)
    found = [np.concatenate([logits[row, :count], after[row]]) for row, count in enumerate(counts)]
    places = [(row, place) for row, count in enumerate(counts) for place in range(count + 1)]
    return torch.from_numpy(np.concatenate(found)), places


def _distance(case: str, read: _Read, expected: torch.Tensor, ids: torch.Tensor) -> Parity:
    """Compare logits with the ``expected`` ones (2, t, v) at their places."""
    logits, places = read
    difference = scale = 0.0
    same, kl, nll_torch, nll_onnx, squares = (torch.zeros((), dtype=torch.float64) for _ in range(5))
    for start in range(0, len(places), _ROWS):
        some, ours = places[start : start + _ROWS], logits[start : start + _ROWS]
        theirs = torch.stack([expected[row, place] for row, place in some])
        following = torch.tensor([int(ids[row, place + 1]) for row, place in some])
        # Unlike torch.maximum, max() of Python may drop a NaN.
        difference = float(torch.maximum((ours - theirs).abs().max(), torch.tensor(difference)))
        scale = float(torch.maximum(theirs.abs().max(), torch.tensor(scale)))
        same += (ours.argmax(-1) == theirs.argmax(-1)).double().sum()
        kl += divergence(theirs, ours)[0].sum()
        nll, ours_nll = token_nll(theirs, following), token_nll(ours, following)
        nll_torch += nll.sum()
        nll_onnx += ours_nll.sum()
        squares += (nll - ours_nll).square().sum()
    tokens = len(places)
    mean = float(nll_onnx - nll_torch) / tokens
    # A NaN makes every comparison with a tolerance fail, as it should.
    variance = max(0.0, float(squares) / tokens - mean**2)
    return Parity(
        case=case,
        tokens=tokens,
        difference=difference,
        scale=scale,
        agreement=float(same) / tokens,
        kl=float(kl) / tokens,
        nll_torch=float(nll_torch) / tokens,
        nll_onnx=float(nll_onnx) / tokens,
        nll_stderr=(variance / tokens) ** 0.5,
    )
