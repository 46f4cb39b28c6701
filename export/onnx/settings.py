"""Decides the execution provider and the precision of an export."""

from __future__ import annotations

import onnxruntime as ort
import torch

from ara.errors import UnavailableError, UsageError
from export.config import ExportConfig
from export.onnx.export_report import Precision, Provider
from export.onnx.runner import PROVIDERS

_BLOCKED_INT4 = (
    "an export does not round to 4 bits: without calibration, errors add up over two factors (SmolLM2-135M at keep "
    "0.8: NLL 3.11 → 3.80; dense weights: 2.48 → 2.70)"
)


def resolve(config: ExportConfig, *, rounded: bool = False) -> ExportConfig:
    """Return the config with provider and precision decided.

    Args:
        config: as the user gave it.
        rounded: whether the checkpoint has matrices of few bits.

    Raises:
        UnavailableError: CUDA was asked for and this ONNX Runtime lacks it; int4 of a checkpoint that is not rounded.
        UsageError: a combination that ONNX Runtime cannot run.
    """
    provider = config.execution_provider
    if provider == "auto":
        there = torch.cuda.is_available() and PROVIDERS["cuda"] in ort.get_available_providers()
        provider = "cuda" if there else "cpu"
    if provider == "cuda" and PROVIDERS["cuda"] not in ort.get_available_providers():
        raise UnavailableError(
            f"this ONNX Runtime has no {PROVIDERS['cuda']}", "install onnxruntime-gpu, or use --execution-provider cpu"
        )
    precision = config.precision or _default(config, provider, rounded)
    if precision == "int4":
        if not rounded:
            raise UnavailableError(_BLOCKED_INT4, "run ara quantise --bits 4 first, and export its checkpoint")
        # Matrices of few bits keep them in every precision.
        precision = "fp16" if provider == "cuda" else "int8"
    if config.rewrite is not None and (config.merge_shared_inputs or config.last_logits or config.precision):
        raise UsageError(
            "--rewrite changes nothing but the factors: no --precision, --merge-shared-inputs or --last-logits",
            "leave them out, or leave --rewrite out",
        )
    if (provider, precision) == ("cuda", "fp32"):
        raise UsageError(
            "fused attention of ONNX Runtime has no fp32 on CUDA", "use --precision fp16, or --execution-provider cpu"
        )
    return config.model_copy(update={"execution_provider": provider, "precision": precision})


def _default(config: ExportConfig, provider: Provider, rounded: bool) -> Precision:
    """Return the precision of a config that names none.

    Matrices of few bits are fast and small in int8 alone. It is the default where the comparison with torch sees to it
    that rounded inputs cost little.
    """
    if provider == "cuda":
        return "fp16"
    return "int8" if rounded and config.parity and config.rewrite is None else "fp32"


def provider_of(config: ExportConfig) -> Provider:
    """Return the provider of a resolved config."""
    assert config.execution_provider != "auto", "not resolved"
    return config.execution_provider


def precision_of(config: ExportConfig) -> Precision:
    """Return the precision of a resolved config."""
    assert config.precision is not None and config.precision != "int4", "not resolved"
    return config.precision
