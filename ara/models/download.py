"""What loading a model from the hub will download: the safetensors files that are not in the hub's cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ara.errors import ModelError
from ara.models.folder import INDEX, SINGLE, index_names, lacks_files
from ara.models.hub import hub_errors

_AGAIN = "choose another --revision, or report it to the owner of the repository"


@dataclass(frozen=True)
class Download:
    """Weights on the hub that are not in its cache.

    Attributes:
        files: name → bytes.
        folder: the cache.
    """

    files: Mapping[str, int]
    folder: Path

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def missing_weights(repository: str, commit: str) -> Download | None:
    """Return the weight files that loading a model will download; ``None`` if all are in the cache.

    The hub is asked only if one is missing. Weights of other formats never count: ARA does not read them.

    Args:
        repository: owner/name.
        commit: of the model.

    Raises:
        ModelError: the hub cannot be reached, has no safetensors weights, or lacks a file that their index names.
    """
    if _cached(repository, SINGLE, commit) is not None:
        return None
    index = _cached(repository, INDEX, commit)
    if index is not None:
        names = sorted(set(index_names(index, _AGAIN).values()))
        if all(_cached(repository, name, commit) for name in names):
            return None
    from huggingface_hub import HfApi, constants, hf_hub_download

    with hub_errors(repository, commit):
        listed = HfApi().model_info(repository, revision=commit, files_metadata=True).siblings or []
        sizes = {one.rfilename: one.size or 0 for one in listed}
        if SINGLE in sizes:
            names = [SINGLE]
        elif INDEX in sizes:
            index = Path(hf_hub_download(repository, INDEX, revision=commit))
            names = sorted(set(index_names(index, _AGAIN).values()))
        else:
            raise ModelError(
                f"{repository} has no safetensors weights: expected {SINGLE} or {INDEX}",
                "ARA reads safetensors only; look for a repository or revision that has them",
            )
    if lost := [name for name in names if name not in sizes]:
        raise ModelError(lacks_files(repository, lost, names), _AGAIN)
    todo = {name: sizes[name] for name in names if _cached(repository, name, commit) is None}
    return Download(todo, Path(constants.HF_HUB_CACHE)) if todo else None


def _cached(repository: str, name: str, commit: str) -> Path | None:
    """Return a file in the hub's cache, or ``None``."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name, revision=commit)
    return Path(found) if isinstance(found, str) else None
