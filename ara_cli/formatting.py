"""Sizes, durations, counts and shares as text."""

from __future__ import annotations

import math

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_COUNT_UNITS = ("", "k", "M", "B", "T")


def _scaled(value: float, base: float, last: int, digits: int) -> tuple[float, int]:
    """Divide ``value`` by ``base`` until it is below ``base`` after rounding; return it and the number of divisions."""
    steps = 0
    while steps < last and round(abs(value), digits if steps else 0) >= base:
        value /= base
        steps += 1
    return value, steps


def bytes_text(size: float) -> str:
    """Return a size in bytes with a binary unit: ``"512 B"``, ``"268.2 MiB"``, ``"1.3 GiB"``."""
    value, steps = _scaled(size, 1024, len(_BYTE_UNITS) - 1, digits=1)
    return f"{value:.1f} {_BYTE_UNITS[steps]}" if steps else f"{value:.0f} B"


def count_text(count: float) -> str:
    """Return a count with a suffix: ``"999"``, ``"113.0k"``, ``"134.5M"``, ``"7.2B"``."""
    value, steps = _scaled(count, 1000, len(_COUNT_UNITS) - 1, digits=1)
    return f"{value:.1f}{_COUNT_UNITS[steps]}" if steps else f"{value:.0f}"


def seconds_text(seconds: float) -> str:
    """Return a duration as text: ``"0.42 s"``, ``"4.2 s"``, ``"1 min 12 s"``, ``"2 h 5 min"``."""
    if not math.isfinite(seconds):
        return "unknown time"
    if round(seconds, 2) < 1:
        return f"{seconds:.2f} s"
    if round(seconds, 1) < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _two_units(*divmod(whole, 60), "min", "s")
    return _two_units(*divmod(round(seconds / 60), 60), "h", "min")


def _two_units(large: int, small: int, large_unit: str, small_unit: str) -> str:
    return f"{large} {large_unit} {small} {small_unit}" if small else f"{large} {large_unit}"


def percent(fraction: float, digits: int = 1) -> str:
    """Return a fraction as a percentage: ``percent(0.8)`` is ``"80.0%"``."""
    return f"{100 * fraction:.{digits}f}%"
