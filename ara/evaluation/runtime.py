"""Runtimes that read whole checkpoint folders by themselves, such as vLLM; their code is outside of ``ara``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ara.progress import Reporter


class RunningModel(Protocol):
    """A model in a runtime."""

    def window_nlls(self, windows: torch.Tensor) -> list[float]:
        """Return the mean NLL of each window, nats per predicted token.

        Args:
            windows: (b, t) int64 token ids.
        """

    def continuation(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the greedy continuation of a prompt of token ids, up to the token that ends the text."""

    def harness(self, report: Reporter, label: str) -> Any:
        """Return a model of lm-eval, for :func:`ara.evaluation.harness.ask_through`.

        Args:
            report: receives progress.
            label: task and model, for the progress bar and for errors.
        """


class Timing(NamedTuple):
    """How long requests took that were made at once.

    Attributes:
        seconds: until the last token of all.
        first_tokens: until the first token, of each request.
    """

    seconds: float
    first_tokens: tuple[float, ...]


class ServiceSize(NamedTuple):
    """What a service must be able to hold.

    Attributes:
        requests: most requests at once.
        tokens: of a request, prompt and answer together.
        cache_bytes: of the keys and values of all of them.
    """

    requests: int
    tokens: int
    cache_bytes: int


class Service(Protocol):
    """A model in a runtime that answers requests.

    Attributes:
        threads: CPU threads that compute.
    """

    threads: int

    def answer(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        """Answer prompts of token ids at once, each by ``new_tokens`` tokens."""

    def peak_memory(self) -> int:
        """Return the peak memory of its process, in bytes; see :func:`ara.environment.peak_memory_bytes`."""


class Runtime(Protocol):
    """Runs every model in a process of its own.

    Attributes:
        title: its name in messages.
        spare_positions: how many positions of the model it needs beside those of the text.
    """

    title: str
    spare_positions: int

    def device(self) -> str:
        """Return where it runs its models, as a torch device name.

        Raises:
            UnavailableError: it is not installed.
        """

    def several_at_once(self, device: str) -> bool:
        """Tell whether several models can run on a device at once, if they fit into its memory."""

    def serve(self, folder: Path, dtype: str, size: ServiceSize) -> AbstractContextManager[Service]:
        """Serve a checkpoint inside the block; arguments and errors as of :meth:`open`.

        Args:
            size: what it must be able to hold.
        """

    def open(self, folder: Path, dtype: str) -> AbstractContextManager[RunningModel]:
        """Run a checkpoint inside the block.

        Args:
            folder: dense or compressed, with a tokenizer.
            dtype: of weights and activations, as torch names it.

        Raises:
            ModelError: it cannot run this checkpoint.
            UnavailableError: its process was killed.
        """
