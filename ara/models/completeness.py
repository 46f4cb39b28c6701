"""Checks that a loaded model holds what its files hold.

transformers only warns and continues with another model. It fills missing tensors with random numbers and drops tensors
for which the config has no place: biases, further layers, the scales of quantised weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ara.errors import ModelError, NumericalError, UnsupportedModelError, first_line
from ara.jsonfile import read
from ara.models.shown import first_names

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"})
# Buffers that older releases of transformers stored and newer ones compute. transformers itself has already removed
# those that the model's class lists (`_keys_to_ignore_on_load_unexpected`).
_COMPUTED = re.compile(
    r"(^|\.)(inv_freq|(cos|sin)_cached|masked_bias|position_ids|version|embed_positions\.(weights|_float_tensor))$"
)
# Attention masks of these names have at least two dimensions; the bias of a layer has one.
_MASK = re.compile(r"(^|\.)(bias|mask|causal_mask)$")
# Tensors of bitsandbytes, GPTQ, AWQ, compressed-tensors and FP8 checkpoints.
_QUANTISED = re.compile(
    r"\.(SCB|weight_format|absmax|quant_map|quant_state\..*|qweight|qzeros|scales|g_idx"
    r"|weight_(scale|scale_inv|packed|shape|zero_point)|(input|output)_scale)$"
)
_CONFIG_HINT = (
    "config.json does not describe these weights (layers, biases, tied or extra heads): use the config.json of these "
    "weights, or remove the tensors that are not part of the model from the files"
)
_QUANTISED_HINT = "start from the original weights of the model, in float32, bfloat16 or float16"


@dataclass(frozen=True)
class StoredTensor:
    """Dtype, as safetensors names it (``F32``, ``BF16``, ``I8``), and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]


def check_loaded(
    model: PreTrainedModel, loading: Mapping[str, Any], name: str, stored: Mapping[str, StoredTensor], hint: str = ""
) -> None:
    """Refuse a model that differs from its files.

    Args:
        model: result of ``from_pretrained``.
        loading: its loading info: missing, unexpected and mismatched keys.
        name: of the model; starts the error.
        stored: from :func:`stored_tensors`; empty for files of another format.
        hint: replaces the hints below.

    Raises:
        UnsupportedModelError: quantised weights.
        ModelError: a parameter is missing or has another shape, or the model has no place for a tensor.
    """
    extra = sorted(key for key in loading["unexpected_keys"] if not _is_computed(key, stored.get(key)))
    codes = _integer_weights(model, stored)
    quantised = [key for key in extra if _QUANTISED.search(key)]
    if codes or quantised:
        held = (
            f"integers ({stored[codes[0]].dtype}) in place of {_listed(codes, 'weights')}"
            if codes
            else f"{_listed(quantised, 'tensors')} of quantised weights"
        )
        raise UnsupportedModelError(
            f"{name} holds {held}, and its config does not mention quantisation", hint or _QUANTISED_HINT
        )
    problem = _problem(sorted(loading["missing_keys"]), extra, sorted(loading["mismatched_keys"]))
    if problem is not None:
        raise ModelError(f"{name} {problem[0]}", hint or problem[1])


def _problem(
    missing: list[str], extra: list[str], mismatched: list[tuple[str, Collection[int], Collection[int]]]
) -> tuple[str, str] | None:
    """Return what is wrong, as the end of a sentence, and what to do."""
    if mismatched:
        key, found, expected = mismatched[0]
        more = f" ({len(mismatched)} tensors differ)" if len(mismatched) > 1 else ""
        return f"has {key} of shape {list(found)}, its config asks for {list(expected)}{more}", _CONFIG_HINT
    if missing and extra:
        return (
            f"lacks {len(missing)} of the model's tensors ({first_names(missing)}), "
            f"and holds {_listed(extra, 'tensors')} without a place in the model",
            "the weights are of another architecture than config.json names, or have other names",
        )
    if missing:
        return (
            f"lacks {len(missing)} of the model's tensors: {first_names(missing)}",
            "download the model again; if it is complete, config.json does not describe these weights",
        )
    if extra:
        return f"holds {_listed(extra, 'tensors')} without a place in the model of its config", _CONFIG_HINT
    return None


def stored_tensors(paths: Iterable[Path], hint: str = "download the file again") -> dict[str, StoredTensor]:
    """Return tensor name → dtype and shape, from the headers of safetensors files.

    Args:
        paths: the files.
        hint: what to do about a damaged file.

    Raises:
        ModelError: a file is damaged.
    """
    found: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    found[key] = StoredTensor(part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} is damaged ({first_line(error)})", hint) from None
    return found


def weight_files(origin: str | Path, revision: str | None = None) -> list[Path]:
    """Return the safetensors files that transformers reads for a folder or a cached hub model.

    Raises:
        ModelError: the index cannot be read.
    """
    from transformers.utils import cached_file

    def at(name: str) -> Path | None:
        found = cached_file(
            str(origin),
            name,
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return Path(found) if found else None

    single = at("model.safetensors")
    if single is not None:
        return [single]
    index = at("model.safetensors.index.json")
    if index is None:
        return []
    try:
        names = sorted({str(file) for file in read(index)["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a valid index of weights ({error})", "download it again") from None
    return [path for path in map(at, names) if path is not None]


def check_range(parameters: Iterable[tuple[str, torch.Tensor]], name: str) -> None:
    """Refuse weights that became infinite when they were converted to float16.

    Args:
        parameters: names and tensors; other dtypes pass.
        name: of the model, for errors.

    Raises:
        NumericalError: a parameter is infinite.
    """
    import torch

    for key, parameter in parameters:
        if parameter.dtype == torch.float16 and bool(parameter.isinf().any()):
            raise NumericalError(
                f"{key} of {name} exceeds the range of float16 (±65,504) in {int(parameter.isinf().sum())} numbers",
                "use --dtype bfloat16 or --dtype float32",
            )


def has_wider_range(stored: Mapping[str, StoredTensor]) -> bool:
    """Tell whether tensors of some files may be beyond the range of float16."""
    return not {tensor.dtype for tensor in stored.values()}.isdisjoint(("F32", "F64", "BF16"))


def _is_computed(key: str, stored: StoredTensor | None) -> bool:
    if _COMPUTED.search(key):
        return True
    return stored is not None and len(stored.shape) >= 2 and bool(_MASK.search(key))


def _integer_weights(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> list[str]:
    """Return the tensors that are stored as integers and are floating-point numbers in the model."""
    integers = [key for key, tensor in stored.items() if tensor.dtype in _INTEGERS]
    if not integers:
        return []
    floating = {key for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    prefix = f"{model.base_model_prefix}."
    return sorted(
        key for key in integers if key.endswith(".weight") or {key, prefix + key, key.removeprefix(prefix)} & floating
    )


def _listed(names: list[str], kind: str) -> str:
    """Return ``29 tensors (a, b, c, …)``, or ``1 tensor (a)``."""
    word = kind.removesuffix("s") if len(names) == 1 else kind
    return f"{len(names)} {word} ({first_names(names)})"
