"""The layer method of vLLM that multiplies by factors. This module imports vLLM.

Every product, the first one and the second ones, is an ordinary unquantised layer for vLLM, so it runs on vLLM's own
kernels for the platform.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod

from ara.errors import ModelError
from export.vllm.arriving import Layer, empty_matrix
from export.vllm.places import add_place, remove_place
from export.vllm.sharing import Partition, shares
from export.vllm.stacking import multiply

# Name of the bias within a matrix stored as factors; vLLM keeps the bias of the whole layer itself.
_BIAS = "B.bias"


class AraLinearMethod(LinearMethodBase):
    """Creates, loads and multiplies by the matrices of one layer of vLLM.

    Args:
        layout: of the low-rank matrices.
        ranks: path → rank k of the low-rank matrices.
        rounded: as in :class:`ara.layouts.modeling_ara.AraConfig`.
        names: paths of the layer's matrices, in the order of its outputs.
    """

    def __init__(
        self, layout: str, ranks: Mapping[str, int], rounded: Mapping[str, Sequence[Any]], names: Sequence[str]
    ) -> None:
        self._layout, self._ranks, self._rounded, self._names = layout, ranks, rounded, names
        self._dense = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Prepare ``layer`` for the tensors of its matrices.

        Raises:
            ModelError: the checkpoint does not fit the layer.
        """
        partitions = _partitions(layer, output_partition_sizes, output_size)
        first = layer.tp_rank * input_size_per_partition if input_size_per_partition < input_size else 0
        columns = slice(first, first + input_size_per_partition)
        held = shares(layer.prefix, len(self._names), partitions, input_size, columns)
        matrices = [
            empty_matrix(name, share, self._layout, self._ranks, self._rounded)
            for name, share in zip(self._names, held, strict=True)
        ]
        layer.arriving = Layer(matrices, params_dtype, torch.get_default_device())
        for key in layer.arriving.keys:
            add_place(layer, key, partial(_put, layer.arriving, key))
        add_place(layer, _BIAS, partial(_put_bias, layer))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Build the products from the tensors that have arrived.

        Raises:
            ModelError: a tensor is missing.
        """
        stack = layer.arriving.finish()
        for key in (*layer.arriving.keys, _BIAS):
            remove_place(layer, key)
        del layer.arriving
        layer.parts = stack.parts
        layer.first = self._product(stack.first)
        layer.seconds = nn.ModuleList(map(self._product, stack.seconds))
        layer.register_buffer("order", stack.order, persistent=False)
        # vLLM's LoRA layers ask where a layer is by the device of its weight, and read nothing else of it.
        layer.register_buffer("weight", stack.first.new_empty(0), persistent=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``x`` (..., c) to the outputs (..., r) of this process."""
        first, *seconds = (partial(self._dense.apply, product) for product in (layer.first, *layer.seconds))
        y = multiply(x, first, seconds, layer.parts, layer.order)
        return y if bias is None else y + bias

    def _product(self, weight: torch.Tensor) -> nn.Module:
        product = nn.Module()
        product.weight = nn.Parameter(weight, requires_grad=False)
        self._dense.process_weights_after_loading(product)
        return product


def _partitions(layer: Any, sizes: list[int], output_size: int) -> list[Partition]:
    """Return the ranges of a layer's outputs; a layer that is not column-parallel has each of them whole."""
    processes = output_size // sum(sizes)
    if processes == 1:
        return [Partition(size) for size in sizes]
    # With more processes than key heads, several processes hold the same head.
    copies = [1, *[getattr(layer, "num_kv_head_replicas", 1)] * (len(sizes) - 1)]
    return [Partition(size, processes // copy, layer.tp_rank // copy) for size, copy in zip(sizes, copies, strict=True)]


def _put(arriving: Layer, key: str, place: nn.Parameter, tensor: torch.Tensor, shard: Any = None) -> None:
    arriving.put(shard, key, tensor)


def _put_bias(layer: Any, place: nn.Parameter, tensor: torch.Tensor, *shard: Any) -> None:
    if layer.bias is None:
        raise ModelError(f"the checkpoint has a bias for {layer.prefix}, and the model has none there")
    layer.bias.weight_loader(layer.bias, tensor, *(one for one in shard if one is not None))
