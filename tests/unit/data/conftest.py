"""Fixtures of the tests about texts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ara.data import chat, chat_renderer
from ara.data.chat import Limits


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render in this process: starting another one takes a second."""

    def ask(request: str, limits: Limits) -> dict[str, Any]:
        return chat_renderer.render(json.loads(request))

    monkeypatch.setattr(chat, "_ask", ask)
