"""How much the loss grows when the components of a layer from rank k on are removed: one backward pass for all ranks.

With h = A x and q = Bᵀ g as in :mod:`ara.masks.linear`, removing component j changes the loss through token t by
d_tj = h_tj q_tj to first order, and removing all from rank k on by the tail sum T_t(k) = Σ_{j ≥ k} d_tj. Its mean
square is the Fisher information along that removal, so that

    loss(k) ≈ ½ Σ_t T_t(k)²        per predicted token, nats

(for gradients against targets drawn from the model; see :func:`ara.models.losses.sampled_targets`). Where
``per_window``, T is summed over the tokens of a window before it is squared, which is the exact Fisher information
of the window but has far fewer terms to average over.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from ara.config import MethodOptions
from ara.masks.context import TuningContext
from ara.masks.linear import Observer
from ara.masks.model import LossKind, MaskedModel
from ara.masks.table_cache import SensitivityTable, timed
from ara.progress import SILENT, Reporter


class SensitivityOptions(MethodOptions):
    """Options of the sensitivity table."""

    targets: Literal["model", "text"] = Field(
        "model", description="gradients of the loss against tokens drawn from the model (Fisher) or the text's own"
    )
    sums: Literal["token", "window"] = Field("token", description="square effects per token, or summed per window")


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
    """Return for every layer the estimated loss of every rank, at the model's present cut.

    Args:
        model: usually dense.
        windows: (w, t) int64.
        loss: which gradients: against drawn targets (``fisher``) or the text (``ce``).
        per_window: see the module's text.
        batch_size: windows per pass.
        seed: of the drawing.
        report: progress.

    Returns:
        Module path → (r + 1) float64: entry k is the loss of keeping k components, nats per token; entry r is 0.
    """
    # Apple's GPUs have no float64.
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
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    return {
        name: torch.cat([values.cpu().double() / (2 * predicted), torch.zeros(1, dtype=torch.float64)])
        for name, values in sums.items()
    }


def sensitivity_of(context: TuningContext, options: SensitivityOptions) -> SensitivityTable:
    """Return the table of the dense model, that of ``context.table_cache`` if there is one."""

    def make() -> dict[str, torch.Tensor]:
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

    if context.table_cache is None:
        return timed(make)
    settings: dict[str, str | int] = {
        **options.model_dump(),
        "batch_size": context.batch_size,
        "seed": context.seed,
        "device": str(context.model.device),
        "dtype": str(context.model.model.dtype),
    }
    sizes = {spec.name: spec.full_rank + 1 for spec in context.model.specs}
    return context.table_cache.get(context.train, settings, sizes, lambda: timed(make))
