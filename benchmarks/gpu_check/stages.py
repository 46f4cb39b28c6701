"""The stages on the device and on the CPU: the same ranks, losses and perplexities, within a tolerance.

Both run the whole chain in float32, each on its own factors. A GPU adds numbers in another order. So a token that the
two-sided method draws from the model's predictions may rarely be another one, and a training may move a few ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ara.artifacts.checkpoint import CheckpointResults
from ara.artifacts.evaluation import EvaluationResults
from ara.artifacts.training import TrainingResults
from ara.config import AllocateConfig, DecomposeConfig, EvalConfig, RecoverConfig, TrainMasksConfig, TruncateConfig
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.evaluate import evaluate
from ara.stages.modules import load_modules
from ara.stages.recover import recover
from ara.stages.train_masks import train_masks
from ara.stages.truncate import truncate
from ara.workspace.view import StageView
from benchmarks.gpu_check.outcome import Notes
from benchmarks.gpu_check.setting import Setting

KEEP = 0.8


@dataclass(frozen=True)
class Tolerance:
    """How much two devices may differ.

    Attributes:
        spectrum: a value, as a share of the largest one of its layer.
        ranks: ranks that are moved, as a share of all ranks.
        loss: a loss on held-out text, nats per token.
        repaired: a divergence after a repair, as a share of the one before.
        perplexity: as a share.
    """

    spectrum: float = 1e-2
    ranks: float = 2e-2
    loss: float = 1e-2
    repaired: float = 5e-2
    perplexity: float = 1e-2


@dataclass(frozen=True)
class Compressed:
    """What the stages found on one device.

    Attributes:
        spectra: layer → spectrum (r) float64.
        ranks: layer → trained rank; the full rank if it stays dense.
        training_loss: of the trained ranks, on held-out text.
        repaired: level of recovery → divergence from the dense model before and after it.
        perplexities: model → perplexity of the evaluation text.
    """

    spectra: Mapping[str, torch.Tensor]
    ranks: Mapping[str, int]
    training_loss: float
    repaired: Mapping[str, tuple[float, float]]
    perplexities: Mapping[str, float]


def stages(setting: Setting, notes: Notes) -> None:
    """Run the stages on the CPU and on the device, and compare what they found."""
    expected = compress(setting, "cpu", "reference")
    compare(compress(setting, setting.device, "device"), expected, Tolerance(), notes)


def compress(setting: Setting, device: str, name: str) -> Compressed:
    """Run all stages in float32.

    Args:
        setting: model, text, sizes.
        device: where to run.
        name: of the workspace.
    """
    sizes, run = setting.sizes, Run(setting.workspace / name)
    placed = {"device": device, "dtype": "float32"}
    windows = {"samples": sizes.samples, "held_out": sizes.held_out, **placed}
    factors = decompose(
        DecomposeConfig(
            model=setting.model,
            text=setting.text,
            samples=sizes.samples,
            seq_len=sizes.seq_len,
            exclude=sizes.exclude,
            **placed,
        ),
        run,
    )
    training = train_masks(TrainMasksConfig(keep=(KEEP,), steps=sizes.steps, batch=4, check_every=1, **windows), run)
    allocate(AllocateConfig(keep=KEEP, method="ara", **windows), run)
    truncated = truncate(TruncateConfig(), run)
    levels = {
        "closed": RecoverConfig(level="closed", **windows),
        "distill": RecoverConfig(level="distill", only=True, steps=sizes.steps, batch=4, check_every=1, **windows),
    }
    repaired = {level: recover(config, run, checkpoint=truncated.key) for level, config in levels.items()}
    asked = {"tasks": (setting.text,), "seq_len": sizes.seq_len, "max_windows": sizes.windows, "continuations": 0}
    measured = evaluate(EvalConfig(**asked, **placed), run, checkpoint=repaired["closed"].key)
    modules = load_modules(factors)
    budget = TrainingResults.read(training).budgets[f"{KEEP:g}"]
    return Compressed(
        {module.spec.name: module.spectrum for module in modules},
        {
            module.spec.name: module.spec.full_rank if (rank := budget.ranks[module.spec.name]) == "dense" else rank
            for module in modules
        },
        budget.held_out,
        {level: _divergences(view) for level, view in repaired.items()},
        {name: row.perplexity for name, row in EvaluationResults.read(measured).texts[setting.text].models.items()},
    )


def _divergences(view: StageView) -> tuple[float, float]:
    """Return the divergence from the dense model before and after a recovery, nats per token."""
    recovery = CheckpointResults.read(view).recovery
    assert recovery is not None
    return recovery.before, recovery.after


def compare(found: Compressed, expected: Compressed, tolerance: Tolerance, notes: Notes) -> None:
    """Note how much two devices differ; see :class:`Tolerance`."""
    notes.require("factorised layers", len(found.spectra), len(expected.spectra))
    shares = [(found.spectra[name] - theirs).abs().max() / theirs.max() for name, theirs in expected.spectra.items()]
    # Unlike max() of Python, this keeps a NaN.
    notes.within("spectra", float(torch.stack(shares).max()), tolerance.spectrum)
    moved = sum(abs(found.ranks[name] - rank) for name, rank in expected.ranks.items())
    notes.within("trained ranks", moved / sum(expected.ranks.values()), tolerance.ranks)
    notes.within("loss of trained ranks", abs(found.training_loss - expected.training_loss), tolerance.loss)
    for level, (before, after) in expected.repaired.items():
        ours_before, ours_after = found.repaired[level]
        notes.within(f"divergence before {level}", abs(ours_before / before - 1), tolerance.repaired)
        notes.within(f"divergence after {level}", abs(ours_after - after) / before, tolerance.repaired)
    for name, perplexity in expected.perplexities.items():
        notes.keep(f"perplexities of {name}", {"device": found.perplexities[name], "cpu": perplexity})
        notes.within(f"perplexity of {name}", abs(found.perplexities[name] / perplexity - 1), tolerance.perplexity)
