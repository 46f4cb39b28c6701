"""``quant_method: ara`` in vLLM. This module imports vLLM."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from ara.errors import ModelError, UnsupportedModelError
from ara.layouts.modeling_ara import QUANT_METHOD, AraConfig
from ara.models.checkpoint import check_complete
from ara.models.multimodal import is_multimodal
from export.vllm.embedding import RoundedEmbeddingMethod
from export.vllm.linear import AraLinearMethod
from export.vllm.sharing import names_in


@register_quantization_config(QUANT_METHOD)
class AraQuantizationConfig(QuantizationConfig):
    """``quantization_config`` of an ARA checkpoint: which layers of vLLM hold factors.

    Args:
        settings: what ``config.json`` says, checked.
    """

    def __init__(self, settings: AraConfig) -> None:
        super().__init__()
        self.layout = settings.layout
        self.ranks, self.rounded = dict(settings.ranks), dict(settings.rounded)
        self._embeddings: set[str] = set()

    @classmethod
    def get_name(cls) -> Any:
        """Return ``ara``."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the types of weights and activations."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 0: the products are ordinary ones, which every GPU computes."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no name: the settings are in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AraQuantizationConfig:
        """Read ``quantization_config``.

        Raises:
            ModelError: it is of a newer format, or damaged. It is no ``ValueError``, which pydantic would spread over
                several lines.
            UnsupportedModelError: a mixture of experts.
        """
        try:
            settings = AraConfig.from_dict(config)
        except (TypeError, ValueError) as error:
            raise ModelError(f"the checkpoint cannot be served: {error}") from error
        names = (*settings.ranks, *settings.rounded)
        experts = [
            name
            for name in names
            if name.rpartition(".")[2].isdecimal() or (settings.shared_experts and ".experts." in name)
        ]
        if experts:
            raise UnsupportedModelError(
                f"the checkpoint factorises experts ({experts[0]}), and vLLM's kernels for experts read dense weights",
                "use transformers, or write a dense checkpoint: ara truncate --densify",
            )
        return cls(settings)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the matrices as vLLM names the modules of this architecture."""
        self.ranks = hf_to_vllm_mapper.apply_dict(self.ranks)
        self.rounded = hf_to_vllm_mapper.apply_dict(self.rounded)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Compare the files of a checkpoint folder with its config before vLLM builds anything.

        vLLM itself does not notice missing tensors of a quantised model. A repository of the hub may not be on this
        machine yet; its tensors are compared while they are loaded.

        Raises:
            UnsupportedModelError: a model that also reads pictures or sound.
            ModelError: a tensor is missing, has no place, or has another shape.
        """
        kind = getattr(hf_config, "model_type", None)
        if is_multimodal(kind):
            raise UnsupportedModelError(
                f"a compressed {kind} model reads more than text, and ARA's plugin knows only language models",
                "use transformers, or write a dense checkpoint: ara truncate --densify",
            )
        if (folder := Path(model_name)).is_dir():
            _check_once(folder)

    def get_checkpoint_weight_mapper(self) -> Any:
        """Return vLLM's default. vLLM asks for it when the model is built, before it loads the weights.

        Raises:
            UnsupportedModelError: vLLM's code of this architecture does not let plugins load its embedding.
        """
        missed = sorted(self._outside() - self._embeddings)
        if missed and get_pp_group().world_size == 1:
            raise UnsupportedModelError(
                f"vLLM's code of this architecture cannot load {missed[0]} in few bits: add --model-impl transformers",
                "or round without --embedding-bits: ara quantise",
            )
        return super().get_checkpoint_weight_mapper()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return what creates and multiplies by the weights of ``layer``; ``None``: vLLM's default.

        Args:
            layer: of vLLM.
            prefix: its path.

        Raises:
            UnsupportedModelError: a factorised head.
        """
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding_method(prefix)
        if not isinstance(layer, LinearBase):
            return None
        names = names_in(prefix, self.packed_modules_mapping)
        if not any(map(self._is_compressed, names)):
            return UnquantizedLinearMethod()
        return AraLinearMethod(self.layout, self.ranks, self.rounded, names)

    def _is_compressed(self, name: str) -> bool:
        return name in self.ranks or name in self.rounded

    def _embedding_method(self, prefix: str) -> QuantizeMethodBase | None:
        if prefix in self.ranks:
            raise UnsupportedModelError(
                f"the checkpoint factorises {prefix}, which cannot be served", "leave it dense: ara truncate --densify"
            )
        name = prefix if prefix in self.rounded else None
        if not prefix:
            # Some architectures do not tell the path of their embedding, only that of their head.
            name = next((found for found in sorted(self._outside()) if not found.endswith("lm_head")), None)
        if name is None:
            return None
        self._embeddings.add(name)
        return RoundedEmbeddingMethod(name, self.rounded[name])

    def _outside(self) -> set[str]:
        """Return the rounded matrices outside the blocks: the embedding, and a head of its own."""
        return {name for name in self.rounded if not any(map(str.isdecimal, name.split(".")))}


@cache
def _check_once(folder: Path) -> None:
    # vLLM makes its config several times, also after --model-impl transformers has changed the classes of transformers.
    check_complete(folder)
