"""Unpacks GGUF files once into ordinary Hugging Face folders in the user's cache.

transformers reads a GGUF file slowly (14 s for the weights of 135 M parameters, 5 s for the tokenizer, measured on
2 cores). A load from the folder is fast. transformers reads the tensors and the tokenizer; the config is made by
:mod:`ara.models.gguf_metadata`.

Folders under ``<cache>/gguf``, named by the first 16 digits of the file's sha256 and the version of this layout::

    <sha>-tokenizer-2/   config.json and the tokenizer, made when the model is first resolved
    <sha>-bfloat16-2/    the same with model.safetensors and generation_config.json; float32 serves for all precisions
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ara.errors import AraError, ModelError, UnsupportedModelError, disk_errors, first_line
from ara.models.cache import aside, cache_dir, publish_folder
from ara.models.completeness import check_loaded
from ara.models.gguf_header import AGAIN, open_gguf
from ara.models.gguf_keys import ELSEWHERE
from ara.models.gguf_metadata import DERIVED_TENSORS, gguf_config
from ara.models.gguf_parts import GgufContents, join, part_paths, read_contents
from ara.models.shown import first_names
from ara.models.silence import silence_gguf, silence_transformers
from ara.progress import SILENT, Reporter
from ara.workspace.manifest import file_sha256

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Increased when the same file gives another folder. Version 1 ignored keys that change the function of the model.
_LAYOUT = 2


@dataclass(frozen=True)
class GgufFile:
    """One GGUF model, in one file or in several parts, and its folders in the cache.

    Attributes:
        path: absolute path of the file, or of its first part.
        sha256: of the file, or over the checksums of all parts.
        parts: all files, in order.
    """

    path: Path
    sha256: str
    parts: tuple[Path, ...]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Check and hash a file, or all parts of the model that it belongs to.

        Raises:
            ModelError: a file cannot be read, is not a GGUF file, or a part is missing.
        """
        parts, sums = part_paths(path.absolute()), []
        for part in parts:
            with open_gguf(part):  # a file of another kind is refused before it is hashed
                sums.append(file_sha256(part))
        sha256 = sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()
        return cls(parts[0], sha256, parts)

    @property
    def has_fewer_bits(self) -> bool:
        """Whether the weights take less than float32 would.

        Raises:
            ModelError: the file is damaged.
        """
        tensors = read_contents(self.parts).tensors.values()
        return sum(tensor.nbytes for tensor in tensors) < 4 * sum(math.prod(tensor.shape) for tensor in tensors)

    def tokenizer_folder(self, report: Reporter = SILENT) -> Path:
        """Return the folder with the config and the tokenizer; the first call makes it.

        Raises:
            ModelError: the file is damaged, or a library that reads GGUF is missing.
            UnsupportedModelError: the architecture is unknown, or a key cannot be read exactly.
            DiskFullError: the cache folder has no room.
        """
        target = self._folder("tokenizer")
        if _has_tokenizer(target):
            return target
        report.step(f"Reading config and tokenizer of {self.path.name} (once)")
        with aside(target.parent) as folder, silence_transformers(), self._errors():
            from transformers import AutoTokenizer

            config = gguf_config(str(self.path), read_contents(self.parts))
            config.save_pretrained(folder / "made")
            # gguf-split writes the tokenizer to the first part.
            tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
            tokenizer.save_pretrained(folder / "made")
            publish_folder(folder / "made", target, _has_tokenizer)
        return target

    def weights_folder(self, dtype: torch.dtype, report: Reporter = SILENT) -> Path:
        """Return the folder with the whole model, its weights unpacked to ``dtype``; the first call makes it.

        A folder in float32 serves for all precisions: its weights round to what unpacking would give.

        Raises:
            ModelError: the file is damaged, or a library that reads GGUF is missing.
            UnsupportedModelError: the model has no place for a tensor of the file.
            DiskFullError: the cache folder has no room.
        """
        number = str(dtype).removeprefix("torch.")
        target = self._folder(number)
        for folder in (target, self._folder("float32")):
            if _has_weights(folder):
                return folder
        tokenizer = self.tokenizer_folder(report)
        report.step(f"Unpacking {self.path.name} to {number} (once)")
        with aside(target.parent) as folder, silence_transformers(), silence_gguf(), self._errors(), _names_once():
            made = folder / "made"
            shutil.copytree(tokenizer, made)
            self._unpack(dtype, made, folder)
            publish_folder(made, target, _has_weights)
        report.fact(f"kept in {target}")
        return target

    def _unpack(self, dtype: torch.dtype, made: Path, scratch: Path) -> None:
        """Add the weights to the folder ``made``; parts are first joined in the folder ``scratch``."""
        from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

        contents = read_contents(self.parts)
        file = self.path
        if len(self.parts) > 1:
            file = scratch / "joined.gguf"
            join(contents, file)
        model, loading = AutoModelForCausalLM.from_pretrained(
            file.parent,
            config=AutoConfig.from_pretrained(made),
            gguf_file=file.name,
            quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
            dtype=dtype,
            output_loading_info=True,
        )
        check_loaded(model, {**loading, "unexpected_keys": set()}, str(self.path), {})
        _check_all_read(model, contents, loading["unexpected_keys"], str(self.path))
        # The saved weights are dense: a quantisation entry would make the next load expect packed ones.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(made)

    def _folder(self, purpose: str) -> Path:
        return cache_dir() / "gguf" / f"{self.sha256[:16]}-{purpose}-{_LAYOUT}"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with disk_errors(cache_dir()):
                yield
        except (AraError, MemoryError):
            raise
        except ImportError as error:
            raise ModelError(
                f"{self.path} cannot be read: {first_line(error)}", "run `pip install gguf accelerate`"
            ) from error
        except Exception as error:
            raise ModelError(f"{self.path} cannot be read as GGUF: {first_line(error)}", AGAIN) from error


@contextmanager
def _names_once() -> Iterator[None]:
    """Let transformers' reader make its table of tensor names once, not for every module of the model."""
    import gguf

    original = gguf.get_tensor_name_map
    vars(gguf)["get_tensor_name_map"] = lru_cache(original)
    try:
        yield
    finally:
        vars(gguf)["get_tensor_name_map"] = original


def _check_all_read(model: PreTrainedModel, contents: GgufContents, unexpected: set[str], file: str) -> None:
    """Refuse a file with tensors that transformers ignores, such as biases that the config does not have."""
    from transformers import modeling_gguf_pytorch_utils as reader

    try:
        from transformers.integrations.gguf import GGUF_ARCHS
    except ImportError:  # older releases have one reader for all architectures
        GGUF_ARCHS = {}
    architecture = contents.metadata["general.architecture"]
    if architecture in GGUF_ARCHS:  # the newer reader of transformers reports unread tensors
        lost = sorted(unexpected)
    else:
        processor = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)(config={})
        places = reader.get_gguf_hf_weights_map(model, processor)
        lost = [name for name in contents.tensors if name not in places and not DERIVED_TENSORS.fullmatch(name)]
    if lost:
        raise UnsupportedModelError(
            f"{file} holds {len(lost)} tensors that {type(model).__name__} has no place for: {first_names(lost)}",
            ELSEWHERE,
        )


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()


def _has_weights(folder: Path) -> bool:
    weights = (folder / "model.safetensors", folder / "model.safetensors.index.json")
    return _has_tokenizer(folder) and any(path.is_file() for path in weights)
