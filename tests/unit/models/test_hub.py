"""Hub failures become errors with a way out; a model in the hub's cache works offline. No network is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ara.errors import DataError, ModelError, UnsupportedModelError
from ara.models.hub import hub_errors
from ara.models.sources import resolve
from tests.tiny import save_tiny

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Response:
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None

    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


def _http(kind: type[Exception], status: int = 404) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} Client Error")
    error.response = _Response(status)  # type: ignore[attr-defined]
    return error


def _client_error() -> Exception:
    """Return the connection error of whichever HTTP client the hub library uses."""
    kind = type("ConnectError", (Exception,), {"__module__": "httpx9._exceptions"})
    return kind("[Errno -2] Name or service not known")


_FAILURES = [
    ("gated", _http(errors.GatedRepoError, 403), "is gated", "hf auth login"),
    ("unknown", _http(errors.RepositoryNotFoundError), "the hub has no model", "check the name"),
    ("name", errors.HFValidationError("bad id"), "the hub has no model", "check the name"),
    ("revision", _http(errors.RevisionNotFoundError), "has no revision 'v9'", "leave --revision out"),
    ("not-cached", errors.LocalEntryNotFoundError("not in cache"), "cannot be reached", "--local-dir"),
    ("offline", errors.OfflineModeIsEnabled("offline mode is enabled"), "cannot be reached", "ara decompose demo"),
    ("client", _client_error(), "cannot be reached", "--local-dir"),
    ("timeout", TimeoutError("read timed out"), "cannot be reached", "--local-dir"),
    ("server", _http(errors.HfHubHTTPError, 503), "cannot be reached", "--local-dir"),
    ("words", OSError("We couldn't connect to 'https://huggingface.co'"), "cannot be reached", "--local-dir"),
    ("no-config", _http(errors.RemoteEntryNotFoundError), "has no config.json", "GGUF"),
]


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
@pytest.mark.parametrize(("error", "words", "hint"), [row[1:] for row in _FAILURES], ids=[row[0] for row in _FAILURES])
def test_each_failure_has_its_words(error: Exception, words: str, hint: str, wrapped: bool) -> None:
    with pytest.raises(ModelError, match=words) as caught, hub_errors("owner/name", "v9"):
        if not wrapped:
            raise error
        raise OSError("transformers' own words") from error
    assert "owner/name" in str(caught.value)
    assert hint in str(caught.value.hint)


def test_other_errors_pass_through() -> None:
    with pytest.raises(ZeroDivisionError), hub_errors("owner/name"):
        _ = 1 / 0
    with pytest.raises(DataError), hub_errors("owner/name"):
        raise DataError("ours already")


def test_a_misspelt_repository_gets_near_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise _http(errors.RepositoryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(ModelError, match=r"did you mean qwen/qwen3-0\.6b"):
        resolve("qwen/qwen3-06b")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the hub library an empty cache of its own, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def _put_in_cache(hub_cache: Path, repository: str, family: str = "qwen3") -> Path:
    """Lay a tiny model out as a download would have left it."""
    top = hub_cache / f"models--{repository.replace('/', '--')}"
    snapshot = save_tiny(top / "snapshots" / _COMMIT, family, seed=5)
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text(_COMMIT)
    return snapshot


def test_offline_and_not_cached(hub_cache: Path) -> None:
    with pytest.raises(ModelError, match=r"not in the local cache and .* cannot be reached") as caught:
        resolve("owner/name")
    assert "hf download owner/name --local-dir DIR" in str(caught.value.hint)


@pytest.mark.parametrize("revision", [None, "main", _COMMIT])
def test_a_cached_model_works_offline_pinned_to_its_commit(hub_cache: Path, revision: str | None) -> None:
    snapshot = _put_in_cache(hub_cache, "owner/name")
    source = resolve("owner/name", revision=revision)
    assert source.identity.as_dict() == {
        "requested": "owner/name",
        "kind": "hub",
        "location": "owner/name",
        "revision": _COMMIT,
        "fingerprint": _COMMIT,
        "architecture": "Qwen3ForCausalLM",
    }
    # The branch moves on; the source must still load what it was resolved to.
    (hub_cache / "models--owner--name" / "refs" / "main").write_text("f" * 40)
    model = source.load_model(torch.float32)
    local = resolve(str(snapshot)).load_model(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), local.parameters(), strict=True))
    assert source.load_tokenizer()("hi")["input_ids"] == resolve(str(snapshot)).load_tokenizer()("hi")["input_ids"]


def test_an_alias_keeps_what_was_asked_for(hub_cache: Path) -> None:
    _put_in_cache(hub_cache, "Qwen/Qwen3-0.6B")
    identity = resolve("qwen3-0.6b").identity
    assert (identity.requested, identity.location) == ("qwen3-0.6b", "Qwen/Qwen3-0.6B")


def test_cached_config_without_weights_or_tokenizer(hub_cache: Path) -> None:
    snapshot = _put_in_cache(hub_cache, "owner/name")
    for path in snapshot.iterdir():
        if path.name != "config.json":
            path.unlink()
    source = resolve("owner/name")
    with pytest.raises(ModelError, match="owner/name"):
        source.load_model(torch.float32)
    with pytest.raises(ModelError, match="owner/name"):
        source.load_tokenizer()


def test_pickled_weights_on_the_hub_are_not_loaded(hub_cache: Path) -> None:
    snapshot = _put_in_cache(hub_cache, "owner/name")
    torch.save(load_file(snapshot / "model.safetensors"), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    # transformers itself would take them: it is our loading that must not.
    assert AutoModelForCausalLM.from_pretrained("owner/name", revision=_COMMIT)
    with pytest.raises(ModelError, match="owner/name"):
        resolve("owner/name").load_model(torch.float32)


def test_a_quantised_repository_is_refused_before_its_weights(hub_cache: Path) -> None:
    snapshot = _put_in_cache(hub_cache, "owner/name")
    for path in snapshot.glob("*.safetensors"):
        path.unlink()
    config = (snapshot / "config.json").read_text()
    (snapshot / "config.json").write_text(config.replace("{", '{"quantization_config": {"quant_method": "awq"},', 1))
    with pytest.raises(UnsupportedModelError, match=r"owner/name is already quantised \(awq\)"):
        resolve("owner/name")
