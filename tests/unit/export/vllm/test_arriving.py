"""Tensors on their way into a layer of vLLM: in any order, and only those that the config mentions."""

from __future__ import annotations

import pytest
import torch

from ara.errors import ModelError
from ara.layouts import layout_named
from export.vllm.arriving import Layer, empty_matrix
from export.vllm.sharing import Partition, shares

N, M, K = 30, 24, 7


def waiting(layout="factors", ranks=None, rounded=None, names=("k", "v")):
    """Return a layer with matrices called ``k`` and ``v``; the first one is low-rank."""
    ranks = {"k": K} if ranks is None else ranks
    parts = shares("kv", len(names), [Partition(M)] * len(names), N, slice(0, N))
    matrices = [
        empty_matrix(name, share, layout, ranks, rounded or {}) for name, share in zip(names, parts, strict=True)
    ]
    return Layer(matrices, torch.float32, "cpu")


def low_rank(layout="factors"):
    return layout_named(layout).split(torch.randn(K, N), torch.randn(M, K))


def test_tensors_arrive_in_any_order():
    tensors, dense = low_rank(), torch.randn(M, N)
    layer = waiting()
    layer.put(1, "weight", dense)
    layer.put(0, "B.weight", tensors["B.weight"])
    layer.put(0, "A.weight", tensors["A.weight"])
    found = layer.finish()
    assert torch.equal(found.first, torch.cat([tensors["A.weight"], dense]))
    assert torch.equal(found.seconds[0], tensors["B.weight"])


def test_the_guard_is_accepted_and_a_dense_weight_is_not():
    layer = waiting()
    layer.put(0, "weight", torch.empty(0))
    with pytest.raises(ModelError, match=r"holds k\.weight of shape \[24, 30\].*does not mention"):
        layer.put(0, "weight", torch.randn(M, N))


def test_a_missing_tensor_is_named():
    layer = waiting()
    layer.put(0, "A.weight", low_rank()["A.weight"])
    layer.put(1, "weight", torch.randn(M, N))
    with pytest.raises(ModelError, match=r"lacks 1 tensors of a layer, such as k\.B\.weight"):
        layer.finish()


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("A.weight", torch.randn(K + 1, N)),
        ("A.weight", torch.zeros(K, N, dtype=torch.int32)),
        ("C.weight", torch.randn(M - K, K)),
        ("steps", torch.zeros(M, N, dtype=torch.uint8)),
    ],
)
def test_another_tensor_than_the_config_says_is_refused(key, tensor):
    with pytest.raises(ModelError, match=rf"holds k\.{key}"):
        waiting().put(0, key, tensor)


def test_an_order_that_is_no_permutation_is_refused():
    tensors = low_rank("pivoted")
    tensors["order"][0] = tensors["order"][1]
    layer = waiting("pivoted")
    with pytest.raises(ModelError, match=r"k\.order is not a permutation"):
        for key, tensor in tensors.items():
            layer.put(0, key, tensor)


def test_a_rank_above_that_of_the_layer_is_refused():
    with pytest.raises(ModelError, match="rank 25 for k, a layer of 24 × 30"):
        waiting(ranks={"k": 25})


def test_parts_of_few_bits_wait_for_their_numbers():
    layer = waiting(rounded={"k.A": [4, 16, True], "v": [8, 32, False]})
    assert layer.keys == ["A.scales", "A.steps", "A.zeros", "B.weight", "scales", "steps", "weight"]
    for key, tensor in {
        "A.steps": torch.zeros(K, 16, dtype=torch.uint8),
        "A.scales": torch.ones(K, 2, dtype=torch.float16),
        "A.zeros": torch.full((K, 1), 0x31, dtype=torch.uint8),
        "B.weight": torch.ones(M, K),
    }.items():
        layer.put(0, key, tensor)
    layer.put(1, "steps", torch.full((M, 32), 130, dtype=torch.uint8))
    layer.put(1, "scales", torch.full((M, 1), 0.5, dtype=torch.float16))
    first = layer.finish().first
    # (q − z) s: the zero points of the two blocks are 1 and 3; without zero points z is 128.
    assert first[0, :16].unique().tolist() == [-1] and first[0, 16:].unique().tolist() == [-3]
    assert first[K:].unique().tolist() == [1]


def test_one_matrix_may_arrive_without_the_name_of_a_part():
    layer = waiting(ranks={}, names=("qkv",))
    layer.put(None, "weight", torch.ones(M, N))
    assert layer.finish().first.shape == (M, N)


@pytest.mark.parametrize("shard", [None, 2, (0, 1), "index_q"])
def test_an_unknown_part_is_refused(shard):
    with pytest.raises(ModelError, match="consists of k, v"):
        waiting().put(shard, "weight", torch.empty(0))
