"""What all cases of a run share: valid files, a process that has imported everything, and how one case is run."""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import shlex
import shutil
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.fuzz import harness
from tests.fuzz.harness import ENVIRONMENT, Case
from tests.fuzz.sandbox import Sandbox
from tests.fuzz.targets import make_case
from tests.fuzz.workspaces import Seeds


class Fuzzer:
    """Everything that the cases of one run share; it forks, so it is made in a process with one thread.

    Args:
        root: an empty folder of its own.
        seed: of all cases.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        os.environ.update(ENVIRONMENT)
        for name in ("ARA_DATA_DIR", "ARA_WORKSPACE", "ARA_CACHE_DIR", "HF_TOKEN"):
            os.environ.pop(name, None)
        _import(_ours())
        _import(_apart(lambda: _prepare(root / "seeds")))
        self.seeds = Seeds(root / "seeds")
        self._sandbox: Sandbox | None = None
        self._noise: Path | None = None
        # Workers share the pages of all that is imported until a collection of garbage writes into them.
        gc.freeze()

    def case(self, target: str, index: int) -> Case:
        """Return one case."""
        return make_case(target, self.seed, index, self.seeds)

    def work(self, slot: int, target: str, index: int) -> dict[str, Any]:
        """Run one case in this process, a forked one; returns JSON data."""
        if self._sandbox is None:
            where = self.root / f"worker-{slot}"
            shutil.rmtree(where, ignore_errors=True)
            self._sandbox = Sandbox(where, self.root / "seeds")
            self._noise = self.root / f"noise-{slot}"
            _redirect(self._noise)
        case = self.case(target, index)
        start = _cpu_seconds()
        outcome = harness.run(case, self._sandbox, self._noise)
        seconds = _cpu_seconds() - start
        failures = [[failure.kind, failure.signature, failure.text] for failure in outcome.failures]
        return {"code": outcome.code, "failures": failures, "size": case.size, "cpu": seconds}

    def show(self, target: str, index: int) -> bool:
        """Run one case in this process and print all that is known of it; tells whether it holds the property."""
        case = self.case(target, index)
        print(f"{target} {index} of seed {self.seed}: ara {shlex.join(case.argv)}")
        for name, content in case.files.items():
            print(f"  {name}: {content[:600]!r}" if isinstance(content, bytes) else f"  {name}: {content}")
        outcome = harness.run(case, Sandbox(self.root / "shown", self.root / "seeds"))
        print(f"exit code {outcome.code}\n{outcome.output}")
        for failure in outcome.failures:
            print(f"\n{failure.kind}: {failure.signature}\n{failure.text}")
        return not outcome.failures


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has started and that have ended."""
    import resource  # not on Windows, which cannot fork either

    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _apart(work: Any) -> Any:
    """Return what ``work`` returns, done in a forked process, so that no thread of it is left in this one."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as pipe:
                json.dump(work(), pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    if os.waitpid(pid, 0)[1] != 0:
        raise SystemExit("error: the valid files cannot be made (what went wrong is above)")
    return json.loads(text)


def _prepare(seeds: Path) -> list[str]:
    """Make the valid files, by the commands themselves; returns the modules that these needed."""
    import torch
    from typer.testing import CliRunner

    from ara_cli.app import app
    from tests.fuzz.seeds import make_seeds

    torch.set_num_threads(1)
    _leave_out()
    folders = {"ARA_CACHE_DIR": "cache", "TMPDIR": "tmp", "HOME": "home", "HF_HOME": "home/hf"}
    for name in ("cwd", *folders.values()):
        (seeds / name).mkdir(parents=True, exist_ok=True)
    os.environ.update({name: f"{seeds}/{folder}" for name, folder in folders.items()})
    os.chdir(seeds / "cwd")

    def ara(*argv: str) -> None:
        sys.argv = ["ara", *argv]
        result = CliRunner().invoke(app, list(argv))
        if result.exit_code != 0:
            raise RuntimeError(f"ara {shlex.join(argv)}: {result.output}") from result.exception

    _redirect(seeds / "tmp" / "noise")
    make_seeds(seeds, ara)
    for name in ("cwd", "cache", "tmp", "home"):
        shutil.rmtree(seeds / name)
    return sorted(name for name in sys.modules if not name.startswith(("__", "tests.fuzz")))


def _ours() -> list[str]:
    """Return the names of all our modules, and of what they import when they are first needed."""
    import ara
    import ara_cli
    import export

    found = [
        module.name
        for package in (ara, ara_cli, export)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not module.name.endswith("__main__")
    ]
    return [*found, "transformers.models.llama.modeling_llama", "matplotlib.pyplot", "pyarrow.parquet", "gguf"]


def _import(names: list[str]) -> None:
    """Import what a command would import, once for all workers."""
    for name in names:
        with suppress(Exception):  # names that libraries make up
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    _leave_out()


def _leave_out() -> None:
    """Replace what takes seconds and reads nothing foreign: a process to measure memory in, lm-eval's list of tasks."""
    from ara.evaluation import tasks
    from ara.stages import bench

    bench.peak_memory = lambda *_: 2**28  # type: ignore[assignment]
    tasks._index = lambda: SimpleNamespace(all_tasks=())  # type: ignore[assignment]


def _redirect(file: Path) -> None:
    """Send what libraries write past Python's streams to a file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
