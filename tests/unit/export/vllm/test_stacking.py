"""Stacked products equal the matrices that they consist of, whole and split over processes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from ara.layouts import layout_named
from ara.layouts.modeling_ara import RoundedLinear, linear_with
from export.vllm.sharing import Partition, shares
from export.vllm.stacking import cut, multiply, stack

# All sizes are different; each part of the outputs can be split over 2 processes.
N, SIZES, RANKS = 30, (24, 14, 10), (7, 5, 4)
KINDS = [
    ("factors", "factors", "factors"),
    ("pivoted", "pivoted", "pivoted"),
    ("factors", "dense", "factors"),
    ("dense", "pivoted", "dense"),
    ("pivoted", "dense", "dense"),
    ("dense", "dense", "factors"),
    ("factors", "factors", "rounded"),
]


def matrix(kind, m, k, seed):
    generator = torch.Generator().manual_seed(seed)
    if kind == "rounded":
        return rounded(m, generator)
    if kind == "dense":
        return linear_with(torch.randn(m, N, generator=generator), None, False)
    a, b = torch.randn(k, N, generator=generator), torch.randn(m, k, generator=generator)
    return layout_named(kind).build(a, b)


def rounded(m, generator):
    """Return a matrix of few bits."""
    module = RoundedLinear(N, m, 8, 16, True, False)
    module.steps.copy_(torch.randint(0, 256, module.steps.shape, generator=generator))
    module.zeros.copy_(torch.randint(0, 256, module.zeros.shape, generator=generator))
    module.scales.copy_(torch.rand(module.scales.shape, generator=generator) / 100)
    return module


def matrices(kinds):
    return [matrix(*one, seed) for seed, one in enumerate(zip(kinds, SIZES, RANKS, strict=True))]


def piece(kind, module, share, dtype=torch.float32):
    layout = None if kind in ("dense", "rounded") else layout_named(kind)
    return cut(module, layout, share, dtype, "cpu")


def computed(layer, x):
    first, *seconds = (partial(nn.functional.linear, weight=weight) for weight in (layer.first, *layer.seconds))
    return multiply(x, first, seconds, layer.parts, layer.order)


def column_parallel(kinds, modules, rank=0, processes=1):
    """Return the stack of one process, with the outputs of every matrix split."""
    partitions = [Partition(size // processes, processes, rank) for size in SIZES]
    parts = shares("layer", len(modules), partitions, N, slice(0, N))
    return stack([piece(*one) for one in zip(kinds, modules, parts, strict=True)])


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("processes", [1, 2])
def test_outputs_of_all_processes_are_those_of_the_matrices(kinds, processes):
    modules, x = matrices(kinds), torch.randn(3, N, generator=torch.Generator().manual_seed(9))
    found = [computed(column_parallel(kinds, modules, rank, processes), x) for rank in range(processes)]
    sizes = [size // processes for size in SIZES]
    for index, module in enumerate(modules):
        outputs = torch.cat([one.split(sizes, -1)[index] for one in found], -1)
        torch.testing.assert_close(outputs, module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["factors", "pivoted", "dense", "rounded"])
def test_split_inputs_add_up(kind):
    module, x = matrix(kind, 24, 7, 0), torch.randn(3, N, generator=torch.Generator().manual_seed(9))
    total = torch.zeros(3, 24)
    for columns in (slice(0, N // 2), slice(N // 2, N)):
        (share,) = shares("layer", 1, [Partition(24)], N, columns)
        total += computed(stack([piece(kind, module, share)]), x[:, columns])
    torch.testing.assert_close(total, module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["factors", "pivoted", "dense"])
def test_one_matrix_of_several_parts(kind):
    module, x = matrix(kind, 48, 7, 0), torch.randn(2, 3, N, generator=torch.Generator().manual_seed(9))
    expected = module(x).split([24, 14, 10], -1)
    for rank in range(2):
        partitions = [Partition(size // 2, 2, rank) for size in SIZES]
        (share,) = shares("layer", 1, partitions, N, slice(0, N))
        found = computed(stack([piece(kind, module, share)]), x).split([12, 7, 5], -1)
        for one, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(one, whole.chunk(2, -1)[rank], rtol=1e-4, atol=1e-4)


def test_low_rank_matrices_share_one_product():
    kinds = ("factors", "dense", "factors")
    layer = column_parallel(kinds, matrices(kinds))
    assert layer.first.shape == (7 + 14 + 4, N)
    assert [tuple(second.shape) for second in layer.seconds] == [(24, 7), (10, 4)]
    assert layer.order is None


def test_rows_are_put_in_order_once():
    kinds = ("pivoted", "dense", "pivoted")
    layer = column_parallel(kinds, matrices(kinds))
    assert layer.order.shape == (sum(SIZES),) and layer.order.dtype == torch.int64
    # Pivots are outputs themselves, so the second products are smaller than those of factors.
    assert [tuple(second.shape) for second in layer.seconds] == [(24 - 7, 7), (10 - 4, 4)]


def test_a_process_computes_the_rows_that_it_needs():
    tensors = {
        "A.weight": torch.randn(3, N),
        "C.weight": torch.randn(4, 3),
        "order": torch.tensor([5, 6, 3, 2, 4, 1, 0]),
    }
    found = layout_named("pivoted").cut(tensors, [slice(0, 2), slice(3, 5)], slice(0, N))
    assert found.order.tolist() == [3, 4, 2, 5]
    assert torch.equal(found.second, tensors["C.weight"][[2, 3, 1]])


def test_a_process_whose_outputs_are_all_pivots_has_no_second_product():
    module = matrix("pivoted", 24, 7, 0)
    pivots = [int(row) for row in (module.order < 7).nonzero()[:, 0]]
    (share,) = shares("layer", 1, [Partition(1, 24, pivots[0])], N, slice(0, N))
    layer = stack([piece("pivoted", module, share)])
    assert layer.seconds == []
    x = torch.randn(3, N)
    torch.testing.assert_close(computed(layer, x), module(x)[:, pivots[:1]], rtol=1e-4, atol=1e-4)


def test_the_products_are_compiled_without_a_break():
    kinds, x = ("pivoted", "dense", "pivoted"), torch.randn(3, N)
    layer = column_parallel(kinds, matrices(kinds))
    compiled = torch.compile(partial(computed, layer), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), computed(layer, x))


def test_pieces_have_the_asked_type_and_no_hidden_rows():
    module = matrix("factors", 24, 7, 0)
    (share,) = shares("layer", 1, [Partition(12, 2, 1)], N, slice(0, 15))
    found = piece("factors", module, share, torch.bfloat16)
    assert found.first.dtype == found.second.dtype == torch.bfloat16
    assert found.first.untyped_storage().nbytes() == 7 * 15 * 2
    assert found.second.untyped_storage().nbytes() == 12 * 7 * 2
