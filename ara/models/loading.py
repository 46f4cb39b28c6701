"""Explains in one line why transformers did not load or run a model."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ara.errors import AraError, ModelError, first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# Names of error classes: those about a field of config.json, and those about a file.
_CONFIG_ERRORS = "StrictDataclass"
_FILE_ERRORS = ("SafetensorError", "OSError", "FileNotFoundError", "HFValidationError", "EntryNotFoundError")
# In this error transformers refers to a report that it only logs.
_REPORT_ELSEWHERE = "above report"

_CORRECT = "correct config.json, or bring the one that belongs to these weights"


def why_not_loaded(error: BaseException, config: PreTrainedConfig | None = None) -> tuple[str, str | None]:
    """Return the problem in one line, and a hint, or ``None`` if only the caller can give one.

    Args:
        error: raised by transformers.
        config: of the model, if it could be read.
    """
    rope = _unknown_rope(error, config)
    if rope is not None:
        return rope
    if _REPORT_ELSEWHERE in str(error):
        return (
            "transformers cannot convert the stored weights to the layout of the model",
            "config.json does not describe these weights, or they are damaged: download both again",
        )
    kind = type(error).__name__
    if kind.startswith(_CONFIG_ERRORS) or (config is None and kind not in _FILE_ERRORS):
        return first_line(error), _CORRECT
    if kind not in _FILE_ERRORS and _while_building(error):
        return f"the model of its config cannot be built ({first_line(error)})", _CORRECT
    return first_line(error), None


@contextmanager
def forward_errors(model: torch.nn.Module) -> Iterator[None]:
    """Report an error of a model's own code in a forward pass as :class:`ModelError`, with the precision.

    Some families do not run in every precision (xLSTM not in bfloat16). Some wrong configs only fail here.

    Raises:
        ModelError: the block failed; out-of-memory errors, OSError and our own errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, AraError | OSError) or is_out_of_memory(error):
            raise
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        other = "" if dtype == "float32" else "try --dtype float32; "
        raise ModelError(
            f"{type(model).__name__} fails in a forward pass in {dtype}: {type(error).__name__}: {first_line(error)}",
            f"{other}the code of the model in transformers {version('transformers')} does not run it",
        ) from error


def _unknown_rope(error: BaseException, config: PreTrainedConfig | None) -> tuple[str, str] | None:
    """Return the explanation and the hint for an unknown type of rotary embedding, or ``None``."""
    if config is None or not isinstance(error, KeyError) or not error.args:
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if error.args[0] in ROPE_INIT_FUNCTIONS or error.args[0] not in set(_rope_types(config.to_dict())):
        return None
    return (
        f"its config names the rope_type {error.args[0]!r}; transformers knows "
        f"{', '.join(sorted({'default', *ROPE_INIT_FUNCTIONS}))}",
        "correct rope_parameters (or rope_scaling) in config.json; a newer transformers may know it",
    )


def _rope_types(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if key in ("rope_type", "type") and isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _rope_types(value)


def _while_building(error: BaseException) -> bool:
    """Tell whether the error occurred while modules were built from the config."""
    codes = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(code.co_name == "__init__" and "modeling_" in code.co_filename for code in codes)
