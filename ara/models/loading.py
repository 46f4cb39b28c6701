"""Why transformers did not load or run a model, in a line that helps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ara.errors import AraError, ModelError, first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# The class of errors that name a field of config.json, and of those that name a file.
_CONFIG_ERRORS = "StrictDataclass"
_FILE_ERRORS = ("SafetensorError", "OSError", "FileNotFoundError", "HFValidationError", "EntryNotFoundError")
# transformers points to a report that it has only logged.
_REPORT_ELSEWHERE = "above report"

_CORRECT = "correct config.json, or bring the one that belongs to these weights"


def why_not_loaded(error: BaseException, config: PreTrainedConfig | None = None) -> tuple[str, str | None]:
    """Return what is wrong, in one line, and what to do; ``None`` where only the caller knows.

    Args:
        error: what transformers raised.
        config: of the model, if it could be read.
    """
    rope = _unknown_rope(error, config)
    if rope is not None:
        return rope
    if _REPORT_ELSEWHERE in str(error):
        return (
            "transformers cannot bring the stored weights into the layout of the model",
            "config.json does not describe these weights, or they are damaged: bring both from the same place",
        )
    kind = type(error).__name__
    if kind.startswith(_CONFIG_ERRORS):
        return first_line(error), _CORRECT
    if config is None and kind not in _FILE_ERRORS:
        return first_line(error), _CORRECT
    if kind not in _FILE_ERRORS and _while_building(error):
        return f"the model that its config describes cannot be built ({first_line(error)})", _CORRECT
    return first_line(error), None


@contextmanager
def forward_errors(model: torch.nn.Module) -> Iterator[None]:
    """Say of what a model's own code raises in a forward pass that the model cannot be run, and in which precision.

    Some families do not run in every precision (xLSTM not in bfloat16), and some configs only fail here.

    Raises:
        ModelError: the block failed, and neither for want of memory nor by an error of ours.
    """
    try:
        yield
    except (AraError, MemoryError, OSError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        other = "" if dtype == "float32" else "try --dtype float32; "
        raise ModelError(
            f"{type(model).__name__} fails in a forward pass in {dtype}: {type(error).__name__}: {first_line(error)}",
            f"{other}the model's own code in transformers {version('transformers')} does not run it as it is",
        ) from error


def _unknown_rope(error: BaseException, config: PreTrainedConfig | None) -> tuple[str, str] | None:
    """Return what to say of a rotary embedding that transformers looked up and did not find."""
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
    """Tell whether the modules were being made from the config, when it happened."""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_name == "__init__" and "modeling_" in code.co_filename:
            return True
        trace = trace.tb_next
    return False
