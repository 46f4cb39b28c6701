"""Every runtime that checkpoints are exported for; a new one is its folder and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ara.bounds import shown
from ara.errors import ProblemsError, UsageError
from ara.names import check_name
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


def target_of(backend: str, export: str | None = None) -> Target | None:
    """Return the export target that ``--backend`` names; ``None`` for torch.

    Args:
        backend: torch, or the name of a target.
        export: what ``--export`` names.

    Raises:
        ProblemsError: an unknown backend.
        UsageError: an export is named, and the backend is torch or no result can have that name.
    """
    if backend == TORCH:
        if export is not None:
            others = " or ".join(f"--backend {name}" for name in TARGETS.names())
            raise UsageError(f"--export {export} is given, and --backend is torch", f"add {others}")
        return None
    if backend not in TARGETS:
        *most, last = (repr(name) for name in backends())
        problem = f"backend: input should be {', '.join(most)} or {last}, got {shown(backend)}"
        raise ProblemsError("these settings cannot be used", [problem])
    if export is not None:
        check_name(export)
    return load_target(backend)
