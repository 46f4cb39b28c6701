"""Log-softmax sums that are exact on every processor.

    ln Z     = ln Σ_v exp z_v                                     log-normaliser of a row of logits z
    NLL      = ln Z − z_x                                         of the token x, nats
    KL(q‖p)  = Σ_v q_v (z^q_v − z^p_v) − ln Z^q + ln Z^p          nats

torch's float32 log-softmax adds the whole vocabulary in float32. Its error depends on the vector instructions of the
processor: with AVX2 and 49,152 tokens the bias was 2·10⁻⁵ nats per token. Here exponentials and sums of
:data:`_BLOCK` of them are float32, and all further sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ara.models.scores import Head, Scores, Whole
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Terms that are added in float32: few enough that the error is about one rounding.
_BLOCK = 256
# Bytes of float32 logits per chunk of rows. Several passes read a chunk: on a CPU it should stay in a core's cache,
# elsewhere it should keep the device busy.
CHUNK_BYTES, CPU_CHUNK_BYTES = 64 * 2**20, 2 * 2**20


def chunk_rows(logits: torch.Tensor) -> int:
    """Return how many rows of ``logits`` (..., v) are worked on at once, in float32."""
    size = CPU_CHUNK_BYTES if logits.device.type == "cpu" else CHUNK_BYTES
    return max(1, size // (4 * logits.shape[-1]))


def wide_sum(terms: torch.Tensor) -> torch.Tensor:
    """Return the sums of ``terms`` (rows, v) float32 over their last dimension: (rows), see :func:`wide`."""
    width = terms.shape[-1]
    whole = width - width % _BLOCK
    blocks = terms[..., :whole].unflatten(-1, (-1, _BLOCK)).sum(-1)
    return blocks.to(wide(terms)).sum(-1) + terms[..., whole:].to(wide(terms)).sum(-1)


def wide(tensor: torch.Tensor) -> torch.dtype:
    """Return float64, or float32 if the device of ``tensor`` has no float64 (Apple's GPUs)."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities and log-normalisers of rows of logits.

    Args:
        logits: (rows, v), any floating dtype; not changed.

    Returns:
        (rows, v) float32 probabilities, and (rows) ln Z, see :func:`wide`; NaN where a logit is.
    """
    scores = logits.float()
    greatest = scores.amax(-1, keepdim=True)
    shares = (scores - greatest).exp_()
    total = wide_sum(shares)
    return shares.div_(total.unsqueeze(-1).to(shares.dtype)), total.log() + greatest.squeeze(-1)


def log_normaliser(logits: torch.Tensor) -> torch.Tensor:
    """Return ln Z of rows of logits (rows, v): (rows), see :func:`wide`."""
    scores = logits.float()
    greatest = scores.amax(-1, keepdim=True)
    return wide_sum((scores - greatest).exp_()).log() + greatest.squeeze(-1)


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of one token per row.

    Args:
        logits: (rows, v), any floating dtype.
        targets: (rows) int64.

    Returns:
        (rows), nats, see :func:`wide`; NaN where a logit is.
    """
    return log_normaliser(logits) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def window_nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of each window.

    Float32 copies exist of :func:`chunk_rows` rows only.

    Args:
        logits: (b, t, v), any floating dtype; position i predicts token i + 1.
        ids: (b, t) int64 token ids, on the same device.

    Returns:
        (b,) float64 on the CPU, nats per predicted token; NaN where a logit is.
    """
    return scores_nll(Whole(logits), ids)


def scores_nll(scores: Scores, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of each window; see :func:`window_nll`.

    Args:
        scores: of one batch; without gradients.
        ids: (b, t) int64 token ids, on the same device.
    """
    # On the CPU: Apple GPUs have no float64.
    total = torch.zeros(len(ids), dtype=torch.float64)
    for logits, place in scores.chunks():
        total[place.windows] += summed_nll(logits, place.of(ids[:, 1:]))
    return total / (ids.shape[1] - 1)


def summed_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed negative log-likelihood of the tokens ``targets`` (b, n) of each window: (b) float64.

    Args:
        logits: (b, n, v), any floating dtype.
        targets: (b, n) int64, on the same device.
    """
    (batch, length), rows = targets.shape, chunk_rows(logits)
    total = torch.zeros(batch, dtype=torch.float64)
    for window in range(batch):
        for start in range(0, length, rows):
            end = min(start + rows, length)
            losses = token_nll(logits[window, start:end], targets[window, start:end])
            total[window] += losses.cpu().sum(dtype=torch.float64)
    return total


def nll_of_windows(
    score: Callable[[torch.Tensor], Scores],
    windows: torch.Tensor,
    device: torch.device,
    batch_size: int,
    report: Reporter = SILENT,
    label: str = "",
) -> torch.Tensor:
    """Return the mean negative log-likelihood of each window; call it without gradients.

    Args:
        score: token ids (b, t) int64 on ``device`` → their scores.
        windows: (w, t) int64.
        device: of the model.
        batch_size: windows per call.
        report: shows a progress bar if ``label`` is given.
        label: of the bar.

    Returns:
        (w) float64 on the CPU, nats per predicted token; may be NaN.
    """
    found = []
    with (report if label else SILENT).bar(label, len(windows)) as bar:
        for batch in windows.split(batch_size):
            ids = batch.to(device)
            found.append(scores_nll(score(ids), ids))
            bar.advance(len(batch))
    return torch.cat(found)


@torch.inference_mode()
def nll_of_model(
    model: PreTrainedModel, windows: torch.Tensor, batch_size: int, report: Reporter = SILENT
) -> torch.Tensor:
    """Return the mean negative log-likelihood of each window of held-out text, with a progress bar.

    Args:
        model: a causal language model.
        windows: (w, t) int64.
        batch_size: windows per pass.
        report: shows the bar.

    Returns:
        (w) float64 on the CPU, nats per predicted token; may be NaN.
    """
    return nll_of_windows(Head(model).scores, windows, model.device, batch_size, report, "Reading held-out text")


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return KL(reference ‖ model) of every row, and both distributions.

    Args:
        reference: (rows, v) logits of q, over which the mean is taken.
        logits: (rows, v) logits of p, on the same device.

    Returns:
        (rows) KL in nats, see :func:`wide`; NaN where a logit is, infinite where p excludes a token that q does not.
        Then q and p, (rows, v) float32.
    """
    (q, ln_q), (p, ln_p) = softmax(reference), softmax(logits)
    # A token with q = 0 adds nothing, whatever p is: 0 · ln 0 = 0.
    terms = (q * (reference.float() - logits.float())).masked_fill_(q == 0, 0)
    # Division by Σ q, which is 1 up to rounding, cancels a common offset of all logits exactly.
    return wide_sum(terms) / wide_sum(q) - ln_q + ln_p, q, p
