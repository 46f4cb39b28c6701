"""Registers ARA checkpoints with transformers, without importing transformers.

``import ara`` must be fast, because the command line needs it for ``ara --help``. After it,
``AutoModelForCausalLM.from_pretrained`` must accept ``quant_method: ara``. So two small stand-ins go into transformers'
tables of quantizers: at once if transformers is already imported, else right after its import. They import the real
classes of :mod:`ara.layouts.modeling_ara` when an ARA checkpoint is opened.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

QUANT_METHOD = "ara"
# The module that holds transformers' tables of quantizers.
_TABLES = "transformers.quantizers.auto"


class _ConfigStandIn:
    @staticmethod
    def from_dict(values: dict[str, Any], **kwargs: Any) -> Any:
        from ara.layouts.modeling_ara import AraConfig

        return AraConfig.from_dict(values, **kwargs)


def _quantizer_stand_in(config: Any, **kwargs: Any) -> Any:
    from ara.layouts.modeling_ara import AraQuantizer

    return AraQuantizer(config, **kwargs)


class _RegisteringLoader(Loader):
    """Wraps a loader and fills the tables after it has run."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _fill_tables(module)


class _Finder(MetaPathFinder):
    """Catches the one import of transformers' tables, then removes itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def _fill_tables(module: ModuleType) -> None:
    module.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, _ConfigStandIn)
    module.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, _quantizer_stand_in)


def register_with_transformers() -> None:
    """Register ``quant_method: ara`` with transformers, now or right after its import; repeated calls are harmless."""
    if _TABLES in sys.modules:
        _fill_tables(sys.modules[_TABLES])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
