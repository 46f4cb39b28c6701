"""Times of single linear layers in a runtime, dense and at some ranks, all in one interleaved run.

In every round each layer does one pass, in rotating order. So a temporary slowdown of the machine affects all layers,
and the weights of a layer have mostly left the caches before its next pass, as in a model. The time of a pass includes
that of one call of the runtime.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ara.evaluation.speed import Prepared, seconds_in_turn
from ara.evaluation.timing import synchronize, torch_threads
from ara.layouts import layout_named
from ara.models.placement import torch_dtype
from ara.models.weights import LinearSpec
from ara.progress import SILENT, Reporter


@dataclass(frozen=True)
class LayerRuntime:
    """What determines the time of a layer, apart from the machine.

    Attributes:
        backend: torch, or the name of an export target.
        device: as torch names it.
        precision: of the products.
        threads: CPU threads.
        library: name and version.
    """

    backend: str
    device: str
    precision: str
    threads: int
    library: str

    @property
    def clock(self) -> Callable[[], float]:
        """Processor time of this thread, if it does all the work: other work on the machine hardly changes it."""
        return time.thread_time if self.device == "cpu" and self.threads == 1 else time.perf_counter


class LayerRunner(Protocol):
    """Runs single linear layers."""

    @property
    def runtime(self) -> LayerRuntime:
        """Where and how it runs them."""

    def prepare(self, spec: LinearSpec, rank: int | None, tokens: int) -> Prepared:
        """Return a layer with random weights and inputs.

        Args:
            spec: shape (m, n) and layout.
            rank: k; ``None`` for the dense layer.
            tokens: rows t of the inputs.
        """


class TorchLayers:
    """Layers in torch, as a checkpoint has them; see :class:`LayerRunner`.

    Args:
        device: as torch names it.
        dtype: name of the dtype.
        threads: CPU threads.
    """

    def __init__(self, device: str, dtype: str, threads: int) -> None:
        self.runtime = LayerRuntime("torch", device, dtype, threads, f"torch {torch.__version__}")

    def prepare(self, spec: LinearSpec, rank: int | None, tokens: int) -> Prepared:
        """Build the module of the layer."""
        device, dtype = torch.device(self.runtime.device), torch_dtype(self.runtime.precision)
        tensors = {
            name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).to(device)
            for name, tensor in random_tensors(spec, rank).items()
        }
        module: nn.Module
        if rank is None:
            module = nn.Linear(spec.n, spec.m, bias=False, device="meta").requires_grad_(False)
            module.load_state_dict(tensors, assign=True)
        else:
            module = layout_named(spec.layout).hold(tensors, spec.m)
        x = torch.randn(1, tokens, spec.n, generator=_generator()).to(device, dtype)

        @torch.inference_mode()
        def run() -> torch.Tensor:
            y: torch.Tensor = module(x)
            synchronize(device)
            return y

        return Prepared(run)


def random_tensors(spec: LinearSpec, rank: int | None) -> dict[str, torch.Tensor]:
    """Return random tensors of a layer, as a checkpoint stores them: float32, and indices in int32."""
    generator = _generator()
    if rank is None:
        return {"weight": torch.randn(spec.m, spec.n, generator=generator)}
    layout = layout_named(spec.layout)
    return {
        name: torch.randperm(*shape, generator=generator).int()
        if name in layout.indices
        else torch.randn(shape, generator=generator)
        for name, shape in layout.store(spec.m, spec.n, rank).items()
    }


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def layer_seconds(
    runner: LayerRunner,
    layers: Sequence[tuple[LinearSpec, int | None]],
    tokens: int,
    rounds: int,
    report: Reporter = SILENT,
) -> list[float]:
    """Return the median seconds of a pass through every layer.

    Args:
        runner: runs them.
        layers: layers and ranks; ``None`` for the dense layer.
        tokens: rows of the inputs.
        rounds: passes of each layer, without one warm-up pass.
        report: progress.
    """
    runtime = runner.runtime
    prepared: dict[int, Prepared] = {}
    with report.bar("Preparing layers", len(layers)) as bar:
        for at, (spec, rank) in enumerate(layers):
            prepared[at] = runner.prepare(spec, rank, tokens)
            bar.advance()
    with torch_threads(runtime.threads), report.bar("Timing layers", len(layers) * (rounds + 1)) as bar:
        seconds = seconds_in_turn(prepared, rounds, clock=runtime.clock, advance=bar.advance)
    return [statistics.median(found) for found in seconds.values()]
