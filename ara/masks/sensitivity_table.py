"""The sensitivity table: the estimated loss of every rank of every layer, from one backward pass per window.

Let h = A x and q = Bᵀ g as in :mod:`ara.masks.linear`. To first order, removing component j changes the loss through
token t by d_tj = h_tj q_tj, and removing all components from k on by the tail sum T_t(k) = Σ_{j ≥ k} d_tj. Its mean
square is the Fisher information in the direction of the removal, so that

    loss(k) ≈ ½ Σ_t T_t(k)²        per predicted token, nats

for gradients against targets sampled from the model (:func:`ara.models.losses.sampled_targets`). With ``per_window``,
T is summed over the tokens of a window before it is squared. This is the exact Fisher information of the window, but
an average over far fewer terms.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ara.config import MethodOptions
from ara.masks.context import TuningContext
from ara.masks.linear import Observer
from ara.masks.model import LossKind, MaskedModel
from ara.masks.table_cache import LayerTable
from ara.progress import SILENT, Reporter


class SensitivityOptions(MethodOptions):
    """Options of the sensitivity table."""

    targets: Literal["model", "text"] = Field(
        "model", description="gradients of the loss of tokens sampled from the model (Fisher), or of the text"
    )
    sums: Literal["token", "window"] = Field(
        "token", description="square the effects per token, or their sums per window"
    )


def sensitivity_tables(
    model: MaskedModel,
    windows: torch.Tensor,
    *,
    loss: LossKind = "fisher",
    per_window: bool = False,
    batch_size: int = 4,
    seed: int = 0,
    report: Reporter = SILENT,
) -> dict[str, torch.Tensor]:
    """Return the estimated loss of every rank of every layer, at the model's current cut.

    Args:
        model: usually dense.
        windows: (w, t) int64.
        loss: gradients against sampled targets (``fisher``) or the text (``ce``).
        per_window: see the module's docstring.
        batch_size: windows per pass.
        seed: of the sampling.
        report: progress.

    Returns:
        Module path → (r + 1) float64: entry k is the loss of keeping k components, nats per token; entry r is 0.
    """
    # Apple GPUs have no float64.
    wide = torch.float32 if model.device.type == "mps" else torch.float64
    sums = {spec.name: torch.zeros(spec.full_rank, dtype=wide, device=model.device) for spec in model.specs}

    def observer(name: str) -> Observer:
        def observe(effect: torch.Tensor) -> None:
            effect = effect.float()
            if per_window:
                effect = effect.view(-1, windows.shape[1], effect.shape[-1]).sum(1)
            tails = effect.flip(1).cumsum(1).flip(1)
            sums[name] += tails.square_().sum(0, dtype=wide)

        return observe

    with model.listening({name: observer(name) for name in sums}):
        model.backward(windows, loss, batch_size, seed, report=report, label="Reading sensitivities")
    totals = {name: values.cpu() for name, values in sums.items()}
    model.group.total(list(totals.values()))
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    return {
        name: torch.cat([values.double() / (2 * predicted), torch.zeros(1, dtype=torch.float64)])
        for name, values in totals.items()
    }


def sensitivity_table(context: TuningContext, options: SensitivityOptions | None = None) -> LayerTable:
    """Return the table of the dense model, from the cache of the context if it is there.

    Its entries are those of :func:`sensitivity_tables`.
    """
    options = options or SensitivityOptions()

    def compute() -> dict[str, torch.Tensor]:
        context.model.use_dense()
        return sensitivity_tables(
            context.model,
            context.train,
            loss="fisher" if options.targets == "model" else "ce",
            per_window=options.sums == "window",
            batch_size=context.batch_size,
            seed=context.seed,
            report=context.report,
        )

    sizes = {spec.name: spec.full_rank + 1 for spec in context.model.specs}
    return context.cached_table(options.model_dump(), sizes, compute)
