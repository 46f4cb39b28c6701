"""Which bars of the libraries are seen while a model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from ara.models.silence import silence_transformers
from tests.tiny import save_tiny


@pytest.fixture(autouse=True)
def all_bars(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a session on a terminal leaves it: no variable hides the hub's bars."""
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.enable_progress_bar()
    yield
    if not bars:
        logging.disable_progress_bar()
    if hub_bars:
        enable_progress_bars()


@pytest.mark.parametrize("downloads", [False, True])
def test_only_downloads_may_show_a_bar(downloads: bool) -> None:
    with silence_transformers(downloads=downloads):
        assert not logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled() is not downloads
    assert logging.is_progress_bar_enabled()
    assert not are_progress_bars_disabled()


def test_loading_weights_shows_no_bar_even_where_downloads_may(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    capfd.readouterr()
    with silence_transformers(downloads=True):
        AutoModelForCausalLM.from_pretrained(folder)
    assert capfd.readouterr() == ("", "")
    AutoModelForCausalLM.from_pretrained(folder)
    assert "Loading weights" in capfd.readouterr().err  # it is this bar that was hidden
