"""Paired moments of experts: of the inputs of one layer of every expert in a block.

The routers of the two models send some tokens to different experts. Both models use the routes of the dense one here,
so that each expert sees the same tokens in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from ara.distributed.group import Group
from ara.models.blocks import Stream
from ara.models.experts import has_routes, recording_routes, replaying_routes
from ara.models.memory import available_bytes
from ara.models.weights import LinearSpec
from ara.recovery.paired_moments import PairedAccumulator, PairedMoments, has_bias

# Part of the free memory that the sums may fill: one over this.
_SHARE = 4
# An expert with fewer held-out tokens is not corrected: nothing would show whether that is better.
LEAST_HELD_OUT = 64


def portions(specs: Sequence[LinearSpec]) -> Iterator[Sequence[LinearSpec]]:
    """Split layers of experts, all of one width, into parts whose sums on both texts fit into memory."""
    width = specs[0].n
    needed = PairedAccumulator.bytes_for(width, False) + PairedAccumulator.bytes_for(width, True)
    # The averages are float64 copies of the sums.
    count = max(1, available_bytes("cpu") // _SHARE // (3 * needed))
    for start in range(0, len(specs), count):
        yield specs[start : start + count]


@torch.inference_mode()
def expert_moments(
    dense: tuple[nn.Module, Stream],
    compressed: tuple[nn.Module, Stream],
    specs: Sequence[LinearSpec],
    with_dense: bool,
    owners: Mapping[str, int],
    group: Group,
) -> dict[str, PairedMoments]:
    """Return layer → moments of its inputs in both models, of the own layers that saw a token and can be paired.

    Args:
        dense: the dense model and its stream, at the block of the layers.
        compressed: the compressed model and its stream over the same text, at the same block.
        specs: layers of experts, of one width.
        with_dense: whether to collect :attr:`PairedMoments.dense` as well.
        owners: layer → the process that gets its moments.
        group: processes whose streams share the windows of the text.

    Raises:
        NumericalError: an input holds NaN or infinity.
    """
    (dense_model, ours), (model, theirs) = dense, compressed
    if not has_routes(ours.blocks[ours.at]):
        return {}
    originals = {spec.name: spec.weight.owner(dense_model) for spec in specs}
    modules = {spec.name: spec.weight.owner(model) for spec in specs}
    device = next(model.parameters()).device
    empty = partial(PairedAccumulator, specs[0].n, device, with_dense, centred=has_bias(model, specs))
    sums: dict[str, PairedAccumulator] = {}
    for index in range(len(ours.batches)):
        with recording_routes(ours.blocks[ours.at]) as routes:
            inputs = ours.inputs_of(index, list(originals.values()))
        with replaying_routes(theirs.blocks[theirs.at], routes):
            others = theirs.inputs_of(index, list(modules.values()))
        for name, original in originals.items():
            if original in inputs:
                x, other = inputs[original], others[modules[name]]
                if name not in sums:
                    sums[name] = empty()
                sums[name].add(x, other)
    found = {}
    for name in modules:
        one = sums.pop(name, None) or empty()
        one.sum_over(group, {owners[name]})
        if owners[name] == group.rank and one.tokens:
            found[name] = one.checked(name)
    return found
