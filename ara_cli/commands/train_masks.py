"""``ara train-masks``."""

from __future__ import annotations

from typing import Annotated

from ara.config import TrainMasksConfig, build
from ara_cli.options import WORKSPACE, JsonOption, QuietOption, WorkspaceOption, default, field
from ara_cli.session import session

_C = TrainMasksConfig


def command(
    seed: Annotated[int, field(_C, "seed")] = default(_C, "seed"),
    device: Annotated[str, field(_C, "device")] = default(_C, "device"),
    dtype: Annotated[str, field(_C, "dtype")] = default(_C, "dtype"),
    workspace: WorkspaceOption = WORKSPACE,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Learn which ranks matter (arrives with learned ranks)."""
    with session(workspace, quiet, as_json) as s:
        config = build(TrainMasksConfig, seed=seed, device=device, dtype=dtype)
        from ara.stages.train_masks import train_masks

        train_masks(config, s.run())
