"""Speed of layers of LLaMA-7B's shape: dense against keep 0.8 and 0.6, in both layouts, in torch and ONNX Runtime.

Two blocks with random weights, in float16. A ratio has no tolerance: it is measured, beside what arithmetic predicts.
Only the logits of the last position are computed: those of a long prompt would take time to copy from the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ara.evaluation.cost import Case
from ara.evaluation.speed import Runner, interleaved_seconds
from ara.layout_names import LAYOUT_NAMES
from ara.stages.common import Run
from benchmarks.gpu_check.graphs import PRECISION
from benchmarks.gpu_check.outcome import Notes
from benchmarks.gpu_check.setting import Setting
from benchmarks.inference import compared, onnx_runner, torch_runner
from benchmarks.shapes import compressed_folder, dense_folder

KEEPS = (0.8, 0.6)
DTYPE = "float16"


def in_torch(setting: Setting, notes: Notes) -> None:
    """Time all models in torch."""
    runners = {
        f"torch, {name}": torch_runner(path, setting.device, DTYPE, last_logits=True)
        for name, path in _folders(setting).items()
    }
    _measure(runners, setting, notes)


def in_onnx(setting: Setting, notes: Notes) -> None:
    """Export all models, and time them in ONNX Runtime."""
    run, runners = Run(setting.workspace), {}
    for name, path in _folders(setting).items():
        output = setting.workspace / "speed-graphs" / path.name
        runners[f"ONNX {PRECISION}, {name}"] = onnx_runner(
            path, output, PRECISION, run, provider=setting.device, last_logits=True
        )
    _measure(runners, setting, notes)


def _folders(setting: Setting) -> dict[str, Path]:
    """Return name → checkpoint; each is made if it does not exist."""
    workspace, shapes = setting.workspace / "shapes", setting.sizes.shapes
    run = Run(workspace / "ws")
    dense = dense_folder(workspace, shapes, DTYPE)
    found = {"dense": dense}
    for keep in KEEPS:
        for layout in LAYOUT_NAMES:
            found[f"keep {keep:g}, {layout}"] = compressed_folder(workspace, shapes, run, dense, keep, layout)
    return found


def _measure(runners: Mapping[str, Runner], setting: Setting, notes: Notes) -> None:
    """Time all models in all cases; what is finished is kept if the check is stopped."""
    sizes = setting.sizes
    cases = [Case(batch, 0, new) for new in sizes.prefill for batch in sizes.batches]
    cases += [Case(batch, past, 1) for past in sizes.decode for batch in sizes.batches]
    rows = []
    for case in cases:
        found = compared(case, runners, interleaved_seconds(runners, case, sizes.rounds))
        rows += [asdict(row) for row in found]
        notes.keep("rows", rows)
    notes.detail = f"{len(runners)} models in {len(cases)} cases"
