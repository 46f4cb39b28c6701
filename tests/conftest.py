"""Fixtures that every test may ask for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: as many test processes as cores, one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def data_dir(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder with evaluation data, with ``ARA_DATA_DIR`` set to it; skip where there is none."""
    folder = Path(os.environ.get("ARA_DATA_DIR") or _REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"needs evaluation data: no folder {folder} (set ARA_DATA_DIR)")
    monkeypatch.setenv("ARA_DATA_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a text as options name it, ``file:PATH``: about 17,000 tokens of the tiny tokenizer."""
    from tests.tiny import tiny_texts

    path = tmp_path_factory.mktemp("text") / "story.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts()), encoding="utf-8")
    return f"file:{path}"


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny llama; only to be read."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="session")
def tiny_settings(tiny_llama: Path, tiny_text: str) -> dict[str, Any]:
    """Return the config of the decomposition in :func:`finished`."""
    return {
        "model": str(tiny_llama),
        "text": tiny_text,
        "samples": 16,
        "seq_len": 48,
        "device": "cpu",
        "dtype": "float32",
    }


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, Any], tiny_text: str) -> Path:
    """Return a workspace with all stages done at keep 0.7; only to be read (see :func:`copied`)."""
    from ara.config import AllocateConfig, DecomposeConfig, EvalConfig, TruncateConfig
    from ara.stages.common import Run
    from ara.stages.run import run_pipeline

    root = tmp_path_factory.mktemp("finished") / "ws"
    run_pipeline(
        DecomposeConfig(**tiny_settings),
        [AllocateConfig(keep=0.7, method="energy")],
        {
            "truncate": TruncateConfig(),
            "eval": EvalConfig(tasks=(tiny_text,), seq_len=64, max_windows=4, device="cpu", dtype="float32"),
        },
        Run(root),
    )
    return root


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of :func:`finished` that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "ws"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function that saves a checkpoint of a family that can be exported; each is made once."""
    from tests.checkpoints import make_checkpoint

    made: dict[str, Any] = {}

    def make(family: str, layout: str | None = "factors", **changes: Any) -> Any:
        key = repr((family, layout, changes))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), family, layout, **changes)
        return made[key]

    return make


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render chat templates in this process: starting another one takes a second."""
    from ara.data import chat, chat_renderer

    def ask(request: str, limits: chat.Limits) -> dict[str, Any]:
        return chat_renderer.render(json.loads(request))

    monkeypatch.setattr(chat, "_ask", ask)
