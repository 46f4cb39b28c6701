"""Which matrices a layer of vLLM consists of, and what each process holds of them."""

from __future__ import annotations

import pytest

from ara.errors import UnsupportedModelError
from export.vllm.sharing import Partition, Share, names_in, shares

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_up_proj"]}


def test_names_of_a_fused_layer():
    assert names_in("model.layers.0.self_attn.qkv_proj", PACKED) == [
        f"model.layers.0.self_attn.{name}_proj" for name in "qkv"
    ]


@pytest.mark.parametrize("layer", ["model.layers.0.mlp.gate_up_proj", "model.layers.0.mlp.down_proj", "proj"])
def test_a_layer_that_is_not_fused_keeps_its_name(layer):
    assert names_in(layer, PACKED) == [layer]


def test_every_part_of_a_column_parallel_layer_is_split():
    q, k, v = shares("qkv", 3, [Partition(6, 2, 1), Partition(4, 2, 1), Partition(4, 2, 1)], 10, slice(0, 10))
    assert q == Share(12, 10, (slice(6, 12),), slice(0, 10))
    assert k == v == Share(8, 10, (slice(4, 8),), slice(0, 10))


def test_one_matrix_of_several_parts_is_split_part_by_part():
    (packed,) = shares("qkv", 1, [Partition(6, 2, 1), Partition(4, 2, 1), Partition(4, 2, 1)], 10, slice(0, 10))
    assert packed == Share(28, 10, (slice(6, 12), slice(16, 20), slice(24, 28)), slice(0, 10))


def test_processes_share_a_head_where_there_are_too_few():
    # Four processes, two key heads: the third process reads the second head.
    _, k, _ = shares("qkv", 3, [Partition(6, 4, 2), Partition(4, 2, 1), Partition(4, 2, 1)], 10, slice(0, 10))
    assert k == Share(8, 10, (slice(4, 8),), slice(0, 10))


def test_a_layer_with_another_number_of_matrices_is_refused():
    with pytest.raises(UnsupportedModelError, match="3 parts in vLLM and 2 matrices"):
        shares("layer", 2, [Partition(6)] * 3, 10, slice(0, 10))
