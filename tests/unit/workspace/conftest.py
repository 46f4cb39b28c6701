"""A workspace of a made-up model."""

import pytest

from ara.workspace.store import Workspace
from tests.stored import MODEL


@pytest.fixture
def workspace(tmp_path):
    made = Workspace.open(tmp_path / "ws", create=True)
    made.bind(MODEL)
    return made
