"""A model whose factorised layers switch between all ranks, for probing, training and comparing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import safe_open

from ara.distributed.group import ALONE, Group
from ara.errors import NumericalError
from ara.masks.linear import MaskedLinear
from ara.models.likelihood import nll_of_windows
from ara.models.losses import TargetSampler, drawn_targets, losses_at
from ara.models.recompute import Recomputation, choose_recomputation
from ara.models.scores import Head, Place, Scores
from ara.models.weights import LinearSpec
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LossKind = Literal["ce", "kl", "fisher"]


@dataclass(frozen=True)
class MaskGradients:
    """Loss of a batch, and its gradient for each component.

    Attributes:
        loss: mean over predicted tokens, nats.
        stderr: standard error of that mean over windows; infinite for a single window.
        masks: module path → ∂loss/∂p (r) float32, on the CPU.
    """

    loss: float
    stderr: float
    masks: dict[str, torch.Tensor]


class MaskedModel:
    """Wraps a dense model in place; starts dense.

    On a CPU the factors are views of memory-mapped files: processes share them, and unused parts are not read.
    Several processes share the windows of :meth:`nll` and :meth:`gradients`, and all get the whole result.

    Attributes:
        group: the processes.
        specs: the factorised layers.
        layers: module path → the layer that replaces it.
        backward_passes: number of windows that a backward pass has read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        specs: Sequence[LinearSpec],
        files: Mapping[str, Path],
        group: Group = ALONE,
        folder: Path | None = None,
    ) -> None:
        """Replace the linear layers of ``model``.

        Args:
            model: a causal language model in evaluation mode.
            specs: its factorised layers.
            files: module path → safetensors file with ``<path>.A`` (s, n) and ``<path>.B`` (m, s), s ≤ r.
            group: the processes that share windows.
            folder: for inputs of blocks that a backward pass runs again; without it they stay in memory.
        """
        self.group = group
        self.model, self.specs = model.requires_grad_(False), list(specs)
        self.layers: dict[str, MaskedLinear] = {}
        self.backward_passes = 0
        self._folder, self._head = folder, Head(model)
        self._recomputation: Recomputation | None = None
        for path in dict.fromkeys(files[spec.name] for spec in self.specs):
            with safe_open(path, "pt") as file:
                for spec in (spec for spec in self.specs if files[spec.name] == path):
                    a = file.get_tensor(f"{spec.name}.A").to(model.device, model.dtype)
                    b = file.get_tensor(f"{spec.name}.B").to(model.device, model.dtype)
                    layer = MaskedLinear(spec.weight.owner(model), spec.weight.read(model), a, b)
                    spec.weight.replace(model, layer)
                    self.layers[spec.name] = layer

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        device: torch.device = self.model.device
        return device

    def use(self, ranks: Mapping[str, int | None]) -> None:
        """Cut layers to the given ranks, ``None`` for dense; layers not named do not change."""
        for name, rank in ranks.items():
            self.layers[name].rank, self.layers[name].soft = rank, False

    def use_soft(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Multiply the components of the named layers, all stored, by masks (r), values from 0 to 1."""
        for name, mask in masks.items():
            self.layers[name].mask = mask.detach().to(self.device, torch.float32)
            self.layers[name].soft = True

    def use_dense(self) -> None:
        """Make all layers dense."""
        self.use(dict.fromkeys(self.layers, None))

    @torch.no_grad()
    def nll(
        self, windows: torch.Tensor, batch_size: int = 4, report: Reporter = SILENT, label: str = ""
    ) -> torch.Tensor:
        """Return the mean negative log-likelihood of each window under the current cut.

        Args:
            windows: (w, t) int64.
            batch_size: windows per forward pass.
            report: shows a progress bar if ``label`` is given.
            label: of the bar.

        Returns:
            (w) float64, nats per predicted token; may be NaN.
        """
        rows = self.group.share(len(windows), batch_size)
        own = torch.empty(0, dtype=torch.float64)
        if len(rows):
            own = nll_of_windows(self._head.scores, windows[rows], self.device, batch_size, report, label)
        return self._of_all(own, rows, len(windows))

    @torch.no_grad()
    def kl(self, windows: torch.Tensor, teacher: Scores) -> torch.Tensor:
        """Return KL(dense ‖ current cut) of each window, nats per predicted token.

        Args:
            windows: (w, t) int64, one batch.
            teacher: the dense model's :meth:`scores` of the same windows.
        """
        ids = windows.to(self.device)
        losses = self._head.scores(ids).losses(partial(_loss, ids, teacher))
        return losses.double().mean(1).cpu()

    @torch.no_grad()
    def scores(self, windows: torch.Tensor) -> Scores:
        """Return the next-token scores of one batch (b, t) under the current cut."""
        return self._head.scores(windows.to(self.device))

    def prepare(self, windows: torch.Tensor) -> None:
        """Run what passes over a batch (b, t) need once; before hooks that must see these passes alone."""
        self._head.prepare(windows.to(self.device))

    def gradients(
        self, windows: torch.Tensor, loss: LossKind = "ce", batch_size: int = 4, seed: int = 0
    ) -> MaskGradients:
        """Return the loss of the current cut, and its gradient for every component of every layer.

        Args:
            windows: (w, t) int64.
            loss: ``ce``: cross-entropy of the text; ``kl``: divergence from the dense model; ``fisher``: cross-entropy
                of targets sampled from the current model.
            batch_size: windows per pass.
            seed: of the sampling.

        Raises:
            NumericalError: the loss, or its gradient, is NaN or infinite.
        """
        predicted = windows.shape[0] * (windows.shape[1] - 1)
        with self.listening():
            losses = self.backward(windows, loss, batch_size, seed)
            # Divided after the backward pass: in float16 the gradient of a mean over many tokens would underflow.
            sums = {name: _gradient(layer) for name, layer in self.layers.items()}
            self.group.total(list(sums.values()))
            masks = {name: total / predicted for name, total in sums.items()}
        if not all(bool(gradient.isfinite().all()) for gradient in masks.values()):
            raise NumericalError(
                f"the loss is {float(losses.mean()):.4f}, and its gradient is NaN or infinite",
                "the model's numbers are too small or too large for its type: try --dtype float32 or bfloat16",
            )
        stderr = float(losses.std()) / len(losses) ** 0.5 if len(losses) > 1 else math.inf
        return MaskGradients(float(losses.mean()), stderr, masks)

    def backward(
        self,
        windows: torch.Tensor,
        loss: LossKind,
        batch_size: int,
        seed: int,
        *,
        report: Reporter = SILENT,
        label: str = "",
    ) -> torch.Tensor:
        """Run forward and backward passes of the summed loss; call it inside :meth:`listening`.

        Args:
            windows: (w, t) int64.
            loss: see :meth:`gradients`.
            batch_size: windows per pass.
            seed: of the sampling.
            report: shows a progress bar.
            label: of the bar.

        Returns:
            (w) float64 on the CPU, mean loss of each window, nats per predicted token.

        Raises:
            NumericalError: the mean loss is NaN or infinite.
        """
        rows = self.group.share(len(windows), batch_size)
        sampler = TargetSampler(seed, rows.tolist())
        found = [torch.empty(0, dtype=torch.float64)]
        recomputation = self._choose_recomputation(windows, batch_size, report)
        with report.bar(label, len(rows)) as bar, torch.enable_grad(), recomputation.active():
            for batch in windows[rows].split(batch_size) if len(rows) else ():
                ids = batch.to(self.device)
                teacher = self._teacher(ids) if loss == "kl" else None
                numbers = sampler.numbers(*ids.shape) if loss == "fisher" else None
                values = self._head.scores(ids).losses(partial(_loss, ids, teacher, numbers=numbers))
                del teacher
                values.sum().backward()
                found.append(values.detach().double().mean(1).cpu())
                self.backward_passes += len(batch)
                bar.advance(len(batch))
        self.backward_passes += len(windows) - len(rows)
        losses = self._of_all(torch.cat(found), rows, len(windows))
        mean = float(losses.mean())
        if not math.isfinite(mean):
            raise NumericalError(
                f"the loss is {mean}", "the model computes NaN or infinity: try --dtype float32 or a higher --keep"
            )
        return losses

    def _of_all(self, own: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Return the float64 values of all ``count`` windows from those of this process, which are exact."""
        values = torch.zeros(count, dtype=torch.float64)
        values[rows] = own
        self.group.total([values])
        return values

    @contextmanager
    def listening(self, observers: Mapping[str, Callable[[torch.Tensor], None]] | None = None) -> Iterator[None]:
        """Within this context, backward passes compute mask gradients and call the ``observers``, by module path."""
        for name, layer in self.layers.items():
            if not layer.soft or layer.mask is None:
                layer.mask = torch.ones(layer.full_rank, device=self.device)
            layer.mask = layer.mask.requires_grad_(True)
            layer.mask.grad = None
            layer.observer = observers.get(name) if observers else None
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.observer = None
                layer.mask = layer.mask.detach() if layer.soft and layer.mask is not None else None

    def _choose_recomputation(self, windows: torch.Tensor, batch_size: int, report: Reporter) -> Recomputation:
        """Return what backward passes compute again; decided in the first one."""
        if self._recomputation is None:
            ids, most = windows[:1].to(self.device), min(batch_size, len(windows))
            self._recomputation = choose_recomputation(self.model, ids, most, report, self._folder)
        return self._recomputation

    @torch.no_grad()
    def _teacher(self, ids: torch.Tensor) -> Scores:
        """Return the scores of the dense model; the cut is restored."""
        cut = {name: (layer.rank, layer.soft) for name, layer in self.layers.items()}
        self.use_dense()
        try:
            return self._head.scores(ids)
        finally:
            for name, (rank, soft) in cut.items():
                self.layers[name].rank, self.layers[name].soft = rank, soft


def _loss(
    ids: torch.Tensor,
    teacher: Scores | None,
    logits: torch.Tensor,
    place: Place,
    numbers: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of the tokens ``ids`` (b, t) at one place, or that of a teacher, or of drawn tokens."""
    targets = place.of(ids[:, 1:]) if numbers is None else drawn_targets(logits, place.of(numbers))
    return losses_at(logits, targets, None if teacher is None else teacher.at(place))


def _gradient(layer: MaskedLinear) -> torch.Tensor:
    assert layer.mask is not None
    # A process may have no window.
    found = layer.mask.grad if layer.mask.grad is not None else torch.zeros_like(layer.mask)
    return found.detach().cpu()
