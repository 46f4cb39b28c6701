"""Ctrl+C, also where a library in C makes something else of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noting_interrupts(heard: list[int]) -> Iterator[None]:
    """Note every Ctrl+C inside the block.

    Of its KeyboardInterrupt, code in C may make any other error: onnxruntime an ImportError, torch a ValueError.

    Args:
        heard: gets the number of every signal.
    """

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        signal.default_int_handler(number, frame)

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
