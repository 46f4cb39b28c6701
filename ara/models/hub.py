"""The Hugging Face hub: turns its failures into errors that a user can act on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ara.errors import AraError, ModelError, near_matches
from ara.jsonfile import read_object
from ara.models.aliases import ALIASES, DEMO

_SHOWN_CHARACTERS = 100
_NETWORK_PACKAGES = ("httpx", "httpcore", "requests", "urllib3", "socket", "ssl")
_NETWORK_WORDS = ("couldn't connect", "offline mode", "outgoing traffic has been disabled")


def read_hub_config(repository: str, revision: str | None) -> tuple[dict[str, Any], str]:
    """Return the ``config.json`` of a model on the hub, and its commit; cached files are not fetched again.

    Later loads name the commit, so that every stage reads the same weights even if the branch moves.

    Raises:
        ModelError: gated, unknown, unreachable, without that revision, or not a transformers model.
    """
    from huggingface_hub import hf_hub_download

    with hub_errors(repository, revision):
        path = Path(hf_hub_download(repository, "config.json", revision=revision))
    raw = read_object(path, "download the model again, or choose another revision")
    # The hub caches files as models--owner--name/snapshots/<commit>/config.json, online and offline.
    commit = path.parent.name
    if path.parent.parent.name != "snapshots" or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise ModelError(f"{path} does not tell the commit of {repository}", "pass --revision with a commit hash")
    return raw, commit


@contextmanager
def hub_errors(repository: str, revision: str | None = None) -> Iterator[None]:
    """Turn failures of ``huggingface_hub``, also those that transformers wraps, into :class:`ModelError`.

    Raises:
        ModelError: the block failed because of the hub or the network.
    """
    try:
        yield
    except AraError:
        raise
    except Exception as error:
        translated = _translate(error, repository, revision)
        if translated is None:
            raise
        raise translated from error


def unknown_model(name: str) -> ModelError:
    """Return the error for an unknown model name, with the aliases near it."""
    return ModelError(
        f"unknown model {name[:_SHOWN_CHARACTERS]!r}: {near_matches(name, ALIASES)}it is neither an alias, a folder or "
        "a .gguf file here, nor a hub id such as owner/name",
        "`ara models` lists the aliases",
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes; transformers keeps the hub's error only there."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _translate(error: Exception, repository: str, revision: str | None) -> ModelError | None:
    from huggingface_hub import errors as hub

    chain = list(_chain(error))

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    # The order matters: GatedRepoError is a RepositoryNotFoundError, LocalEntryNotFoundError an EntryNotFoundError.
    if has(hub.GatedRepoError):
        return ModelError(
            f"{repository} is gated: its owner asks you to accept a licence first",
            f"accept it at https://huggingface.co/{repository}, run `hf auth login`, then try again",
        )
    if has(hub.RepositoryNotFoundError, hub.HFValidationError):
        known = [*ALIASES, *(alias.repository for alias in ALIASES.values() if alias.name != DEMO)]
        close = {match.lower(): match for match in known}
        return ModelError(
            f"the hub has no model {repository!r}: {near_matches(repository, close)}it is misspelt or private",
            "check the name on https://huggingface.co/models; for a private model run `hf auth login`",
        )
    if has(hub.RevisionNotFoundError):
        return ModelError(
            f"{repository} has no revision {revision!r}",
            f"see https://huggingface.co/{repository}/tree/main for its branches and commits, or leave --revision out",
        )
    if any(_is_network(link) for link in chain):
        return ModelError(
            f"{repository} is not in the local cache and https://huggingface.co cannot be reached (offline?)",
            f"run once online, or download elsewhere with `hf download {repository} --local-dir DIR` and give DIR as "
            f"the model, or try `ara decompose {DEMO}`, which needs no hub",
        )
    if has(hub.EntryNotFoundError):
        return ModelError(
            f"{repository} has no config.json, so transformers cannot load it",
            "for a repository of GGUF files download one and give its path; else choose the original model",
        )
    return None


def _is_network(error: BaseException) -> bool:
    from huggingface_hub import errors as hub

    if isinstance(error, hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled | ConnectionError | TimeoutError):
        return True
    if isinstance(error, hub.HfHubHTTPError):
        response = getattr(error, "response", None)
        return response is not None and response.status_code >= 500
    # The HTTP client was replaced twice (requests, httpx, httpx2), so its package is checked instead of its class.
    if type(error).__module__.partition(".")[0].startswith(_NETWORK_PACKAGES):
        return True
    return isinstance(error, OSError) and any(words in str(error).lower() for words in _NETWORK_WORDS)
