"""Detects Ctrl+C, even if a C library turns it into another exception."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def recording_interrupts(received: list[int]) -> Iterator[None]:
    """Append to ``received`` the signal number of every Ctrl+C inside the block.

    C code may turn the KeyboardInterrupt into another error: onnxruntime into an ImportError, torch into a ValueError.
    """

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.default_int_handler(number, frame)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, record)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
