"""lm-eval without its messages and progress bars."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def silence_lm_eval() -> Iterator[None]:
    """Suppress lm-eval's messages (except errors) and progress bars inside the block."""
    from tqdm import tqdm

    def silent(*arguments: Any, **options: Any) -> Any:
        return tqdm(*arguments, **{**options, "disable": True})

    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    talking = [
        vars(module)
        for name, module in sys.modules.items()
        if name.startswith("lm_eval.") and getattr(module, "tqdm", None) is tqdm
    ]
    for names in talking:
        names["tqdm"] = silent
    try:
        yield
    finally:
        logger.setLevel(before)
        for names in talking:
            names["tqdm"] = tqdm
