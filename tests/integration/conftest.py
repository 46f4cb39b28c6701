"""A workspace with trained masks, and commands that are killed."""

import shutil
import signal
from pathlib import Path

import pytest

from ara.config import DecomposeConfig, TrainMasksConfig
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.train_masks import train_masks
from tests.forks import Forks, killed_at
from tests.training import TRAINING


@pytest.fixture(scope="session")
def learned_base(tmp_path_factory, tiny_settings):
    root = tmp_path_factory.mktemp("learned") / "ws"
    decompose(DecomposeConfig(**tiny_settings, method="two-sided"), Run(root))
    train_masks(TrainMasksConfig(**TRAINING), Run(root))
    return root


@pytest.fixture
def learned(learned_base, tmp_path):
    """Return a workspace with two-sided factors and trained masks, to be changed at will."""
    return Path(shutil.copytree(learned_base, tmp_path / "ws"))


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Return what runs commands in processes of their own."""
    with Forks(tmp_path_factory.mktemp("forks")) as found:
        yield found


@pytest.fixture(scope="session")
def killed(forks):
    """Return a function that runs a command in a process of its own and has it killed."""

    def run(place, call, when, *arguments):
        (ended,) = forks.run(arguments, faults=[killed_at(place, call, when)])
        assert ended.code == -signal.SIGKILL, ended.output

    return run
