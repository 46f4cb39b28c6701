"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny import tiny_config, tiny_tokenizer

# A merge needs its result in the vocabulary: it takes the place of byte 255, which no UTF-8 text holds.
_VOCABULARY = tiny_tokenizer().get_vocab()
TOKENS = ["ab" if token == "ÿ" else token for token in sorted(_VOCABULARY, key=_VOCABULARY.__getitem__)]

# Called with the writer before the tensors are: adds keys and tensors.
More = Callable[[gguf.GGUFWriter], None]


def gguf_model(kind: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny model of a model type whose parameters are all random, norms and biases too."""
    common = tiny_config("llama").to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = {name: common[name] for name in (*names, "num_key_value_heads", "max_position_embeddings")}
    config = AutoConfig.for_model(
        kind, **{**values, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            near_one = parameter.dim() == 1 and "bias" not in name and "gemma" not in kind and kind != "nemotron"
            torch.nn.init.normal_(parameter, mean=float(near_one), std=0.2 if parameter.dim() == 1 else 0.1)
    return model.eval()


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str = "llama",
    keys: Mapping[str, Any] | None = None,
    more: More | None = None,
    skip: str = "",
    halves: bool = False,
) -> Path:
    """Write a model.

    Args:
        path: of the file.
        model: of a family whose layers llama.cpp keeps as they are, up to what :func:`_stored` knows.
        architecture: in llama.cpp's words.
        keys: of the architecture, without its name in front; ``None`` leaves one out that is written otherwise.
        more: writes further keys and tensors.
        skip: name of a tensor that is left out.
        halves: write matrices in float16.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**_sizes(model), **(keys or {})}.items():
        if value is not None:
            writer.add_key_value(f"{architecture}.{key}", value, _type_of(value))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<") and token != "<" else 1 for token in TOKENS])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in _tensors(model, architecture).items():
        if name != skip:
            writer.add_tensor(name, tensor.astype(np.float16) if halves and tensor.ndim > 1 else tensor)
    if more is not None:
        more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split_gguf(path: Path, folder: Path, count: int) -> list[Path]:
    """Write a file again in parts, as gguf-split does: all keys in the first, tensors shared out."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    parts = [folder / f"{path.stem}-{number + 1:05d}-of-{count:05d}.gguf" for number in range(count)]
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, architecture)
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    value, kind = field.contents(), field.types[0]
                    writer.add_key_value(key, value, kind, field.types[-1] if len(field.types) > 1 else None)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    sizes = {
        "block_count": config.num_hidden_layers,
        "context_length": getattr(config, "max_position_embeddings", 256),
        "embedding_length": config.hidden_size,
        "feed_forward_length": inner or getattr(config, "ffn_hidden_size", 4 * config.hidden_size),
        "attention.head_count": getattr(config, "num_attention_heads", None),
        "attention.head_count_kv": heads,
        "attention.key_length": getattr(config, "head_dim", None),
        "attention.value_length": getattr(config, "head_dim", None),
    }
    for name in ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if hasattr(config, name):
            key = "layer_norm_rms_epsilon" if name == "rms_norm_eps" else "layer_norm_epsilon"
            sizes[f"attention.{key}"] = getattr(config, name)
    rope = getattr(config, "rope_parameters", None)
    if rope:
        sizes["rope.freq_base"] = rope.get("full_attention", rope)["rope_theta"]
    return sizes


def _tensors(model: PreTrainedModel, architecture: str) -> dict[str, np.ndarray]:
    arch = next(
        (number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), gguf.MODEL_ARCH.LLAMA
    )
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tied = model.config.tie_word_embeddings
    found = {}
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            # Some names are known with the model's own name in front, some without.
            suffixes = (".weight", ".bias")
            name = name.replace("dt_bias", "dt_proj.bias")
            stored = names.get_name(name, suffixes) or names.get_name(name.partition(".")[2], suffixes)
            found[stored] = np.ascontiguousarray(_stored(stored, tensor, model, architecture).numpy())
    return found


def _stored(name: str, tensor: torch.Tensor, model: PreTrainedModel, architecture: str) -> torch.Tensor:
    """Return a tensor as llama.cpp keeps it."""
    config = model.config
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        # Llama's rows are kept with the two rotary halves of each head interleaved.
        heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
        return tensor.reshape(heads, 2, len(tensor) // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
    adds_one = ("gemma2", "gemma3", "nemotron", "qwen35")
    if architecture in adds_one and not name.endswith(".ssm_norm.weight") and name.endswith("norm.weight"):
        return tensor + 1  # transformers adds 1 when it runs
    if architecture == "bloom" and ".attn_qkv." in name:
        # Queries, keys and values of each head lie together in transformers, those of all heads in llama.cpp.
        return tensor.reshape(config.num_attention_heads, 3, -1).swapaxes(0, 1).reshape(tensor.shape)
    if name.endswith((".ssm_conv1d.weight", ".shortconv.conv.weight")):
        return tensor.squeeze(1)
    if name.endswith(".ssm_a"):
        return -tensor.exp()
    if architecture == "gpt2" and tensor.dim() == 2 and name.startswith("blk."):
        return tensor.T  # Conv1D
    return tensor


def _type_of(value: Any) -> gguf.GGUFValueType:
    if isinstance(value, bool):
        return gguf.GGUFValueType.BOOL
    if isinstance(value, int):
        return gguf.GGUFValueType.UINT32
    if isinstance(value, float):
        return gguf.GGUFValueType.FLOAT32
    return gguf.GGUFValueType.ARRAY if isinstance(value, list) else gguf.GGUFValueType.STRING
