"""A workspace with trained masks, and commands that are killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ara.config import DecomposeConfig, TrainMasksConfig
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.train_masks import train_masks
from tests.training import TRAINING

REPOSITORY = Path(__file__).resolve().parents[2]
# Imports everything once. Then, per line of stdin, a forked process runs `ara ARGUMENTS` and kills itself, as kill -9
# does, at the N-th call of a function (before or after running its body). Answers with the wait status.
SERVER = """
import importlib, json, os, signal, sys
from ara_cli.app import main
import ara.stages.decompose, ara.stages.evaluate, ara.stages.truncate, transformers.models.llama.modeling_llama
print("ready", flush=True)
for line in sys.stdin:
    place, count, after, arguments, log = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitpid(child, 0)[1], flush=True)
        continue
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    module, _, path = place.partition(":")
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), []
    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) < count:
            return original(*args, **kwargs)
        if after == "after":
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, killed)
    sys.argv = ["ara", *arguments]
    main()
    os._exit(0)
"""


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
def killed(tmp_path_factory):
    """Return a function that runs a command in a process of its own and has it killed."""
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout.readline() == "ready\n"

        def run(place, count, after, *arguments):
            server.stdin.write(json.dumps([place, count, after, arguments, str(log)]) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            assert os.WIFSIGNALED(status), log.read_text()
            assert os.WTERMSIG(status) == signal.SIGKILL, log.read_text()

        yield run
        server.stdin.close()
