"""Does a loaded model hold what its files hold? transformers itself only warns, and goes on with another model.

What it does not find it fills with random numbers; what its config gives no place it drops: biases, further layers,
the scales of quantised weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ara.errors import ModelError, NumericalError, UnsupportedModelError
from ara.jsonfile import read

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHOWN = 3
_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"})
# Buffers that older releases of transformers stored and newer ones compute. What a model's class lists itself
# (`_keys_to_ignore_on_load_unexpected`), transformers has taken off its list already.
_COMPUTED = re.compile(
    r"(^|\.)(inv_freq|(cos|sin)_cached|masked_bias|position_ids|version|embed_positions\.(weights|_float_tensor))$"
)
# Attention masks of these names have at least two dimensions; the bias of a layer has one.
_MASK = re.compile(r"(^|\.)(bias|mask|causal_mask)$")
# What bitsandbytes, GPTQ, AWQ, compressed-tensors and FP8 checkpoints store beside their codes.
_QUANTISED = re.compile(
    r"\.(SCB|weight_format|absmax|quant_map|quant_state\..*|qweight|qzeros|scales|g_idx"
    r"|weight_(scale|scale_inv|packed|shape|zero_point)|(input|output)_scale)$"
)
_CONFIG_HINT = (
    "config.json does not describe these weights (layers, biases, tied or extra heads): bring the one that belongs to "
    "them, or take tensors that are no part of the model out of the files"
)
_QUANTISED_HINT = "start from the original weights of the model, in float32, bfloat16 or float16"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of a safetensors file describes it.

    Attributes:
        dtype: in the words of safetensors: ``F32``, ``BF16``, ``I8``.
        shape: its sizes.
    """

    dtype: str
    shape: tuple[int, ...]


def check_loaded(
    model: PreTrainedModel, loading: Mapping[str, Any], name: str, stored: Mapping[str, StoredTensor], hint: str = ""
) -> None:
    """Refuse a model that is not the one in the files.

    Args:
        model: what ``from_pretrained`` made of them.
        loading: its loading info: missing, unexpected and mismatched keys.
        name: of the model, which begins the error.
        stored: what the files hold, see :func:`stored_tensors`; empty for files of another format.
        hint: what to do, where only one thing helps.

    Raises:
        UnsupportedModelError: quantised weights.
        ModelError: a parameter is missing or has another shape, or a tensor has no place in the model.
    """
    left = [key for key in loading["unexpected_keys"] if not _is_computed(key, stored.get(key))]
    codes = _integer_weights(model, stored)
    quantised = [key for key in left if _QUANTISED.search(key)]
    if codes or quantised:
        held = (
            f"integers ({stored[codes[0]].dtype}) in the place of {_listed(codes, 'weights')}"
            if codes
            else f"{_listed(quantised, 'tensors')} of quantised weights"
        )
        raise UnsupportedModelError(
            f"{name} holds {held}, and its config says nothing of a quantisation", hint or _QUANTISED_HINT
        )
    problem = _problem(sorted(loading["missing_keys"]), sorted(left), sorted(loading["mismatched_keys"]))
    if problem is not None:
        said, advice = problem
        raise ModelError(f"{name} {said}", hint or advice)


def _problem(
    missing: list[str], left: list[str], mismatched: list[tuple[str, Collection[int], Collection[int]]]
) -> tuple[str, str] | None:
    """Return what is wrong, as the end of a sentence, and what to do."""
    if mismatched:
        key, found, expected = mismatched[0]
        more = f" ({len(mismatched)} tensors differ)" if len(mismatched) > 1 else ""
        return f"has {key} of shape {list(found)}, its config asks for {list(expected)}{more}", _CONFIG_HINT
    if missing and left:
        return (
            f"lacks {len(missing)} of the model's tensors ({_shown(missing)}), "
            f"and holds {_listed(left, 'tensors')} without a place in the model",
            "these are the weights of another architecture than config.json names, or stored under other names",
        )
    if missing:
        return (
            f"lacks {len(missing)} of the model's tensors: {_shown(missing)}",
            "download the model again; if all of it is there, config.json asks for more than these weights have",
        )
    if left:
        return f"holds {_listed(left, 'tensors')} without a place in the model of its config", _CONFIG_HINT
    return None


def stored_tensors(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Read the headers of safetensors files: tensor name → dtype and shape.

    Raises:
        ModelError: a file cannot be read.
    """
    found: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    part = file.get_slice(key)
                    found[key] = StoredTensor(part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read ({error})", "the file may be damaged: fetch it again") from None
    return found


def weight_files(origin: str | Path, revision: str | None = None) -> list[Path]:
    """Return the safetensors files that transformers reads of a folder, or of a hub model that lies in the cache.

    Raises:
        ModelError: the index names what is not there.
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
        raise ModelError(f"{index} is not a valid index of weights ({error})", "fetch it again") from None
    return [path for path in map(at, names) if path is not None]


def check_range(model: PreTrainedModel, name: str, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse a model in float16 whose stored weights have numbers that float16 does not.

    Args:
        model: loaded in float16.
        name: of the model, for errors.
        stored: what the files hold.

    Raises:
        NumericalError: a parameter became infinite.
    """
    import torch

    wider = {tensor.dtype for tensor in stored.values()} & {"F32", "F64", "BF16"}
    for key, parameter in model.named_parameters() if wider else ():
        if parameter.dtype == torch.float16 and bool(parameter.isinf().any()):
            raise NumericalError(
                f"{key} of {name} exceeds the range of float16 (±65,504) in {int(parameter.isinf().sum())} numbers",
                "use --dtype bfloat16 or --dtype float32",
            )


def _is_computed(key: str, stored: StoredTensor | None) -> bool:
    if _COMPUTED.search(key):
        return True
    return stored is not None and len(stored.shape) >= 2 and bool(_MASK.search(key))


def _integer_weights(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> list[str]:
    """Return the tensors that are stored as integers and that the model has as floating-point numbers."""
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
    return f"{len(names)} {word} ({_shown(names)})"


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
