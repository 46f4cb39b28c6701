"""Which server is started, and with which words."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ara.config import ServeConfig, build
from ara.errors import ModelError, ProblemsError, UnavailableError, UsageError
from ara.stages.common import Run
from export import serve
from export.serve import Service, service

EXTRAS = ("fastapi", "uvicorn", "openai")


@pytest.fixture
def folder(checkpoint: Callable[..., Any]) -> Path:
    found: Path = checkpoint("llama").folder
    return found


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets which packages seem to be installed."""

    def only(*names: str) -> None:
        monkeypatch.setattr(serve, "find_spec", lambda name: SimpleNamespace() if name in names else None)

    return only


def made(folder: Path, *words: str, **settings: Any) -> Service:
    return service(build(ServeConfig, **settings), Run(folder), words, source=folder)


@pytest.mark.parametrize(
    ("packages", "settings", "server"),
    [
        (("vllm",), {}, "vllm"),
        (("vllm", *EXTRAS), {}, "vllm"),
        (EXTRAS, {}, "transformers"),
        (("vllm", *EXTRAS), {"server": "transformers"}, "transformers"),
    ],
)
def test_vllm_goes_first(
    folder: Path, installed: Callable[..., None], packages: tuple[str, ...], settings: dict[str, Any], server: str
) -> None:
    installed(*packages)
    found = made(folder, "--dtype", "float32", port=8123, **settings)
    assert found.server == server and found.folder == folder and found.url == "http://127.0.0.1:8123/v1"
    start = (
        ["-m", "vllm.entrypoints.openai.api_server", "--model"]
        if server == "vllm"
        else ["-m", "export.transformers_server"]
    )
    address = ["--host", "127.0.0.1", "--port", "8123"]
    assert list(found.command) == [sys.executable, "-P", *start, str(folder), *address, "--dtype", "float32"]


@pytest.mark.parametrize(
    ("packages", "settings", "words", "hint"),
    [
        ((), {}, "vllm for vLLM; fastapi, uvicorn, openai for transformers", "pip install vllm, or pip install"),
        (("fastapi",), {"server": "transformers"}, "not installed: uvicorn, openai for transformers", "[serving]"),
        (EXTRAS, {"server": "vllm"}, "not installed: vllm for vLLM", "pip install vllm"),
    ],
)
def test_a_server_that_is_not_installed(
    folder: Path,
    installed: Callable[..., None],
    packages: tuple[str, ...],
    settings: dict[str, Any],
    words: str,
    hint: str,
) -> None:
    installed(*packages)
    with pytest.raises(UnavailableError, match=words) as caught:
        made(folder, **settings)
    assert caught.value.hint is not None and hint in caught.value.hint


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("FOLDER",), "'FOLDER' is no option of a server"),
        (("--dtype", "float32", "--port=1"), "--port=1 is given to the server"),
        (("--model", "other"), "--model is given to the server"),
    ],
)
def test_words_that_are_not_for_the_server(folder: Path, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        made(folder, *words)
    assert caught.value.hint is not None and "--source" in caught.value.hint


def test_addresses(folder: Path, installed: Callable[..., None]) -> None:
    installed("vllm")
    assert made(folder, host="::1").url == "http://[::1]:8000/v1"
    for settings in ({"port": 0}, {"port": 65536}, {"host": ""}, {"server": "nginx"}):
        with pytest.raises(ProblemsError):
            build(ServeConfig, **settings)


def test_a_damaged_checkpoint_is_refused_before_a_server_starts(
    folder: Path, installed: Callable[..., None], tmp_path: Path
) -> None:
    installed("vllm")
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copied / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        made(copied)
