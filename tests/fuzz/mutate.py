"""Ways to spoil data: JSON values, JSON documents, bytes, text.

Every function takes a seeded :class:`random.Random` and is a function of it alone.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_DUPLICATE = "@@again@@"

NUMBERS: tuple[Any, ...] = (
    0, 1, 2, 3, 7, -1, -2, 64, 65, 100, 255, 256, 1000, 4097, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1,
    2**63, 2**64, -(2**31) - 1, -(2**63) - 1, 10**12, 10**30, -(10**30), 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-9, 1e-320,
    1e300, -1e300, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
STRINGS = (
    "", " ", "a", "0", "1", "-1", "nan", "true", "null", "None", "auto", "x" * 300, "x" * 70_000, "\x00", "a\x00b",
    "\n", "a\nb", "\r\n", "\t", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x7f", "\x85", "\u2028", "\u202eelif",
    "\u200b", "\ufeff", "\ud800", "a\udfffb", "é", "e\u0301", "😀", "٣", "½", "ﬁ", "%s%n", "{}", "{0.__class__}",
    "{{ 7*7 }}", "[red]bold[/red]", "<script>alert(1)</script>", "'", '"', "\\", "$(id)", ";", "../x", "../../x",
    "..", ".", "/", "//", "a/b", "a\\b", "C:x", "/etc/hostname/x", "{root}/out/x", "~", "~nobody/x", "-", "--", "-h",
    "--help", ".hidden", "x.partial", "CON", "manifest.json",
)  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """JSON text that stands in a document as it is, well-formed or not."""

    text: str


def number(rng: random.Random) -> Any:
    """Return a number that few programs expect."""
    kind = rng.random()
    if kind < 0.75:
        return rng.choice(NUMBERS)
    if kind < 0.85:
        return rng.randint(-20, 300)
    if kind < 0.95:
        return rng.uniform(-2, 2)
    return Raw("9" * rng.choice((400, 4301, 6000)) if rng.random() < 0.5 else "1e" + "9" * rng.choice((3, 9)))


def string(rng: random.Random) -> str:
    """Return a text that few programs expect."""
    if rng.random() < 0.8:
        return rng.choice(STRINGS)
    return "".join(_character(rng) for _ in range(rng.randint(1, 12)))


def deep(rng: random.Random) -> Raw:
    """Return a value inside many others."""
    depth = rng.choice((3, 10, 60, 64, 65, 100, 900, 1100, 20_000, 100_000))
    left, right = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"b":', "}]")))
    return Raw(left * depth + "1" + right * (depth if rng.random() < 0.9 else depth // 2))


def value(rng: random.Random, words: Sequence[Any] = ()) -> Any:
    """Return a JSON value of any kind; ``words`` are values that mean something where it will stand."""
    kind = rng.random()
    if words and kind < 0.3:
        return copy.deepcopy(rng.choice(words))  # words stay as they are
    if kind < 0.5:
        return number(rng)
    if kind < 0.7:
        return string(rng)
    if kind < 0.83:
        return rng.choice((None, True, False))
    if kind < 0.88:
        return deep(rng)
    if kind < 0.94:
        return [value(rng, words) for _ in range(rng.randint(0, 3))]
    return {string(rng)[:300]: value(rng, words) for _ in range(rng.randint(0, 3))}


def document(rng: random.Random, valid: Any, words: Sequence[Any] = ()) -> Any:
    """Return ``valid`` with one to three changes of its structure."""
    changed = copy.deepcopy(valid)
    for _ in range(_few(rng)):
        if rng.random() < 0.03:
            return value(rng, words)
        _change(rng, changed, words)
    return changed


def dumps(changed: Any, indent: int | None = None) -> str:
    """Write a document that :class:`Raw` values and repeated keys may be part of."""
    raws: list[str] = []

    def placeholder(item: Any) -> str:
        if not isinstance(item, Raw):
            raise TypeError(type(item).__name__)
        raws.append(item.text)
        return f"@@raw{len(raws) - 1}@@"

    text = json.dumps(changed, default=placeholder, indent=indent)
    text = re.sub(r'"@@raw(\d+)@@"', lambda found: raws[int(found[1])], text)
    return re.sub(rf'{_DUPLICATE}\d+"', '"', text)


def json_bytes(rng: random.Random, valid: Any, words: Sequence[Any] = ()) -> bytes:
    """Return a JSON file: ``valid`` with changes of its structure, of its bytes, or of both."""
    kind = rng.random()
    if kind < 0.1:
        return spoil(rng, json.dumps(valid).encode())
    written = dumps(document(rng, valid, words), rng.choice((None, None, 1))).encode()
    return spoil(rng, written) if kind < 0.15 else written


def spoil(rng: random.Random, data: bytes, within: int | None = None) -> bytes:
    """Return ``data`` with one to three changes of its bytes, in its first ``within`` bytes if that is given."""
    for _ in range(_few(rng)):
        data = rng.choice(_BYTE_CHANGES)(rng, data, len(data) if within is None else min(within, len(data)))
    return data


def _few(rng: random.Random) -> int:
    return rng.choice((1, 1, 1, 1, 1, 2, 2, 3))


def _character(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return chr(rng.randrange(32, 127))
    return chr(
        rng.choice((rng.randrange(0x20), rng.randrange(0x80, 0x3000), rng.randrange(0x10000), rng.randrange(0x110000)))
    )


def _change(rng: random.Random, changed: Any, words: Sequence[Any]) -> None:
    holder, key = _place(rng, changed)
    if holder is None:
        return
    now = holder[key]
    kind = rng.random()
    if kind < 0.15:
        del holder[key]
    elif kind < 0.55:
        holder[key] = value(rng, words)
    elif kind < 0.62:
        holder[key] = rng.choice((lambda: [now], lambda: {"x": now}, lambda: str(now), lambda: [now] * 3))()
    elif kind < 0.70 and isinstance(now, int | float) and not isinstance(now, bool):
        holder[key] = rng.choice((now + 1, now - 1, now * 2, -now, now * 10**6, float(now), now + 0.5, bool(now)))
    elif kind < 0.78 and isinstance(now, str):
        holder[key] = rng.choice((now + string(rng)[:400], now.upper(), now[:-1], string(rng) + now, now[::-1]))
    elif kind < 0.82 and isinstance(now, list):
        holder[key] = rng.choice((now[::-1], now[:1], now * 2, now * 400 if len(now) < 20 else now * 3))
    elif kind < 0.88 and isinstance(holder, dict):
        holder[f"{key}{_DUPLICATE}{rng.randrange(10**6)}"] = value(rng, words)
    elif kind < 0.94 and isinstance(holder, dict):
        holder[rng.choice((string(rng), "unknown", "__class__", str(key) + "_"))] = value(rng, words)
    else:
        other, name = _place(rng, changed)
        holder[key] = copy.deepcopy(other[name]) if other is not None and name in other else None


def _place(rng: random.Random, changed: Any) -> tuple[Any, Any]:
    """Return a container and a key in it; outer ones are likelier than their share, tables are not all there is."""
    holder, key = None, None
    inside = changed
    while isinstance(inside, dict | list) and inside and (holder is None or rng.random() < 0.75):
        holder = inside
        key = rng.choice(list(inside)) if isinstance(inside, dict) else rng.randrange(len(inside))
        inside = inside[key]
    return holder, key


def _flip(rng: random.Random, data: bytes, end: int) -> bytes:
    if not end:
        return data
    at = rng.randrange(end)
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _cut(rng: random.Random, data: bytes, end: int) -> bytes:
    return data[: rng.choice((0, 1, rng.randint(0, end), rng.randint(0, end), max(0, len(data) - 1)))]


def _insert(rng: random.Random, data: bytes, end: int) -> bytes:
    at = rng.randint(0, end)
    new = rng.choice(
        (
            b"\x00",
            b"\xff",
            b"\xed\xa0\x80",
            b"\n",
            b"\r",
            b'"',
            b"{",
            b"[" * 2000,
            b"NaN",
            b"1e999",
            rng.randbytes(8),
            b"\x00" * 64,
        )
    )
    return data[:at] + new + data[at:]


def _overwrite(rng: random.Random, data: bytes, end: int) -> bytes:
    at = rng.randint(0, end)
    new = rng.choice((b"\xff" * 8, b"\x00" * 8, rng.randbytes(4), b"\xff" * 4, b"\x7f" + b"\xff" * 7))
    return data[:at] + new + data[at + len(new) :]


def _drop(rng: random.Random, data: bytes, end: int) -> bytes:
    at = rng.randint(0, end)
    return data[:at] + data[at + rng.choice((1, 2, 7, 100)) :]


def _encoding(rng: random.Random, data: bytes, end: int) -> bytes:
    text = data.decode("utf-8", "replace")
    return rng.choice(
        (
            lambda: b"\xef\xbb\xbf" + data,
            lambda: text.encode("utf-16"),
            lambda: text.encode("utf-32-le", "replace"),
            lambda: text.encode("latin-1", "replace"),
            lambda: data.replace(b"\n", b"\r\n"),
            lambda: data + data,
            lambda: rng.randbytes(rng.choice((1, 50, 3000))),
            lambda: b"\x00" * rng.choice((1, 100, 5000)),
        )
    )()


_BYTE_CHANGES: tuple[Callable[[random.Random, bytes, int], bytes], ...] = (
    _flip, _flip, _cut, _insert, _overwrite, _drop, _encoding
)  # fmt: skip
