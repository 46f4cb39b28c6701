"""ARA: adaptive rank allocation for SVD compression of large language models.

``import ara`` does not import torch. It registers compressed checkpoints with transformers::

    import ara
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("ara-workspace/truncate/energy-0.80/checkpoint")

:func:`ara.load` does the same in one call. :mod:`ara.pipeline` describes the pipeline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ara.models.hook import register_with_transformers
from ara.version import __version__

if TYPE_CHECKING:
    from ara.models.checkpoint import load

__all__ = ["__version__", "load"]

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name == "load":
        from ara.models.checkpoint import load

        return load
    raise AttributeError(f"module 'ara' has no attribute {name!r}")
