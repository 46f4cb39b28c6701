"""Silences transformers and the hub: only our own console prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silence_transformers(downloads: bool = False) -> Iterator[None]:
    """Silence log lines and progress bars of transformers and the hub inside the block, and restore them after it.

    Args:
        downloads: keep the download bars of the hub, for loads that may fetch gigabytes.
    """
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    hub_bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # without a network it logs every retry
    logging.disable_progress_bar()  # also disables the hub's
    if downloads and hub_bars:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
        else:
            disable_progress_bars()


@contextmanager
def silence_gguf() -> Iterator[None]:
    """Silence the progress bar of transformers' GGUF reader, which ignores the switches of transformers."""
    from functools import partial

    from tqdm.auto import tqdm
    from transformers import modeling_gguf_pytorch_utils as reader

    original = getattr(reader, "tqdm", None)
    if original is None:  # another release of transformers, with another bar
        yield
        return
    vars(reader)["tqdm"] = partial(tqdm, disable=True)
    try:
        yield
    finally:
        vars(reader)["tqdm"] = original
