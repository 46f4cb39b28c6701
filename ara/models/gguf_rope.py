"""Rotary embeddings of a GGUF file, in the words of transformers: plain, linear, YaRN, Llama 3.1's, LongRoPE.

llama.cpp keeps them in two ways. Linear scaling and YaRN are keys, ``ARCH.rope.scaling.*``. Llama 3.1's and LongRoPE
are tensors: ``rope_freqs.weight``, ``rope_factors_short.weight`` and ``rope_factors_long.weight`` (d/2) hold what each
inverse frequency is divided by.
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

DEFAULT_BASE = 10000.0  # of llama.cpp
_FLOAT32 = 0  # ggml's number of the type
# How closely settings must reproduce stored factors: they were computed in float32 by other code.
_CLOSE = 1e-5
# All Llama 3.1, 3.2 and 3.3 models have these, with 8192 positions at first and a factor of 8 or 32.
_LOW_FREQUENCY_FACTOR, _HIGH_FREQUENCY_FACTOR = 1.0, 4.0

# Raises the error for a key whose value cannot be read right.
Refuse = Callable[[str], Exception]


def rope_parameters(
    keys: Mapping[str, Any], tensors: Mapping[str, GgufTensor], width: int, positions: int, refuse: Refuse
) -> dict[str, Any]:
    """Return transformers' ``rope_parameters``, without a share of rotated dimensions.

    Args:
        keys: those of the architecture, without its name in front: ``rope.freq_base`` and so on.
        tensors: name → where it lies.
        width: dimensions of a head that are rotated.
        positions: context length of the model.
        refuse: makes the error for settings that have no counterpart; told what they are.

    Raises:
        Exception: what ``refuse`` makes.
    """
    base = keys.get("rope.freq_base", DEFAULT_BASE)
    plain = {"rope_type": "default", "rope_theta": float(base)}
    scaling = _scaling(keys, positions, refuse)
    stored = [name for name in (FREQUENCIES, SHORT, LONG) if name in tensors]
    if not stored:
        return plain | scaling
    if scaling:
        raise refuse(f"rope.scaling.type is {scaling['rope_type']} and {stored[0]} is there")
    factors = {name: _read_factors(tensors[name], width // 2, refuse) for name in stored}
    if stored == [FREQUENCIES]:
        return plain | _of_frequencies(factors[FREQUENCIES], float(base), positions)
    if stored != [SHORT, LONG]:
        raise refuse(f"of {SHORT}, {LONG} and {FREQUENCIES} it holds {', '.join(stored)}")
    if "rope.scaling.attn_factor" not in keys:
        raise refuse(f"{SHORT} is there without rope.scaling.attn_factor")
    return plain | {
        "rope_type": "longrope",
        "short_factor": factors[SHORT],
        "long_factor": factors[LONG],
        "attention_factor": float(keys["rope.scaling.attn_factor"]),
        "original_max_position_embeddings": keys.get("rope.scaling.original_context_length", positions),
    }


def _scaling(keys: Mapping[str, Any], positions: int, refuse: Refuse) -> dict[str, Any]:
    """Return what ``rope.scaling.*`` adds to plain embeddings."""
    # llama.cpp: linear without a type, and the older key without the newer one; a factor of 0 is none.
    kind = keys.get("rope.scaling.type", "linear")
    factor = float(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 1.0)) or 1.0)
    if factor < 0 or not math.isfinite(factor):
        raise refuse(f"rope.scaling.factor = {factor}")
    if kind == "none" or (kind in ("linear", "yarn") and factor == 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        # LongRoPE's type stands beside its tensors, which say the same.
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
    """Return settings that divide the inverse frequencies by ``factors``: Llama 3.1's if they do, else the list."""
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
    """Return what Llama 3.1's scaling divides each of ``width / 2`` inverse frequencies by."""
    factor, low, high = settings["factor"], settings["low_freq_factor"], settings["high_freq_factor"]
    made = []
    for index in range(0, width, 2):
        # How often this dimension turns within the positions that the model was first trained on.
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
