"""Level ``closed``: every layer is fitted to the inputs that it really gets, one by one.

Truncation fits a layer to the inputs of the dense model. In the compressed model the layers before it have changed
these inputs. The level goes through the model block by block, and in a block through the groups of layers with the same
input (q, k and v; o; gate and up; down). Each group sees what the groups before it now give. Layers that stayed dense
are corrected as well. :mod:`ara.recovery.correction` has the mathematics.

Several processes share the windows, and the layers of a group. The owner of a layer gets the sums of all processes and
corrects it; the others get its new numbers.

The experts of a block are corrected together, first what maps up, then what maps down. An expert that saw fewer tokens
than its input is wide stays as it is, and so do those whose tokens cannot be paired (Llama 4).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ara.calibration.moments import input_groups, steps_of
from ara.decomposition.parallel import cost, map_layers
from ara.distributed.sharing import share_out
from ara.environment import trim_heap
from ara.layouts.modeling_ara import CompressedLinear
from ara.models.blocks import hidden_states
from ara.models.weights import LinearSpec, bias_of, find_blocks
from ara.recovery.base import Level, LevelOutcome, Recovery
from ara.recovery.correction import Correction, correct
from ara.recovery.dense_side import DenseSide, Leader
from ara.recovery.expert_moments import LEAST_HELD_OUT, expert_moments, portions
from ara.recovery.paired_moments import PairedAccumulator, PairedMoments, has_bias
from ara.recovery.trainable import block_tensors, factors_of, load_tensors, set_factors

# A layer writes to the residual stream if a change of its output arrives at the end of the block with this relative
# error: more than rounding in bfloat16, less than what a later layer makes of it.
_SAME = 0.05


@dataclass(frozen=True)
class Choice:
    """What was chosen for a layer; see :class:`ara.recovery.correction.Correction`."""

    beta: float | None
    damping: float | None
    before: float
    after: float
    gamma: float | None = None


class Closed(Level):
    """Sequential correction without gradients."""

    settings = frozenset({"closed_share"})
    not_rounded = "its corrections change all numbers of a matrix, so it belongs before the rounding"
    all_ranks = True

    def repair(self, recovery: Recovery) -> LevelOutcome:
        """Correct all layers, block by block."""
        return _Correction(recovery).all_blocks()


class _Correction:
    """One run of the level."""

    def __init__(self, recovery: Recovery) -> None:
        self.recovery, self.report, self.group = recovery, recovery.report, recovery.group
        self.prefix, blocks = find_blocks(recovery.model)
        self.count = len(blocks)
        first = recovery.train.ids[:1].to(recovery.device)
        self.groups = input_groups(recovery.dense, recovery.specs, first)
        passes, texts = recovery.passes(), (recovery.train, recovery.held_out)
        dense, self.model = (
            [passes.stream(model, text.share(self.group).ids, recovery.config.batch_size) for text in texts]
            for model in (recovery.dense, recovery.model)
        )
        self.dense = [DenseSide(stream) for stream in dense]

    def all_blocks(self) -> LevelOutcome:
        """Correct every block; finished ones are read from the parts of an interrupted run."""
        choices: dict[str, Choice] = {}
        done, interrupted = 0, None
        try:
            with self.report.bar("Correcting blocks", self.count) as bar:
                for layer in range(self.count):
                    choices |= self._finished(layer)
                    done = layer + 1
                    if done < self.count:
                        for dense, model in zip(self.dense, self.model, strict=True):
                            dense.advance()
                            model.advance(model.outputs())
                    trim_heap()
                    bar.advance()
        except KeyboardInterrupt:
            if not self.recovery.keep_on_interrupt or not done:
                raise
            interrupted = f"interrupted after block {done} of {self.count}"
        notes = [_summary(list(choices.values()))]
        if uncorrected := len(self.recovery.specs) - len(choices) if interrupted is None else 0:
            notes.append(
                f"{uncorrected} layers of experts saw too few tokens, or cannot be paired, and stay as they are"
            )
        return LevelOutcome(
            tokens=self.recovery.train.tokens,
            notes=tuple(notes),
            interrupted=interrupted,
            details={"layers": {name: asdict(choice) for name, choice in choices.items()}},
        )

    def _finished(self, layer: int) -> dict[str, Choice]:
        """Correct a block and store it, or read it from the parts of an interrupted run."""
        saved, part = self.recovery.saved, f"block-{layer:03d}"
        file = saved.part(part)
        if file is not None:
            load_tensors(self.recovery.model, load_file(file))
            return {name: Choice(**row) for name, row in saved.values(part)["layers"].items()}
        found = self._block(layer)
        rows = {name: asdict(choice) for name, choice in found.items()}
        saved.finish_part(part, block_tensors(self.recovery.model, f"{self.prefix}.{layer}"), {"layers": rows})
        return found

    def _block(self, layer: int) -> dict[str, Choice]:
        """Correct the groups of one block in their order; after Ctrl+C the block is as it was."""
        recovery = self.recovery
        before = {
            name: tensor.clone() for name, tensor in block_tensors(recovery.model, f"{self.prefix}.{layer}").items()
        }
        found: dict[str, Choice] = {}
        steps = steps_of(self.groups.get(layer, []))
        leaders = {specs[0].name: self._leader(specs) for specs in steps if specs[0].pool is None}
        try:
            for dense in self.dense:
                dense.open_block(list(leaders.values()))
            for specs in steps:
                if specs[0].pool is None:
                    owners = self._owners(specs)
                    pair = tuple(self._moments(specs, leaders[specs[0].name], which, owners) for which in (0, 1))
                    found |= self._correct(dict.fromkeys(owners, pair), specs, owners)
                else:
                    # The memory of process 0 decides.
                    for portion in self.group.broadcast(list(portions(specs))):
                        owners = self._owners(portion)
                        found |= self._correct(self._expert_moments(portion, owners), portion, owners)
        except KeyboardInterrupt:
            load_tensors(recovery.model, before)
            raise
        return found

    def _owners(self, specs: Sequence[LinearSpec]) -> dict[str, int]:
        """Return which process corrects which layer; all of them are corrected at the same time."""
        return share_out([{spec.name: cost(spec) for spec in specs}], self.group.size)

    def _correct(
        self,
        moments: Mapping[str, tuple[PairedMoments | None, ...]],
        specs: Sequence[LinearSpec],
        owners: Mapping[str, int],
    ) -> dict[str, Choice]:
        """Correct layers that do not read each other's outputs.

        Args:
            moments: own layer → moments on training and on held-out text; a layer without is not corrected.
            specs: the layers.
            owners: layer → the process that corrects it.
        """
        own = [spec for spec in specs if spec.name in moments and owners[spec.name] == self.group.rank]
        work = [(spec, moments[spec.name]) for spec in own]
        mine: dict[str, Choice] = {}
        results = list(map_layers(partial(_corrected, self.recovery), work, self.recovery.device))
        for spec, result in zip(own, results, strict=True):
            _apply(self.recovery, spec, result)
            mine[spec.name] = Choice(result.beta, result.damping, result.before, result.after, result.gamma)
        found = self._of_all(mine)
        return {spec.name: found[spec.name] for spec in specs if spec.name in found}

    def _of_all(self, mine: dict[str, Choice]) -> dict[str, Choice]:
        """Return the choices of all processes; the model gets the numbers of layers that others have changed."""
        if self.group.size == 1:
            return mine
        model = self.recovery.model
        changed: dict[str, torch.Tensor] = {}
        for name, choice in mine.items():
            if choice.beta is not None:
                changed |= block_tensors(model, name)
        found: dict[str, Choice] = {}
        for rank, (choices, tensors) in enumerate(self.group.exchange((mine, changed))):
            found |= choices
            if rank != self.group.rank:
                load_tensors(model, tensors)
        return found

    def _expert_moments(
        self, specs: Sequence[LinearSpec], owners: Mapping[str, int]
    ) -> dict[str, tuple[PairedMoments, ...]]:
        """Return the moments of those own layers of experts that saw enough tokens of both texts."""
        recovery = self.recovery
        train, held_out = (
            expert_moments(
                (recovery.dense, dense.stream), (recovery.model, model), specs, which == 1, owners, self.group
            )
            for which, (dense, model) in enumerate(zip(self.dense, self.model, strict=True))
        )
        return {
            spec.name: (train[spec.name], held_out[spec.name])
            for spec in specs
            if spec.name in train.keys() & held_out.keys()
            and train[spec.name].tokens >= spec.n
            and held_out[spec.name].tokens >= LEAST_HELD_OUT
        }

    def _leader(self, specs: Sequence[LinearSpec]) -> Leader:
        """Return the first layer of a group in the dense model; only a single layer can write to the stream."""
        module = specs[0].weight.owner(self.recovery.dense)
        return Leader(module, len(specs) == 1 and self.group.broadcast(self._writes_to_stream(module)))

    @torch.inference_mode()
    def _writes_to_stream(self, module: nn.Module) -> bool:
        """Tell whether the output of a layer is added to the block's output as it is, by a change of it."""
        stream = self.dense[1].stream
        ((_, output),), before = stream.observe(0, [module])
        hidden = hidden_states(before)
        if output.shape != hidden.shape:
            return False
        generator = torch.Generator().manual_seed(0)
        change = torch.randn(output.shape, generator=generator).to(output) * hidden.std()
        difference = hidden_states(stream.observe(0, [module], change)[1]) - hidden - change
        return float(difference.float().norm()) < _SAME * float(change.float().norm())

    @torch.inference_mode()
    def _moments(
        self, specs: Sequence[LinearSpec], leader: Leader, which: int, owners: Mapping[str, int]
    ) -> PairedMoments | None:
        """Return the moments of the inputs of a group, over training (0) or held-out text (1).

        If its layer writes to the residual stream, also those of what the compressed stream has drifted beside it.

        Args:
            specs: the layers of the group.
            leader: the layer that is observed in the dense model.
            which: text.
            owners: layer → the process that corrects it; others get ``None``.
        """
        recovery, dense, model = self.recovery, self.dense[which], self.model[which]
        spec = specs[0]
        module = spec.weight.owner(recovery.model)
        outputs = spec.m if leader.writes else None
        sums = PairedAccumulator(spec.n, recovery.device, which == 1, outputs, has_bias(recovery.model, specs))
        for index in range(len(model.batches)):
            ours = dense.at(index, leader)
            if ours.beside is None:
                sums.add(ours.input, model.input_of(index, module))
            else:
                ((x, made),), output = model.observe(index, [module])
                sums.add(ours.input, x, hidden_states(output) - made - ours.beside)
        ranks = set(owners.values())
        sums.sum_over(self.group, ranks)
        return sums.checked(spec.name) if self.group.rank in ranks else None


def _corrected(recovery: Recovery, spec: LinearSpec, moments: tuple[PairedMoments | None, ...]) -> Correction:
    train, held_out = moments
    assert train is not None and held_out is not None
    with safe_open(recovery.factors[spec.name], "pt") as file:
        a, b = (file.get_tensor(f"{spec.name}.{part}").to(recovery.device) for part in "AB")
    module, original = (spec.weight.owner(model) for model in (recovery.model, recovery.dense))
    low_rank = isinstance(module, CompressedLinear)
    current: Any = factors_of(module) if low_rank else spec.weight.read(recovery.model)
    bias, dense_bias = bias_of(module), bias_of(original)
    moved = None if bias is None or dense_bias is None else bias.double() - dense_bias.double()
    return correct(a, b, current, train, held_out, moved, recovery.config.closed_share)


@torch.no_grad()
def _apply(recovery: Recovery, spec: LinearSpec, found: Correction) -> None:
    """Write a correction into the compressed model."""
    if found.a is not None and found.b is not None:
        set_factors(recovery.model, spec.name, found.a, found.b)
    elif found.shift is not None:
        current = spec.weight.read(recovery.model)
        corrected = spec.weight.read(recovery.dense).double() @ found.shift
        if found.taken_back is not None:
            corrected += found.taken_back
        spec.weight.replace(recovery.model, corrected.to(current.dtype))
    module, original = (spec.weight.owner(model) for model in (recovery.model, recovery.dense))
    bias, dense_bias = bias_of(module), bias_of(original)
    if found.bias is not None and bias is not None and dense_bias is not None:
        bias.copy_(dense_bias.double() + found.bias)


def _summary(choices: Sequence[Choice]) -> str:
    changed = [choice for choice in choices if choice.beta is not None]
    if not changed:
        return f"none of {len(choices)} layers changed: no correction lowered an error on held-out text"
    ratio = statistics.median(choice.after / choice.before for choice in changed)
    beta = statistics.median(choice.beta for choice in changed if choice.beta is not None)
    return (
        f"{len(changed)} of {len(choices)} layers corrected, their held-out errors × {ratio:.3f} (median), "
        f"median β {beta:g}"
    )
