"""Writes the files of a model without the whole model in memory: at most one file and one layer are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from ara.models.folder import INDEX
from ara.models.stored_names import saved_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PATTERN = "model{suffix}.safetensors"


def write_model(
    model: PreTrainedModel,
    state: Mapping[str, torch.Tensor],
    read: Callable[[str], torch.Tensor],
    folder: Path,
    max_shard_size: str,
) -> None:
    """Write configs and weights as ``save_pretrained`` does, one file of weights after the other.

    Args:
        model: with its config; on the meta device.
        state: name → tensor of what is stored, which may be on the meta device.
        read: returns a tensor by its name, with the shape and dtype that it has in ``state``. Tensors of a layer are
            read one after the other.
        folder: exists.
        max_shard_size: largest file, such as ``5GB``; a larger tensor has a file of its own.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    ignored = set(model._keys_to_ignore_on_save or ())
    wanted = {name: tensor for name, tensor in state.items() if name not in ignored}
    wanted = remove_tied_weights_from_state_dict(wanted, model)
    saved = {key: name for name, key in saved_names(model, wanted).items()}
    stored = {key: wanted[name] for key, name in saved.items()}
    split = split_torch_state_dict_into_shards(stored, filename_pattern=_PATTERN, max_shard_size=max_shard_size)
    for file, keys in split.filename_to_tensors.items():
        save_file({key: read(saved[key]).contiguous() for key in keys}, folder / file, {"format": "pt"})
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
