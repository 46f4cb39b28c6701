"""Embeddings and heads of few bits in vLLM: their weights are computed while they are loaded.

This module imports vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from ara.errors import ModelError
from ara.layouts.modeling_ara import RoundedLinear
from export.vllm.arriving import Matrix
from export.vllm.places import add_place, remove_place, set_loader
from export.vllm.sharing import Share


class RoundedEmbeddingMethod(UnquantizedEmbeddingMethod):
    """Loads an embedding or a head of few bits into an ordinary one with the same numbers.

    Args:
        name: path of the matrix.
        how: its bits, length of blocks, and whether there are zero points.
    """

    def __init__(self, name: str, how: Sequence[Any]) -> None:
        super().__init__()
        self._name, self._how = name, how

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Create the ordinary weight, and prepare ``layer`` for the tensors of the rounded one."""
        super().create_weights(layer, *args, **kwargs)
        m, n = layer.org_vocab_size, layer.embedding_dim
        bits, block, zero_points = self._how
        module = RoundedLinear(n, m, bits, block, zero_points, False, device="meta")
        layer.arriving = Matrix(self._name, module, Share(m, n, (slice(0, m),), slice(0, n)))
        for key in layer.arriving.keys:
            add_place(layer, key, partial(_put, layer, key))
        set_loader(layer.weight, partial(_put, layer, "weight"))

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Share the weight of the embedding; a tied head has no tensors of its own."""
        for key in layer.arriving.keys:
            remove_place(layer, key)
        layer.arriving = None
        return super().tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that the weight was loaded.

        Raises:
            ModelError: a tensor is missing.
        """
        if layer.arriving is not None:
            if layer.arriving.missing:
                raise ModelError(f"the checkpoint lacks {layer.arriving.missing[0]}")
            for key in layer.arriving.keys:
                remove_place(layer, key)
            layer.arriving = None
        super().process_weights_after_loading(layer)


def _put(layer: Any, key: str, place: nn.Parameter, tensor: torch.Tensor) -> None:
    layer.arriving.put(key, tensor)
    if not layer.arriving.missing:
        # vLLM's own loader cuts the rows of this process, and fills the vocabulary up.
        layer.weight_loader(layer.weight, layer.arriving.finish(layer.params_dtype, "cpu").first)
