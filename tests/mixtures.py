"""A mixture of experts at keep 0.7 with trained ranks, and what its checkpoint must compute."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ara.artifacts.factors import FactorsResults
from ara.config import AllocateConfig, DecomposeConfig, TrainMasksConfig, TruncateConfig
from ara.models.sources import resolve
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.train_masks import train_masks
from ara.stages.truncate import truncate
from ara.workspace.view import StageView
from tests.recorder import Recorder
from tests.tiny import save_tiny

CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
IDS = torch.arange(3, 3 + 2 * 37).view(2, 37)


@dataclass
class Made:
    """A family, its workspace at keep 0.7, what was said, and the results."""

    family: str
    root: Path
    report: Recorder
    factors: StageView
    ranks: StageView
    checkpoint: StageView

    @property
    def model(self) -> str:
        """Folder of the dense model."""
        return str(self.root.parent / "model")

    @property
    def low_rank(self) -> dict[str, int]:
        """Layer → rank of the low-rank layers."""
        ranks = json.loads((self.ranks.path / "ranks.json").read_text())["ranks"]
        return {name: rank for name, rank in ranks.items() if rank != "dense"}


def make_mixture(folder: Path, family: str, text: str, share_experts: bool = False, check: bool = False) -> Made:
    """Decompose a tiny model of ``family``, train its ranks and truncate it, in ``folder``."""
    model, report = save_tiny(folder / "model", family), Recorder()
    run = Run(folder / "ws", report=report)
    settings = {"text": text, "samples": 12, "seq_len": 32, "share_experts": share_experts}
    factors = decompose(DecomposeConfig(model=str(model), **settings, **CPU), run)
    train_masks(TrainMasksConfig(keep=(0.7,), steps=2, **CPU), run)
    ranks = allocate(AllocateConfig(keep=0.7, method="ara", guard=False, **CPU), run)
    checkpoint = truncate(TruncateConfig(check=check), run)
    return Made(family, folder / "ws", report, factors, ranks, checkpoint)


def logits(model: Any) -> torch.Tensor:
    """Return the logits of a model on fixed tokens."""
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def first_components(made: Made, share_experts: bool = False) -> Any:
    """Return the dense model with the weights that the first components of the low-rank layers give."""
    model = resolve(made.model).with_experts(share_experts).load_model(torch.float32)
    ranks = made.low_rank
    for layer in FactorsResults.read(made.factors).modules:
        if (rank := ranks.get(layer.name)) is not None:
            with safe_open(made.factors.path / f"layer-{layer.layer:03d}.safetensors", "pt") as file:
                a, b = (file.get_tensor(f"{layer.name}.{part}") for part in "AB")
            with torch.no_grad():
                model.get_submodule(layer.name).weight.copy_(b[:, :rank] @ a[:rank])
    return model
