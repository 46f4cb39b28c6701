"""Compressed checkpoints: writing, loading, and reading their configs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ara.errors import ModelError, first_line, is_out_of_memory
from ara.jsonfile import read_object
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.layouts import modeling_ara
from ara.layouts.modeling_ara import (
    AUTO_CLASSES,
    LAYERS,
    QUANT_METHOD,
    AraConfig,
    AraQuantizer,
    RoundedMatrix,
    SeparateExperts,
    densify,
    dequantise,
    expert_layers,
    fuse_experts,
    replace_rounded,
    separate_experts,
    shared_layers_of_experts,
)
from ara.models.completeness import check_loaded, stored_tensors, weight_files
from ara.models.loading import why_not_loaded
from ara.models.multimodal import auto_class
from ara.models.placement import choose_placement, torch_dtype
from ara.models.silence import silence_transformers
from ara.models.stored_names import merges
from ara.models.tokenizer_check import check_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ara.models.processor import Saveable
    from ara.models.stored_model import StoredModel

_AGAIN = "write it again: ara truncate --force"
# Code that lets a checkpoint load where ara is not installed.
CODE_FILE = "modeling_ara.py"


def save_checkpoint(
    model: PreTrainedModel,
    processor: Saveable,
    folder: Path,
    *,
    ranks: Mapping[str, int],
    provenance: dict[str, Any],
    layout: LayoutName = DEFAULT_LAYOUT,
    rounded: Mapping[str, RoundedMatrix] | None = None,
    dense: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Write a checkpoint that plain ``from_pretrained`` reads.

    Args:
        model: with its low-rank layers; ``dense`` replaces them in place.
        processor: the tokenizer, or more; saved in the same folder.
        folder: created if missing.
        ranks: module path → kept rank of the low-rank layers.
        provenance: stored in ``config.json``.
        layout: of the low-rank layers.
        rounded: path of a matrix → its module of few bits, which replaces it in ``model``. A tied head has none.
        dense: write an ordinary dense checkpoint.
        max_shard_size: largest file, such as ``5GB``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    modules = rounded or {}
    if dense:
        densify(model)
    if dense or {*ranks, *modules}.isdisjoint(expert_layers(model)):
        fuse_experts(model)
    if not dense and (ranks or rounded):
        replace_rounded(model, modules)
        declare_compressed(model, folder, ranks=ranks, provenance=provenance, layout=layout, rounded=modules)
    with silence_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
    finish_files(folder)


def declare_compressed(
    model: PreTrainedModel,
    folder: Path,
    *,
    ranks: Mapping[str, int],
    provenance: dict[str, Any],
    layout: LayoutName,
    rounded: Mapping[str, RoundedMatrix] | None = None,
) -> AraQuantizer:
    """Let the config of a model say how it is compressed, and put the code that reads it into the folder.

    Arguments as for :func:`save_checkpoint`.

    Returns:
        The quantizer of the model, which knows what ``save_pretrained`` stores.
    """
    modules = rounded or {}
    settings = {name: [one.bits, one.block, one.zeros is not None] for name, one in modules.items()}
    since = max(LAYERS[layout].since if ranks else 1, *(one.since for one in modules.values()), 1)
    shared = bool(shared_layers_of_experts(model))
    if any(isinstance(module, SeparateExperts) for module in model.modules()):
        since = max(since, SeparateExperts.shared_since if shared else SeparateExperts.since)
        model._weight_conversions = []  # AraQuantizer.update_weight_conversions reads the names as they are
    elif merges(model, (f"{layer}.{part}" for layer in ranks for part in model.get_submodule(layer).state_dict())):
        model._weight_conversions = []  # factors cannot be merged; transformers also loads the names in memory
    config = AraConfig(dict(ranks), since, provenance, layout, settings, shared)
    model.config.quantization_config = config
    model.config.auto_map = {
        auto: f"{Path(CODE_FILE).stem}.{named.__name__}" for auto, named in AUTO_CLASSES.items() if named.loads(model)
    }
    model.hf_quantizer = AraQuantizer(config)
    assert modeling_ara.__file__ is not None
    shutil.copyfile(modeling_ara.__file__, folder / CODE_FILE)
    return model.hf_quantizer


def finish_files(folder: Path) -> None:
    """Give the weight files of a checkpoint the permissions of its config; safetensors makes them private."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def load(path: str | Path, device: str = "auto", dtype: str = "auto", shared_experts: bool = False) -> PreTrainedModel:
    """Load a compressed checkpoint, in evaluation mode. Rounded matrices become ordinary ones with the same numbers.

    Args:
        path: the ``checkpoint`` folder that ``ara truncate`` wrote, compressed or densified.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: float32, bfloat16 or float16; auto takes the dtype of the checkpoint.
        shared_experts: make what maps up one layer of all experts of a block; a checkpoint whose experts share a
            factor has it anyway.

    Raises:
        ModelError: not a checkpoint, or a damaged one.
        UsageError: unknown device or dtype.
    """
    return load_rounded(path, device, dtype, shared_experts)[0]


def load_rounded(
    path: str | Path, device: str = "auto", dtype: str = "auto", shared_experts: bool = False
) -> tuple[PreTrainedModel, dict[str, RoundedMatrix]]:
    """Load a compressed checkpoint as :func:`load` does, and return its rounded matrices by path as well.

    The modules are on the CPU. A tied head has none.
    """
    folder = Path(path)
    stored = str(read_config(folder).get("dtype") or "float32")
    placement = choose_placement(device, stored if dtype == "auto" else dtype)
    model = _read(folder, torch_dtype(placement.dtype), shared_experts=shared_experts)
    rounded = {name: module for name, module in model.named_modules() if isinstance(module, RoundedMatrix)}
    dequantise(model)
    return model.to(placement.device).eval().requires_grad_(False), rounded


def check_loads(folder: Path) -> None:
    """Check that a checkpoint loads, with ``from_pretrained`` on the meta device.

    Raises:
        ModelError: it does not, or the loaded model differs from the files.
    """
    try:
        check_complete(folder)
    except ModelError as error:
        raise ModelError(
            f"the written checkpoint does not load and is removed: {error}",
            "low-rank layers do not fit this family: ara truncate --densify writes an ordinary checkpoint",
        ) from error


def check_complete(folder: Path) -> None:
    """Compare the names and shapes of a checkpoint's tensors with its config; no weight is read.

    Raises:
        ModelError: a tensor is missing, has no place, or has another shape; or the checkpoint does not load.
    """
    _read(folder, None, "meta")


def stored_checkpoint(folder: Path) -> StoredModel:
    """Return a checkpoint without numbers, compressed or dense, and its tensors in their files.

    Raises:
        ModelError: as :func:`check_complete`.
    """
    from ara.models.stored_model import StoredModel

    return StoredModel(_read(folder, None, "meta"), weight_files(folder), str(folder), partial(load, folder))


def _read(
    folder: Path, dtype: torch.dtype | None, device: str | None = None, shared_experts: bool = False
) -> PreTrainedModel:
    """Load a checkpoint, whose experts become separate layers, and compare it with its files.

    A dtype of ``None`` is that of the files.
    """
    kind = read_config(folder).get("model_type")
    try:
        with silence_transformers():
            model, loading = auto_class(kind).from_pretrained(
                folder,
                dtype="auto" if dtype is None else dtype,
                device_map=device,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_loaded reports them, with the shapes
            )
    except Exception as error:  # the model's own code may raise anything
        if is_out_of_memory(error):
            raise
        reason, _hint = why_not_loaded(error)
        raise ModelError(f"{folder} cannot be loaded: {reason}", _AGAIN) from error
    stored = stored_tensors(weight_files(folder))
    check_loaded(model, loading, f"{folder} cannot be loaded: the checkpoint", stored, _AGAIN)
    separate_experts(model, shared_experts)
    loaded: PreTrainedModel = model
    return loaded


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder, or of an exported one.

    Raises:
        ModelError: there is none, it is damaged, or it cannot be used.
    """
    from transformers import AutoTokenizer

    try:
        with silence_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            check_tokenizer(tokenizer)
    except MemoryError:
        raise
    except Exception as error:  # the errors of transformers and tokenizers share no base class
        raise ModelError(
            f"the tokenizer of {folder} cannot be loaded: {first_line(error)}",
            "the folder must hold the model's tokenizer; write it again: ara truncate --force",
        ) from error
    return tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a checkpoint folder.

    Raises:
        ModelError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} is not a checkpoint folder (no config.json)", "ara truncate writes one: .../checkpoint"
        )
    return read_object(path, _AGAIN)


def quantization_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``quantization_config`` of a checkpoint, or an empty dictionary.

    Raises:
        ModelError: it is not an object.
    """
    found = config.get("quantization_config") or {}
    if not isinstance(found, dict):
        raise ModelError(
            f"{folder}/config.json: quantization_config is a {type(found).__name__}, expected an object", _AGAIN
        )
    return found


def is_rounded(folder: Path) -> bool:
    """Tell whether a checkpoint of ARA has matrices of few bits.

    Raises:
        ModelError: its config cannot be read.
    """
    quantization = quantization_of(folder, read_config(folder))
    return quantization.get("quant_method") == QUANT_METHOD and bool(quantization.get("rounded"))


def checkpoint_bytes(folder: Path) -> int:
    """Return the bytes of the weight files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
