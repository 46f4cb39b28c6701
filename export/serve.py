"""``ara serve``: which server runs a checkpoint, and how it is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ara.config import ServeConfig
from ara.errors import UnavailableError, UsageError
from ara.models.checkpoint import check_complete
from ara.stages.common import Run
from export.sources import model_folder

# Options of both servers that ara sets; given twice, the address that ara prints would be wrong.
_OURS = ("--host", "--port", "--model")


@dataclass(frozen=True)
class _Server:
    """A server that can load checkpoint folders.

    Attributes:
        title: its name in messages.
        needs: packages that it imports.
        install: how to install them.
        words: returns its command line, after ``python``, for a folder.
    """

    title: str
    needs: tuple[str, ...]
    install: str
    words: Callable[[Path], list[str]]

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]


# In the order of preference.
_SERVERS = {
    "vllm": _Server(
        "vLLM",
        ("vllm",),
        "pip install vllm",
        # `vllm serve` runs this module; the command itself does not start in the CPU build.
        lambda folder: ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)],
    ),
    "transformers": _Server(
        "transformers",
        ("fastapi", "uvicorn", "openai"),
        "pip install 'transformers[serving]'",
        lambda folder: ["-m", "export.transformers_server", str(folder)],
    ),
}


@dataclass(frozen=True)
class Service:
    """A server that can be started.

    Attributes:
        server: ``vllm`` or ``transformers``.
        title: its name in messages.
        folder: the checkpoint; also the name of the model in requests.
        url: base address of the OpenAI interface.
        command: program and arguments.
    """

    server: str
    title: str
    folder: Path
    url: str
    command: tuple[str, ...]

    def start(self) -> None:
        """Replace this process by the server, so that signals reach it. Its output goes to stderr."""
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM would report the machine and the model to its makers
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(2, 1)
        os.execv(self.command[0], self.command)


def service(
    config: ServeConfig,
    run: Run,
    words: Sequence[str] = (),
    *,
    checkpoint: str | None = None,
    source: Path | None = None,
) -> Service:
    """Return the server for a checkpoint, after the checkpoint's tensors were compared with its config.

    Args:
        config: server and address.
        run: workspace and reporter.
        words: further arguments of the server.
        checkpoint: which one, as NAME or STAGE/NAME; the latest by default.
        source: a checkpoint folder to serve instead of a result of the workspace.

    Raises:
        UsageError: the words are no options, or options of ``ara serve``.
        UnavailableError: the server is not installed.
        AraError: no checkpoint, or one that does not load.
    """
    _check_words(words)
    folder = model_folder(None, run, checkpoint=checkpoint, source=source).resolve()
    name = _installed(config.server)
    run.report.step(f"Checking {folder}")
    check_complete(folder)
    address = ("--host", config.host, "--port", str(config.port))
    host = f"[{config.host}]" if ":" in config.host else config.host
    # -P: nothing is imported from the current folder.
    command = (sys.executable, "-P", *_SERVERS[name].words(folder), *address, *words)
    return Service(name, _SERVERS[name].title, folder, f"http://{host}:{config.port}/v1", command)


def _check_words(words: Sequence[str]) -> None:
    if words and not words[0].startswith("-"):
        raise UsageError(
            f"{words[0]!r} is no option of a server",
            "name a folder with --source FOLDER; options of the server come after --",
        )
    for word in words:
        if word.partition("=")[0] in _OURS:
            raise UsageError(
                f"{word} is given to the server", "give --host and --port ahead of --, and the model by --source"
            )


def _installed(wanted: str) -> str:
    """Return the server to start: the one that is wanted, or with ``auto`` the first that is installed."""
    names = list(_SERVERS) if wanted == "auto" else [wanted]
    found = next((name for name in names if not _SERVERS[name].missing), None)
    if found is None:
        lacking = "; ".join(f"{', '.join(_SERVERS[name].missing)} for {_SERVERS[name].title}" for name in names)
        raise UnavailableError(
            f"no server can be started; not installed: {lacking}",
            ", or ".join(_SERVERS[name].install for name in names),
        )
    return found
