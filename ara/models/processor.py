"""The files beside the weights that turn text, pictures and sound into the inputs of a model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Files of transformers' processors; a tokenizer saves its own, and the template of chats.
_NAMES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


class Saveable(Protocol):
    """What writes its files into a folder: a tokenizer, or a :class:`Processor`."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write the files."""


@dataclass(frozen=True)
class Processor:
    """The tokenizer of a model, and the files of its processor for pictures and sound.

    The processor itself is not loaded: it may need packages that ARA does not use.

    Attributes:
        tokenizer: of the model.
        files: of the processor; none if the model reads only text.
    """

    tokenizer: PreTrainedTokenizerBase
    files: tuple[Path, ...] = ()

    def save_pretrained(self, save_directory: Any) -> None:
        """Write the tokenizer, and copy those files that it has not written."""
        self.tokenizer.save_pretrained(save_directory)
        for path in self.files:
            if not (copy := Path(save_directory) / path.name).exists():
                shutil.copyfile(path, copy)


def processor_files(origin: str, revision: str | None) -> tuple[Path, ...]:
    """Return the files of the processor of a model in a folder or on the hub, from which they are downloaded."""
    from transformers.utils import cached_file

    found = (
        cached_file(origin, name, revision=revision, _raise_exceptions_for_missing_entries=False) for name in _NAMES
    )
    return tuple(Path(path) for path in found if path is not None)
