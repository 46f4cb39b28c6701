"""``ara truncate --check``: at full rank the low-rank layers must compute what the dense model computes.

A family may use the weight of a layer in a way that nobody foresaw. Then a low-rank layer in its place gives another
model, and no error. So one block of each kind gets factors of full rank, and the model answers two prompts with and
without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ara.errors import ModelError, UsageError
from ara.models.loading import forward_errors
from ara.models.losses import token_losses
from ara.models.low_rank import apply_factors
from ara.models.sources import ModelSource
from ara.models.weights import LinearSpec, by_block
from ara.progress import Reporter

# Largest divergence that rounding explains, nats per token, by bytes of a number.
_TOLERANCE = {2: 0.02, 4: 1e-5, 8: 1e-5}
PROMPTS = (
    "The harbour was quiet in the morning, and only two boats had left before the fog came down over the water.",
    "def mean(values):\n    total = sum(values)\n    return total / len(values)\n",
)


def check_full_rank(
    source: ModelSource, specs: Sequence[LinearSpec], files: Mapping[str, Path], dtype: torch.dtype, report: Reporter
) -> float:
    """Compare the dense model with one that has factors of full rank in one block of each kind, on a CPU.

    Args:
        source: the dense model.
        specs: its factorised layers.
        files: module path → file with its factors.
        dtype: of both models.
        report: says what was found.

    Returns:
        The larger of the prompts' mean divergences, nats per token.

    Raises:
        UsageError: no factors of full rank are stored.
        ModelError: the models differ by more than rounding explains.
    """
    whole = [spec for spec in specs if spec.stored_rank == spec.full_rank]
    if not whole:
        raise UsageError(
            "the check needs factors of full rank, and none are stored (--max-keep)",
            "leave out --check, or decompose without --max-keep",
        )
    kinds = {tuple(spec.kind for spec in block): block for block in reversed(by_block(whole))}
    blocks = sorted(kinds.values(), key=lambda block: block[0].layer)
    numbers = ", ".join(str(block[0].layer + 1) for block in blocks)
    tokenizer = source.load_tokenizer()
    ids = [torch.tensor(tokenizer(prompt)["input_ids"])[None] for prompt in PROMPTS]
    model = source.load_model(dtype)
    with torch.inference_mode(), forward_errors(model):
        dense = [model(input_ids=one, use_cache=False).logits for one in ids]
        apply_factors(model, {spec.name: spec.full_rank for block in blocks for spec in block}, files)
        factored = [model(input_ids=one, use_cache=False).logits for one in ids]
        found = max(
            float(token_losses(logits, one, teacher).mean())
            for logits, one, teacher in zip(factored, ids, dense, strict=True)
        )
    allowed = _TOLERANCE[dtype.itemsize]
    if not found <= allowed:
        raise ModelError(
            f"factors of full rank in block {numbers} change the model: {found:.2g} nats per token on two prompts, "
            f"{allowed:g} are explained by rounding",
            "low-rank layers do not fit this family; --exclude may leave out the layers that differ",
        )
    report.fact(f"full rank in block {numbers}: {found:.2g} nats per token from the dense model")
    return found
