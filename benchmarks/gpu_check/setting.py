"""What a check gets: where to compute, on which model, and how much."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

Device = Literal["cuda", "cpu"]


class Sizes(BaseModel):
    """How much the checks compute.

    Attributes:
        exclude: shell patterns of the layers that stay dense.
        samples: calibration windows of every stage.
        held_out: windows to choose by, and as many to judge by.
        windows: windows of the evaluation text.
        seq_len: tokens per window.
        steps: of the training of ranks, and of distillation.
        new_tokens: that exported graphs generate.
        shapes: whose layers are timed; one of :data:`benchmarks.shapes.SHAPES`.
        prefill, decode: lengths of prompts, and of contexts that one token follows.
        batches: rows at once.
        rounds: measurements per model and case.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    exclude: tuple[str, ...] = ()
    samples: int
    held_out: int
    windows: int
    seq_len: int
    steps: int
    new_tokens: int
    shapes: str
    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int


class Setting(BaseModel):
    """Where and on what the checks run.

    Attributes:
        device: that is compared with the CPU; ``cpu`` in a rehearsal.
        model: to compress, as ``ara decompose`` takes it.
        text: to calibrate and to evaluate with.
        workspace: folder for files; what one check has made there, later ones use.
        sizes: how much is computed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Device
    model: str
    text: str = "python-docs"
    workspace: Path
    sizes: Sizes


# SmolLM2-135M: blocks 0, 10 and 20 are factorised. The CPU computes the same, and takes most of the time.
FULL = Sizes(
    exclude=("model.layers.*[1-9].*",),
    samples=8,
    held_out=4,
    windows=4,
    seq_len=128,
    steps=2,
    new_tokens=32,
    shapes="llama-7b",
    prefill=(512, 2048),
    decode=(512, 2048),
    batches=(1, 16),
    rounds=9,
)
REHEARSAL = Sizes(
    samples=8,
    held_out=4,
    windows=4,
    seq_len=48,
    steps=2,
    new_tokens=12,
    shapes="tiny",
    prefill=(32,),
    decode=(32,),
    batches=(1,),
    rounds=3,
)
