"""Runs an exported decoder in ONNX Runtime: whole passes, and token by token with caches that stay in place.

The key and value caches are bound once for the whole length, and past and present share them. A step appends to the
caches in place and copies only its logits.

Shapes: b batch, s new tokens, p past tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ara.errors import ModelError, NumericalError, UnavailableError, first_line
from ara.evaluation.sampling import Sampler
from ara.models.context import check_room
from export.onnx.export_report import GRAPH_FILE, Provider, read_report

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Log level of ONNX Runtime: errors only. Its warnings do not help a user.
ERRORS_ONLY = 3


class OnnxDecoder:
    """An exported model, ready to run.

    Args:
        folder: written by ``ara export``.
        provider: where to run; the export's own provider by default.
        threads: CPU threads; ONNX Runtime's choice by default.

    Raises:
        ModelError: the folder is no export, or ONNX Runtime cannot load it.
        UnavailableError: the provider is missing. ONNX Runtime itself would use the CPU without saying so.
    """

    def __init__(self, folder: Path, provider: Provider | None = None, threads: int | None = None) -> None:
        self.folder, self.about = folder, read_report(folder)
        self.provider: Provider = provider or self.about.execution_provider
        wanted = PROVIDERS[self.provider]
        _require(wanted)
        options = ort.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = ort.InferenceSession(str(folder / GRAPH_FILE), options, providers=[wanted])
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ModelError(
                f"{folder / GRAPH_FILE} cannot be loaded: {first_line(error)}", "export it again: ara export --force"
            ) from error
        # No fallback later either, when a run fails.
        self.session.disable_fallback()
        got = self.session.get_providers()[0]
        if got != wanted:
            raise UnavailableError(f"ONNX Runtime runs on {got}, expected {wanted}", _INSTALL[self.provider])
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        names = [value.name for value in self.session.get_outputs()]
        self._caches = [name for name in self._inputs if name.startswith("past_key_values.")]
        # Logits first, then the caches in the order of the inputs.
        self._outputs = ["logits", *map(_present, self._caches)]
        if not set(self._outputs) <= set(names):
            raise ModelError(
                f"{folder / GRAPH_FILE} gives {', '.join(names[:3])} …, expected logits and present.0.key …", _NAMES
            )
        unknown = [name for name in self._inputs if name not in _KNOWN and name not in self._caches]
        if unknown or not self._caches:
            raise ModelError(
                f"{folder / GRAPH_FILE} wants {', '.join(unknown) or 'no past_key_values'}; known inputs are "
                f"{', '.join(_KNOWN)} and past_key_values",
                _NAMES,
            )
        for name in self._caches:
            self._fixed(name, self._inputs[name].shape[1::2], 2)
        self._float = np.float16 if "float16" in self._inputs[self._caches[0]].type else np.float32

    @property
    def context(self) -> int:
        """Number of positions of the model."""
        return self.about.decoder.context

    @property
    def vocabulary(self) -> int:
        """Number of tokens with a logit.

        Raises:
            ModelError: the graph does not state it.
        """
        (logits,) = (value for value in self.session.get_outputs() if value.name == "logits")
        return self._fixed("logits", logits.shape[-1:], 1)[0]

    def empty_past(self, batch: int, length: int = 0) -> dict[str, np.ndarray]:
        """Return caches of zeros for ``length`` positions: input name → (b, kv heads, length, head)."""
        return {
            name: np.zeros((batch, self._inputs[name].shape[1], length, self._inputs[name].shape[3]), self._float)
            for name in self._caches
        }

    def forward(
        self, ids: np.ndarray, mask: np.ndarray | None = None, past: dict[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Read tokens and return their logits and the caches after them.

        Args:
            ids: (b, s) int64.
            mask: (b, p + s) int64, 1 for tokens and 0 for padding, which is on the right. All ones by default.
            past: caches of the previous call, by input name; none by default.

        Returns:
            Logits (b, s, v) float32, and the caches for p + s positions.
        """
        past = past or self.empty_past(len(ids))
        before = next(iter(past.values())).shape[2]
        if mask is None:
            mask = np.ones((ids.shape[0], before + ids.shape[1]), np.int64)
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": _positions(mask, ids.shape[1])}
        fed = {name: value for name, value in feed.items() if name in self._inputs}
        with self._running():
            logits, *present = self.session.run(self._outputs, {**fed, **past})
        return logits.astype(np.float32, copy=False), dict(zip(self._caches, present, strict=True))

    def generate(
        self,
        ids: np.ndarray,
        max_new_tokens: int,
        stop: set[int] | None = None,
        *,
        sampler: Sampler | None = None,
    ) -> Iterator[int]:
        """Yield the next tokens one by one, up to the first token of ``stop``, which is not yielded.

        Args:
            ids: (s) int64, the prompt.
            max_new_tokens: upper limit.
            stop: token ids that end the text; the model's own by default.
            sampler: draws every token; by default each is the most likely one.

        Raises:
            UsageError: prompt and answer together are longer than the context.
            NumericalError: the graph gives NaN.
        """
        check_room(len(ids), max_new_tokens, self.context)
        stop = set(self.about.decoder.eos) if stop is None else stop
        bound = self.bind(1, len(ids) + max_new_tokens) if self.about.decoder.shared_caches else None
        past: dict[str, np.ndarray] | None = None
        new, length = ids[None], 0
        for _ in range(max_new_tokens):
            length += new.shape[1]
            if bound is not None:
                read = self.step(bound, new, np.ones((1, length), np.int64))
            else:
                read, past = self.forward(new, None, past)
            logits = read[0, -1]
            if not np.isfinite(logits.max()):
                raise NumericalError(
                    f"the graph gives logits of {logits.max()}, expected finite numbers",
                    "export with --precision fp32, and check the checkpoint's weights",
                )
            token = int(logits.argmax()) if sampler is None else sampler(logits)
            if token in stop:
                return
            yield token
            new = np.array([[token]], np.int64)

    def bind(self, batch: int, total: int) -> ort.IOBinding:
        """Return caches for ``total`` positions of ``batch`` rows, bound to inputs and outputs.

        Past and present are one tensor; the attention appends to it in place. Only for graphs with ``shared_caches``.
        """
        binding = self.session.io_binding()
        binding.bind_output("logits", "cpu")
        for name, array in self.empty_past(batch, total).items():
            cache = ort.OrtValue.ortvalue_from_numpy(array, self.provider)
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(_present(name), cache)
        return binding

    def step(self, bound: ort.IOBinding, new: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Read the tokens that follow those in bound caches; returns logits (b, s, v).

        Args:
            bound: result of :meth:`bind`.
            new: (b, s) int64.
            mask: (b, p + s) int64, for all tokens up to these.
        """
        bound.bind_cpu_input("input_ids", new)
        bound.bind_cpu_input("attention_mask", mask)
        if "position_ids" in self._inputs:
            bound.bind_cpu_input("position_ids", _positions(mask, new.shape[1]))
        # Bound again, because their size changes after the prompt. They were bound first, so they are output 0.
        bound.bind_output("logits", "cpu")
        with self._running():
            self.session.run_with_iobinding(bound)
        logits: np.ndarray = bound.get_outputs()[0].numpy()
        return logits

    def _fixed(self, name: str, sizes: list[Any], count: int) -> list[int]:
        """Return sizes of an input or output after checking that they are ``count`` numbers."""
        if len(sizes) != count or not all(isinstance(size, int) for size in sizes):
            said = ", ".join(map(str, sizes)) or "nothing"
            raise ModelError(
                f"{self.folder / GRAPH_FILE} does not say how large {name} is: {said}",
                "export the dense model with fixed numbers of heads, head widths and tokens",
            )
        return sizes

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Turn errors of ONNX Runtime into a ``ModelError`` that names the graph."""
        try:
            yield
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise ModelError(
                f"{self.folder / GRAPH_FILE} cannot be run: {first_line(error)}", "export it again: ara export --force"
            ) from error


_KNOWN = ("input_ids", "attention_mask", "position_ids")
_NAMES = "export the dense model with the names of ONNX Runtime GenAI, or without comparing: --no-parity"
_INSTALL = {
    "cpu": "install onnxruntime",
    "cuda": "install onnxruntime-gpu and its CUDA libraries (pip install 'onnxruntime-gpu[cuda,cudnn]'), or use "
    "--execution-provider cpu",
}


def _require(provider: str) -> None:
    if provider not in ort.get_available_providers():
        raise UnavailableError(f"this ONNX Runtime has no {provider}", _INSTALL["cuda"])


def _positions(mask: np.ndarray, new: int) -> np.ndarray:
    """Return the positions of the ``new`` last tokens within their rows, padding not counted: (b, new) int64."""
    found: np.ndarray = np.maximum(mask.cumsum(1) - 1, 0)[:, -new:]
    return found


def _present(past: str) -> str:
    """Return the output that continues a cache: ``past_key_values.3.key`` → ``present.3.key``."""
    return past.replace("past_key_values.", "present.")
