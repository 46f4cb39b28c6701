"""Low-rank linear layers for Hugging Face transformers: the only code file that an ARA checkpoint needs.

This file depends only on torch and transformers. The package ``ara`` imports it, and ``ara truncate`` copies it
unchanged into every compressed checkpoint, so that a checkpoint also loads without ``ara``::

    import ara; AutoModelForCausalLM.from_pretrained(folder)                   # no remote code
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)       # runs the copy of this file

A checkpoint is an ordinary one of its architecture. ``quantization_config`` in its ``config.json`` names the low-rank
layers, their ranks and their layout. Shapes: ``m`` out features, ``n`` in features, ``k`` rank.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "ara"


class CompressedLinear(nn.Module):
    """A linear layer of rank k: it computes ``h = A x`` of width k, and a subclass computes the output from h.

    All weights are in plain ``nn.Linear`` parts, so quantisers, adapters and exporters work on the parts.

    Attributes:
        since: first version of the checkpoint format that has such layers.
        A: projects the input down; weight (k, n), no bias.
        transposed: whether it replaces a ``Conv1D``, GPT-2's linear layer with a weight of (n, m).
    """

    since: ClassVar[int]
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.A = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self._grow(out_features, rank, bias, device, dtype)

    def _grow(self, out_features: int, rank: int, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        """Create the parts that map h to the output, and the bias (m) if ``bias``."""
        raise NotImplementedError

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense weight (m, n), computed in ``dtype``."""
        raise NotImplementedError

    def problem(self) -> str | None:
        """Return what is wrong with the loaded tensors, starting with a tensor's name; ``None`` if nothing is."""
        return None

    @property
    def in_features(self) -> int:
        """Width n of the input."""
        return self.A.in_features

    @property
    def out_features(self) -> int:
        """Width m of the output."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Kept rank k."""
        return self.A.out_features

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight (m, n), computed at each access, for model code that reads it."""
        return self.product(self.A.weight.dtype)

    def extra_repr(self) -> str:
        """Show the rank."""
        return f"rank={self.rank}"


class LowRankLinear(CompressedLinear):
    """A linear layer of rank k: ``y = B (A x) + bias``, in place of ``y = W x + bias``.

    Attributes:
        B: projects up to the output; weight (m, k), and the bias (m) if the original layer had one.
    """

    since = 1

    def _grow(self, out_features: int, rank: int, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        self.B = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def out_features(self) -> int:
        """Width m of the output."""
        return self.B.out_features

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """Bias (m) of the layer."""
        return self.B.bias

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """Return ``B A`` (m, n), computed in ``dtype``."""
        return self.B.weight.to(dtype) @ self.A.weight.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` (..., n) to (..., m) through k dimensions."""
        return self.B(self.A(x))


class PivotedLinear(CompressedLinear):
    """A linear layer of rank k in k(m + n − k) parameters: ``y = P [h; C h] + bias`` with ``h = A x``.

    The rows of A are k rows of the layer's weight, the pivots. Every other row is a combination of the pivots.

    Attributes:
        C: coefficients of the other rows; weight (m − k, k), no bias.
        order: (m) int32; output i is element ``order[i]`` of [h; C h].
        bias: (m), or ``None``.
    """

    since = 2
    order: torch.Tensor

    def _grow(self, out_features: int, rank: int, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        self.C = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @property
    def out_features(self) -> int:
        """Width m of the output."""
        return len(self.order)

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the dense weight (m, n), computed in ``dtype``."""
        a, c = self.A.weight.to(dtype), self.C.weight.to(dtype)
        return torch.cat([a, c @ a]).index_select(0, self.order)

    def problem(self) -> str | None:
        """Check that the order is a permutation; on the meta device it has no values to check."""
        if self.order.is_meta:
            return None
        expected = torch.arange(len(self.order), dtype=self.order.dtype, device=self.order.device)
        wrong = not torch.equal(self.order.sort().values, expected)
        return f"order is not a permutation of 0 … {len(self.order) - 1}" if wrong else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` (..., n) to (..., m) through k of its own outputs."""
        h = self.A(x)
        rows = torch.cat([h, self.C(h)], -1)
        # On CPUs several times as fast as index_select, which copies one number at a time.
        y = rows.gather(-1, self.order.long().expand_as(rows))
        return y if self.bias is None else y + self.bias


# Name of a layout → the module of its layers.
LAYERS: dict[str, type[CompressedLinear]] = {"factors": LowRankLinear, "pivoted": PivotedLinear}
# A checkpoint of a newer format is refused.
CHECKPOINT_FORMAT = max(layer.since for layer in LAYERS.values())


class AraConfig(QuantizationConfigMixin):
    """``quantization_config`` of an ARA checkpoint.

    Args:
        ranks: module path → rank k of the low-rank layers; all other layers are dense.
        format_version: of the checkpoint; ``since`` of a layer class is the first version with its layout.
        provenance: how the checkpoint was made; stored, never interpreted.
        layout: how the low-rank layers are stored, a key of ``LAYERS``.
    """

    def __init__(
        self,
        ranks: dict[str, int] | None = None,
        format_version: int = 1,
        provenance: dict[str, Any] | None = None,
        layout: str = "factors",
        **_: Any,
    ) -> None:
        for key, value in (("ranks", ranks), ("provenance", provenance)):
            if not isinstance(value, (dict, type(None))):
                raise ValueError(f"quantization_config.{key} must be an object, got {value!r:.60}")
        self.quant_method = QUANT_METHOD
        self.ranks = dict(ranks or {})
        self.layout = layout
        self.format_version = format_version
        self.provenance = dict(provenance or {})
        if type(format_version) is not int or not 1 <= format_version <= CHECKPOINT_FORMAT:
            raise ValueError(
                f"this checkpoint has ARA format {format_version!r}; this code reads up to {CHECKPOINT_FORMAT}: "
                "update ara-svd"
            )
        layouts = [name for name, layer in LAYERS.items() if layer.since <= format_version]
        if layout not in layouts:
            raise ValueError(
                f"quantization_config.layout must be one of those of ARA format {format_version} "
                f"({', '.join(layouts)}), got {layout!r}"
            )
        for name, rank in self.ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(
                    f"quantization_config.ranks[{name!r}] must be a whole number of at least 1, got {rank!r}"
                )


class AraQuantizer(HfQuantizer):
    """Puts compressed layers into the empty model before transformers loads the weights, and checks them afterwards."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        ignored = {rf"^{re.escape(key)}$" for key in self._guards()}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
        config = self.quantization_config
        for name, rank in config.ranks.items():
            layer = _empty_like(_linear(model, name), LAYERS[config.layout], rank)
            for part in layer.modules():
                # Some families initialise new layers with code that expects a dense layer, for instance its bias.
                vars(part)["_is_hf_initialized"] = True
            replace_linear(model, name, layer)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, CompressedLinear) and (problem := module.problem()):
                raise ValueError(f"{name}.{problem}")
        # A later save_pretrained does not copy the code file, so the config must not name it.
        if getattr(model.config, "auto_map", None):
            del model.config.auto_map
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return what ``save_pretrained`` writes: the weights and the tensors of :meth:`_guards`."""
        guards = {key: torch.empty(0, dtype=model.dtype) for key in self._guards()}
        return {**model.state_dict(), **guards}, {}

    def _guards(self) -> list[str]:
        """Return the name of an empty tensor that makes readers without ARA support fail.

        It has the name of a dense weight and the wrong shape, so loading fails. Without it such a reader would only
        warn and fill the missing weights with random numbers.
        """
        return [f"{name}.weight" for name in sorted(self.quantization_config.ranks)[:1]]

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return densify(model)

    def is_serializable(self) -> bool:
        """Tell that a loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell that layers can be trained: their weights are ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Tell that ``torch.compile`` works: layers consist of ordinary matrix products."""
        return True


class AraForCausalLM:
    """The class that ``auto_map`` names: its import registers ARA; the architecture's class loads the checkpoint."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Do nothing; the remote code protocol requires this method."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any, **kwargs: Any) -> Any:
        """Load ``path`` with the class of transformers for ``config``."""
        kwargs.pop("trust_remote_code", None)
        return _native_class(config).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return _native_class(config)._from_config(config, **kwargs)


def replace_linear(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the module called ``name`` in ``model`` by ``layer``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def densify(model: nn.Module) -> nn.Module:
    """Replace every compressed layer of ``model`` by an ordinary linear layer with the same weight, in place.

    The weight is computed in float32 and rounded once, to the dtype of the factors.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            replace_linear(model, name, _dense_layer(module))
    return model


def register() -> None:
    """Register ``quant_method: ara`` with transformers; a second call changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, AraConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, AraQuantizer)


def _native_class(config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _linear(model: nn.Module, name: str) -> Any:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, (nn.Linear, Conv1D)):
        found = "nothing" if module is None else type(module).__name__
        raise ValueError(f"the checkpoint factorises {name!r}, but {type(model).__name__} has {found} there")
    return module


def _dense_layer(module: CompressedLinear) -> nn.Module:
    weight = module.product(torch.float32).detach().to(module.A.weight.dtype)
    layer: nn.Module
    if module.transposed:
        with torch.device("meta"):
            layer = Conv1D(module.out_features, module.in_features)
        weight = weight.T.contiguous()
    else:
        layer = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        layer.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return layer


def _empty_like(linear: Any, kind: type[CompressedLinear], rank: int) -> CompressedLinear:
    weight, bias = linear.weight, linear.bias
    transposed = isinstance(linear, Conv1D)
    n, m = weight.shape if transposed else reversed(weight.shape)
    if rank > min(m, n):
        raise ValueError(f"the checkpoint has rank {rank} for a layer of {m} × {n}")
    return kind(n, m, rank, bias is not None, transposed, device=weight.device, dtype=weight.dtype)


register()
