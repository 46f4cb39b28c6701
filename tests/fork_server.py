"""Runs commands in forked processes, so that everything is imported once; started by :mod:`tests.forks`.

A line of stdin is a request: a JSON object, see :class:`tests.forks.Forks`. The answer is a line with the wait status
and the seconds of every process.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from typing import Any

from ara_cli.app import main


def serve() -> None:
    # What the commands of the tests import.
    stages = [f"ara.stages.{name}" for name in ("decompose", "evaluate", "truncate", "recover")]
    levels = [f"ara.recovery.{name}" for name in ("closed", "block", "distill")]
    for module in (*stages, *levels, "ara.distributed.torch_group"):
        importlib.import_module(module)
    importlib.import_module("transformers.models.llama.modeling_llama")
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        agent = _agent(request["port"]) if request["size"] > 1 else None
        begun = time.monotonic()
        ranks: dict[int, int] = {}
        for rank in range(request["size"]):
            child = os.fork()
            if not child:
                _run(rank, request)
            ranks[child] = rank
        found: list[Any] = [None] * len(ranks)
        while None in found:
            child, status = os.wait()
            found[ranks[child]] = status, time.monotonic() - begun
        if agent is not None:
            os.kill(agent, signal.SIGKILL)
            os.waitpid(agent, 0)
        print(json.dumps(found), flush=True)


def _agent(port: int) -> int:
    """Start a process with the store of all others, which outlives them as that of torchrun does; return its id."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        os.write(told, b"!")
        while store is not None:
            signal.pause()
    os.close(told)
    os.read(ready, 1)
    os.close(ready)
    return child


def _run(rank: int, request: dict[str, Any]) -> None:
    with open(f"{request['log']}.{rank}", "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if request["size"] > 1:
        size = str(request["size"])
        os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"])}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(True)
    for fault in request["faults"]:
        if fault["rank"] == rank:
            _inject(fault)
    if "call" in request:
        module, _, function = request["call"].partition(":")
        getattr(importlib.import_module(module), function)()
    else:
        sys.argv = ["ara", *request["arguments"]]
        main()
    sys.exit()


def _inject(fault: dict[str, Any]) -> None:
    """Replace an attribute: by a value, or by a function that fails at one of its calls."""
    module, _, path = fault["place"].partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) != fault["call"]:
            return original(*args, **kwargs)
        if fault["when"] == "after":
            original(*args, **kwargs)
        if "error" in fault:
            from ara.errors import NumericalError

            raise NumericalError(fault["error"], "no hint")
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, fault.get("value", failing))


if __name__ == "__main__":
    serve()
