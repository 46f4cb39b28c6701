"""The registry of export targets: the runtimes that checkpoints are exported for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ara.bounds import shown
from ara.errors import ProblemsError
from ara.registry import Entry, Registry

if TYPE_CHECKING:
    from export.base import Target

TORCH = "torch"
TARGETS = Registry(
    "export target",
    [
        Entry("onnx", "an ONNX graph for ONNX Runtime and ONNX Runtime GenAI", "export.onnx.target:OnnxTarget"),
    ],
)


def load_target(name: str) -> Target:
    """Return the export target called ``name``.

    Raises:
        UsageError: there is none.
    """
    target: Target = TARGETS.load(name)()
    return target


def backends() -> list[str]:
    """Return what ``--backend`` accepts: torch, which runs the checkpoint itself, and every export target."""
    return [TORCH, *TARGETS.names()]


def target_of(backend: str) -> Target | None:
    """Return the export target that ``--backend`` names; ``None`` for torch.

    Raises:
        ProblemsError: an unknown backend.
    """
    if backend == TORCH:
        return None
    if backend not in TARGETS:
        *most, last = (repr(name) for name in backends())
        problem = f"backend: input should be {', '.join(most)} or {last}, got {shown(backend)}"
        raise ProblemsError("these settings cannot be used", [problem])
    return load_target(backend)
