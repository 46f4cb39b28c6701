"""Translates the rotary embeddings of a GGUF file for transformers: plain, linear, YaRN, Llama 3.1, LongRoPE.

In llama.cpp, linear scaling and YaRN are keys, ``ARCH.rope.scaling.*``. Llama 3.1 and LongRoPE are tensors (d/2) of
divisors of the inverse frequencies: ``rope_freqs.weight``, or ``rope_factors_short.weight`` and
``rope_factors_long.weight``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

from ara.files import open_regular
from ara.models.gguf_header import GgufTensor

FREQUENCIES = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"

_BASE = 10000.0  # default of llama.cpp
_FLOAT32 = 0  # number of the ggml type
# Relative tolerance when settings must reproduce stored factors, which other code computed in float32.
_CLOSE = 1e-5
# All Llama 3.1, 3.2 and 3.3 models have these, 8192 original positions, and a factor of 8 or 32.
_LOW_FREQUENCY_FACTOR, _HIGH_FREQUENCY_FACTOR = 1.0, 4.0

# Makes the error for settings that cannot be read exactly.
Refuse = Callable[[str], Exception]


def rope_parameters(
    keys: Mapping[str, Any], tensors: Mapping[str, GgufTensor], width: int, positions: int, refuse: Refuse
) -> dict[str, Any]:
    """Return transformers' ``rope_parameters``, without the share of rotated dimensions.

    Args:
        keys: of the architecture, without its prefix: ``rope.freq_base`` and so on.
        tensors: name → its place.
        width: rotated dimensions of a head.
        positions: context length of the model.
        refuse: makes the error for settings without a counterpart, from a description of them.

    Raises:
        Exception: from ``refuse``.
    """
    base = keys.get("rope.freq_base", _BASE)
    plain = {"rope_type": "default", "rope_theta": float(base)}
    scaling = _scaling(keys, positions, refuse)
    stored = [name for name in (FREQUENCIES, SHORT, LONG) if name in tensors]
    if not stored:
        return plain | scaling
    if scaling:
        raise refuse(f"rope.scaling.type = {scaling['rope_type']!r} together with {stored[0]}")
    factors = {name: _read_factors(tensors[name], width // 2, refuse) for name in stored}
    if stored == [FREQUENCIES]:
        return plain | _of_frequencies(factors[FREQUENCIES], float(base), positions)
    if stored != [SHORT, LONG]:
        raise refuse(f"only {', '.join(stored)} of {SHORT}, {LONG} and {FREQUENCIES}")
    if "rope.scaling.attn_factor" not in keys:
        raise refuse(f"{SHORT} without rope.scaling.attn_factor")
    return plain | {
        "rope_type": "longrope",
        "short_factor": factors[SHORT],
        "long_factor": factors[LONG],
        "attention_factor": float(keys["rope.scaling.attn_factor"]),
        "original_max_position_embeddings": keys.get("rope.scaling.original_context_length", positions),
    }


def _scaling(keys: Mapping[str, Any], positions: int, refuse: Refuse) -> dict[str, Any]:
    """Return the settings of ``rope.scaling.*``, in addition to those of plain embeddings."""
    # As in llama.cpp: the default type is linear, an older key replaces a missing newer one, and a factor of 0 is none.
    kind = keys.get("rope.scaling.type", "linear")
    factor = float(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0)) or 1.0)
    if factor < 0 or not math.isfinite(factor):
        raise refuse(f"rope.scaling.factor = {factor}")
    if kind == "none" or (kind in ("linear", "yarn") and factor == 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        # LongRoPE: its tensors hold the same information as the type.
        if kind in ("longrope", "su") and factor == 1.0:
            return {}
        raise refuse(f"rope.scaling.type = {kind!r}")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.get("rope.scaling.original_context_length", positions),
        "beta_fast": float(keys.get("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(keys.get("rope.scaling.yarn_beta_slow", 1.0)),
    }


def _of_frequencies(factors: list[float], base: float, positions: int) -> dict[str, Any]:
    """Return settings that divide the inverse frequencies by ``factors``: Llama 3.1 if it fits, else a list."""
    if all(factor == 1.0 for factor in factors):
        return {}
    factor = max(factors)
    for exponent in range(4, 24):
        settings = {
            "factor": factor,
            "low_freq_factor": _LOW_FREQUENCY_FACTOR,
            "high_freq_factor": _HIGH_FREQUENCY_FACTOR,
            "original_max_position_embeddings": 2**exponent,
        }
        made = llama3_factors(settings, base, 2 * len(factors))
        if all(math.isclose(a, b, rel_tol=_CLOSE) for a, b in zip(made, factors, strict=True)):
            return {"rope_type": "llama3", **settings}
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": positions,
    }


def llama3_factors(settings: Mapping[str, Any], base: float, width: int) -> list[float]:
    """Return the divisors of the ``width / 2`` inverse frequencies in the scaling of Llama 3.1."""
    factor, low, high = settings["factor"], settings["low_freq_factor"], settings["high_freq_factor"]
    made = []
    for index in range(0, width, 2):
        # Number of turns of this dimension within the original positions.
        turns = settings["original_max_position_embeddings"] * base ** (-index / width) / (2 * math.pi)
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        made.append(1 / ((1 - smooth) / factor + smooth))
    return made


def _read_factors(tensor: GgufTensor, count: int, refuse: Refuse) -> list[float]:
    if tensor.kind != _FLOAT32 or tensor.shape != (count,):
        raise refuse(
            f"{tensor.name} has type {tensor.kind} and shape {list(tensor.shape)}, expected float32, [{count}]"
        )
    with open_regular(tensor.path) as file:
        file.seek(tensor.start)
        factors = list(struct.unpack(f"<{count}f", file.read(tensor.nbytes)))
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise refuse(f"{tensor.name} holds values that are not finite or not positive")
    return factors
