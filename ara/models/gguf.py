"""GGUF files, unpacked once into an ordinary Hugging Face folder in the user's cache.

transformers reads a GGUF file slowly (14 s for the weights of 135 M parameters, 5 s for the tokenizer, measured on
2 cores) and keeps its weights packed unless told otherwise. Every later load then takes the fast, ordinary way.

Layout under ``<cache>/gguf``, named by the first 16 digits of the file's sha256::

    <sha>-tokenizer/   config.json and the tokenizer, made when the model is first looked at
    <sha>-bfloat16/    the same, with model.safetensors and generation_config.json, one folder per dtype
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ara.errors import AraError, ModelError, UnsupportedModelError, disk_errors, first_line
from ara.manifest import file_sha256
from ara.models.cache import aside, cache_dir, publish_folder
from ara.models.completeness import check_gguf_read, check_loaded
from ara.models.quiet import quiet_gguf, quiet_transformers
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    import torch

_MAGIC = b"GGUF"


@dataclass(frozen=True)
class GgufFile:
    """One GGUF file and its folders in the cache.

    Attributes:
        path: absolute path of the file.
        sha256: of its bytes.
    """

    path: Path
    sha256: str

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Look at a file.

        Raises:
            ModelError: it cannot be read, or does not start like a GGUF file.
        """
        try:
            with path.open("rb") as stream:
                magic = stream.read(len(_MAGIC))
            if magic != _MAGIC:
                raise ModelError(f"{path} is not a GGUF file: it starts with {magic!r}, expected {_MAGIC!r}")
            return cls(path.absolute(), file_sha256(path))
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from error

    def tokenizer_folder(self, report: Reporter = SILENT) -> Path:
        """Return the folder with the config and the tokenizer, made at the first call.

        Raises:
            ModelError: the file is damaged, or a library that reads GGUF is missing.
            UnsupportedModelError: transformers cannot read this architecture from GGUF.
            DiskFullError: the cache folder has no room.
        """
        target = self._folder("tokenizer")
        if _has_tokenizer(target):
            return target
        report.step(f"Reading config and tokenizer of {self.path.name} (once)")
        with aside(target.parent) as folder, quiet_transformers(), self._errors():
            from transformers import AutoConfig, AutoTokenizer

            AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name).save_pretrained(folder / "made")
            tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
            tokenizer.save_pretrained(folder / "made")
            publish_folder(folder / "made", target, _has_tokenizer)
        return target

    def weights_folder(self, dtype: torch.dtype, report: Reporter = SILENT) -> Path:
        """Return the folder with the whole model, its weights unpacked to ``dtype``, made at the first call.

        Raises:
            ModelError: the file is damaged, or a library that reads GGUF is missing.
            UnsupportedModelError: transformers cannot read this architecture from GGUF.
            DiskFullError: the cache folder has no room.
        """
        number = str(dtype).removeprefix("torch.")
        target = self._folder(number)
        if _has_weights(target):
            return target
        tokenizer = self.tokenizer_folder(report)
        report.step(f"Unpacking {self.path.name} to {number} (once)")
        with aside(target.parent) as folder, quiet_transformers(), quiet_gguf(), self._errors():
            made = folder / "made"
            shutil.copytree(tokenizer, made)
            self._unpack(dtype, made)
            publish_folder(made, target, _has_weights)
        report.fact(f"kept in {target}")
        return target

    def _unpack(self, dtype: torch.dtype, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, GgufConfig

        name = self.path.name
        model, loading = AutoModelForCausalLM.from_pretrained(
            self.path.parent,
            gguf_file=name,
            quantization_config=GgufConfig(gguf_file=name, dequantize=True),
            dtype=dtype,
            output_loading_info=True,
        )
        check_loaded(model, loading, str(self.path), {})
        check_gguf_read(model, self.path)
        # What is saved is dense: a quantisation entry would make the next load look for packed weights.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)

    def _folder(self, purpose: str) -> Path:
        return cache_dir() / "gguf" / f"{self.sha256[:16]}-{purpose}"

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with disk_errors(cache_dir()):
                yield
        except (AraError, MemoryError):
            raise
        except ImportError as error:
            raise ModelError(
                f"{self.path} cannot be read: {str(error).splitlines()[0]}", "run `pip install gguf accelerate`"
            ) from error
        except Exception as error:
            reason = first_line(error)
            if "not supported" in reason:
                raise UnsupportedModelError(
                    f"{self.path}: {reason}", "use the original model in the Hugging Face format"
                ) from error
            raise ModelError(f"{self.path} cannot be read as GGUF: {reason}", "download the file again") from error


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file()


def _has_weights(folder: Path) -> bool:
    weights = (folder / "model.safetensors", folder / "model.safetensors.index.json")
    return _has_tokenizer(folder) and any(path.is_file() for path in weights)
