"""Serving compressed checkpoints with vLLM: ``vllm serve FOLDER`` works where ARA is installed.

vLLM calls :func:`register` in each of its processes, through the entry point ``vllm.general_plugins``. The
``quant_method`` of the checkpoint then selects :mod:`export.vllm.config`. Nothing of this package is called otherwise.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Register ``quant_method: ara`` with vLLM; a second call changes nothing.

    A vLLM whose interfaces ARA does not know still works for other models: there is a warning, no error.
    """
    try:
        import export.vllm.config  # noqa: F401 - its class registers itself
    except ImportError as error:
        logging.getLogger("vllm.ara").warning("This vLLM cannot serve ARA checkpoints: %s", error)
