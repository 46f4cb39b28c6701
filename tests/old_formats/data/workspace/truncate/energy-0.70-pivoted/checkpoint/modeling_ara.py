"""Low-rank linear layers for Hugging Face transformers: the one code file that an ARA checkpoint needs.

This file depends on torch and transformers alone. The package ``ara`` imports it, and ``ara truncate`` copies it
unchanged into every compressed checkpoint, so that the checkpoint also loads where ``ara`` is not installed::

    import ara; AutoModelForCausalLM.from_pretrained(folder)                   # no remote code
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)       # runs the copy of this file

A checkpoint is an ordinary one of its architecture, with ``quantization_config`` in ``config.json`` saying which
linear layers are two thin ones, and of which rank. Shapes: ``m`` out features, ``n`` in features, ``k`` rank.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "ara"
# Version of what ``quantization_config`` describes, by layout of the layers; a newer one is refused, not guessed at.
FORMATS = {"factors": 1, "pivoted": 2}
CHECKPOINT_FORMAT = max(FORMATS.values())


class CompressedLinear(nn.Module):
    """What stands for a linear layer in a compressed model: first ``h = A x``, of width k, then what a subclass makes.

    Every part with weights is a plain ``nn.Linear``, so that whatever works on linear layers (quantisers, adapters,
    exporters) works on it.

    Attributes:
        A: projects the input down; weight (k, n), no bias.
        transposed: whether it stands for a ``Conv1D``, GPT-2's linear layer with a weight of (n, m).
    """

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
        """Make what maps h to the output, with a bias (m) if there is to be one."""
        raise NotImplementedError

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """Multiply the dense weight (m, n) out, in ``dtype``."""
        raise NotImplementedError

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
        """The dense weight (m, n), multiplied anew at each access: for model code that asks for it."""
        return self.product(self.A.weight.dtype)

    def extra_repr(self) -> str:
        """Show the rank."""
        return f"rank={self.rank}"


class LowRankLinear(CompressedLinear):
    """A linear layer of rank k: ``y = B (A x) + bias``, in place of ``y = W x + bias``.

    Attributes:
        B: projects up to the output; weight (m, k), with the bias (m) of the original layer, if it had one.
    """

    def _grow(self, out_features: int, rank: int, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        self.B = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(
        cls, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, transposed: bool = False
    ) -> LowRankLinear:
        """Build the layer from ``a`` (k, n), ``b`` (m, k) and ``bias`` (m), which are used as they are, not copied."""
        layer = cls(a.shape[1], b.shape[0], a.shape[0], bias is not None, transposed, device="meta", dtype=a.dtype)
        layer.A.weight = nn.Parameter(a, requires_grad=False)
        layer.B.weight = nn.Parameter(b, requires_grad=False)
        if bias is not None:
            layer.B.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    @property
    def out_features(self) -> int:
        """Width m of the output."""
        return self.B.out_features

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        """Bias (m) of the layer."""
        return self.B.bias

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """Multiply ``B A`` (m, n) out, in ``dtype``."""
        return self.B.weight.to(dtype) @ self.A.weight.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` (..., n) to (..., m) through k dimensions."""
        return self.B(self.A(x))


class PivotedLinear(CompressedLinear):
    """A linear layer of rank k in k(m + n − k) parameters: ``y = P [h; C h] + bias`` with ``h = A x``.

    The rows of A are k rows of the layer's own weight, the pivots; each other row is a combination of them.

    Attributes:
        C: the other rows in terms of the pivots; weight (m − k, k), no bias.
        order: (m) int32; output i is element ``order[i]`` of [h; C h].
        bias: (m), or ``None``.
    """

    order: torch.Tensor

    def _grow(self, out_features: int, rank: int, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        self.C = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self.register_buffer("order", torch.arange(out_features, dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_parts(
        cls,
        a: torch.Tensor,
        c: torch.Tensor,
        order: torch.Tensor,
        bias: torch.Tensor | None = None,
        transposed: bool = False,
    ) -> PivotedLinear:
        """Build the layer from ``a`` (k, n), ``c`` (m − k, k), ``order`` (m) and ``bias`` (m), used as they are."""
        layer = cls(a.shape[1], len(order), a.shape[0], False, transposed, device="meta", dtype=a.dtype)
        layer.A.weight = nn.Parameter(a, requires_grad=False)
        layer.C.weight = nn.Parameter(c, requires_grad=False)
        layer.order = order
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    @property
    def out_features(self) -> int:
        """Width m of the output."""
        return len(self.order)

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """Multiply the dense weight (m, n) out, in ``dtype``."""
        a, c = self.A.weight.to(dtype), self.C.weight.to(dtype)
        return torch.cat([a, c @ a]).index_select(0, self.order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` (..., n) to (..., m) through k of its own outputs."""
        h = self.A(x)
        rows = torch.cat([h, self.C(h)], -1)
        # On CPUs several times as fast as index_select, which copies the rows of its output one number at a time.
        y = rows.gather(-1, self.order.long().expand_as(rows))
        return y if self.bias is None else y + self.bias


class AraConfig(QuantizationConfigMixin):
    """``quantization_config`` of an ARA checkpoint.

    Args:
        ranks: module path → kept rank k, for the factorised modules only; all others are dense.
        layout: how those are stored: ``factors`` (:class:`LowRankLinear`) or ``pivoted`` (:class:`PivotedLinear`).
        format_version: of the checkpoint; see ``FORMATS``.
        provenance: how the checkpoint was made; carried along, never interpreted.
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
        if not isinstance(layout, str) or FORMATS.get(layout, format_version + 1) > format_version:
            raise ValueError(
                f"quantization_config.layout must be one of those of ARA format {format_version} "
                f"({', '.join(name for name, since in FORMATS.items() if since <= format_version)}), got {layout!r}"
            )
        for name, rank in self.ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(
                    f"quantization_config.ranks[{name!r}] must be a whole number of at least 1, got {rank!r}"
                )


class AraQuantizer(HfQuantizer):
    """Puts compressed layers into the empty model before transformers loads the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        ignored = {rf"^{re.escape(key)}$" for key in self._guards()}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}
        config = self.quantization_config
        kind = PivotedLinear if config.layout == "pivoted" else LowRankLinear
        for name, rank in config.ranks.items():
            layer = _empty_like(_linear(model, name), kind, rank)
            for part in layer.modules():
                # A family's own way to fill new layers expects the dense ones (a bias, say), and is not wanted here.
                vars(part)["_is_hf_initialized"] = True
            replace_linear(model, name, layer)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            # Without memory there are no numbers to look at.
            if isinstance(module, PivotedLinear) and not module.order.is_meta and not _is_permutation(module.order):
                raise ValueError(f"{name}.order is not a permutation of 0 … {len(module.order) - 1}")
        # The code file does not travel with a later save_pretrained; a reference to it would dangle.
        if getattr(model.config, "auto_map", None):
            del model.config.auto_map
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return what ``save_pretrained`` writes: the weights and the guards of :meth:`_guards`."""
        guards = {key: torch.empty(0, dtype=model.dtype) for key in self._guards()}
        return {**model.state_dict(), **guards}, {}

    def _guards(self) -> list[str]:
        """Name an empty tensor that stands where a reader ignorant of ARA looks for a dense weight.

        Without it such a reader warns, fills the missing weights with random numbers and goes on; with it the shape
        does not fit, and loading stops.
        """
        return [f"{name}.weight" for name in sorted(self.quantization_config.ranks)[:1]]

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return densify(model)

    def is_serializable(self) -> bool:
        """A loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Two matrix products compile like one."""
        return True


class AraForCausalLM:
    """What ``auto_map`` names: importing it registers ARA, then the model's own class does the rest."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Part of the protocol of remote code; nothing to do."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: Any, **kwargs: Any) -> Any:
        """Load ``path`` with the class that transformers has for ``config``."""
        kwargs.pop("trust_remote_code", None)
        return _native_class(config).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return _native_class(config)._from_config(config, **kwargs)


def replace_linear(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` where the module called ``name`` stands in ``model``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def densify(model: nn.Module) -> nn.Module:
    """Multiply every compressed layer of ``model`` back into an ordinary linear layer, in place.

    The product is taken in float32 and rounded once, to the dtype of the factors.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            replace_linear(model, name, _dense_layer(module))
    return model


def register() -> None:
    """Tell transformers about ``quant_method: ara``; harmless when done before."""
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


def _is_permutation(order: torch.Tensor) -> bool:
    return torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype, device=order.device))


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
