"""``ara export``: registered with its folder and config; the exporter arrives with ONNX."""

from __future__ import annotations

from ara.errors import UnavailableError
from ara.stage_view import StageView
from ara.stages.common import Run
from export.config import ExportConfig


def export(config: ExportConfig, run: Run, *, checkpoint: str | None = None) -> StageView:
    """Refuse politely.

    Raises:
        UnavailableError: always, for now.
    """
    raise UnavailableError(
        f"ara export --{config.target} is not there yet: it arrives with ONNX",
        "until then the checkpoint of ara truncate loads in transformers",
    )
