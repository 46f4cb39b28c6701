"""The registries of runtimes: export targets, and those that read the checkpoints themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ara.bounds import shown
from ara.errors import ProblemsError
from ara.registry import Entry, Registry

if TYPE_CHECKING:
    from ara.evaluation.runtime import Runtime
    from export.base import Target

TORCH = "torch"
TARGETS = Registry(
    "export target",
    [
        Entry("onnx", "an ONNX graph for ONNX Runtime and ONNX Runtime GenAI", "export.onnx.target:OnnxTarget"),
    ],
)
# Runtimes that measure checkpoint folders without an export.
RUNTIMES = Registry(
    "runtime", [Entry("vllm", "vLLM, through lm-eval's own model of it", "export.vllm.runtime:VllmRuntime")]
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


def measuring_backends() -> list[str]:
    """Return what ``--backend`` of ``ara eval`` and ``ara bench`` accepts: targets and runtimes."""
    return [*backends(), *RUNTIMES.names()]


def runtime_of(backend: str) -> Runtime | None:
    """Return the runtime that ``--backend`` names; ``None`` if it names another backend."""
    if backend not in RUNTIMES:
        return None
    runtime: Runtime = RUNTIMES.load(backend)()
    return runtime


def target_of(backend: str, known: Sequence[str] | None = None, option: str = "backend") -> Target | None:
    """Return the export target that ``--backend`` names; ``None`` for torch.

    Args:
        backend: the value of the option.
        known: all values that the command accepts; those of :func:`backends` by default.
        option: the setting, for the error.

    Raises:
        ProblemsError: an unknown backend.
    """
    if backend == TORCH:
        return None
    if backend not in TARGETS:
        *most, last = (repr(name) for name in known or backends())
        problem = f"{option}: input should be {', '.join(most)} or {last}, got {shown(backend)}"
        raise ProblemsError("these settings cannot be used", [problem])
    return load_target(backend)
