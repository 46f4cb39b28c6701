"""GGUF and safetensors headers taken apart, spoilt and put together again."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass, field
from typing import Any

from tests.fuzz import mutate

_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_COUNTS = (0, 1, 2, 255, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**61, 2**63 - 1, 2**63, 2**64 - 1)
_ARCHITECTURES = (
    "llama", "qwen2", "qwen3", "gpt2", "phi3", "falcon", "bloom", "t5", "bert", "mamba", "gemma2", "gemma3",
    "starcoder2", "nemotron", "stablelm", "qwen2moe", "lfm2", "deci", "clip", "xyz", "",
)  # fmt: skip


@dataclass
class Gguf:
    """A GGUF file in parts; counts that are set are written instead of the true ones."""

    version: int
    pairs: list[list[Any]]  # key, type, value
    tensors: list[dict[str, Any]]  # name, dims, type, offset
    data: bytes
    counts: dict[str, int] = field(default_factory=dict)
    magic: bytes = b"GGUF"


def parse_gguf(raw: bytes) -> Gguf:
    """Take a valid little-endian file of version 3 apart."""
    at = 4

    def take(form: str) -> Any:
        nonlocal at
        (found,) = struct.unpack_from(form, raw, at)
        at += struct.calcsize(form)
        return found

    def text() -> bytes:
        nonlocal at
        length = take("<Q")
        at += length
        return raw[at - length : at]

    def read(kind: int) -> Any:
        if kind == _STRING:
            return text()
        if kind == _ARRAY:
            inner, count = take("<I"), take("<Q")
            return [inner, [read(inner) for _ in range(count)]]
        return take(_FORMATS[kind])

    version, tensors, pairs = take("<I"), take("<Q"), take("<Q")
    table = []
    for _ in range(pairs):
        key, kind = text(), take("<I")
        table.append([key, kind, read(kind)])
    infos = []
    for _ in range(tensors):
        name, rank = text(), take("<I")
        dims = [take("<Q") for _ in range(rank)]
        infos.append({"name": name, "dims": dims, "type": take("<I"), "offset": take("<Q")})
    return Gguf(version, table, infos, raw[-(-at // 32) * 32 :])


def write_gguf(file: Gguf) -> bytes:
    """Put a file together, whatever its parts say."""
    out = bytearray(file.magic)

    def put(form: str, number: Any) -> None:
        try:
            out.extend(struct.pack(form, number))
        except (struct.error, OverflowError, TypeError, ValueError):
            out.extend(b"\xff" * struct.calcsize(form))

    def text(content: Any) -> None:
        data = content if isinstance(content, bytes) else str(content).encode("utf-8", "surrogatepass")
        put("<Q", file.counts.get("string", len(data)) if len(data) == file.counts.get("at", -1) else len(data))
        out.extend(data)

    def write(kind: int, content: Any) -> None:
        if kind == _STRING:
            text(content)
        elif kind == _ARRAY:
            inner, items = content if isinstance(content, list) and len(content) == 2 else (0, [])
            put("<I", inner)
            put("<Q", file.counts.get("array", len(items)))
            for item in items:
                write(inner, item)
        else:
            put(_FORMATS.get(kind, "<I"), content)

    put("<I", file.version)
    put("<Q", file.counts.get("tensors", len(file.tensors)))
    put("<Q", file.counts.get("pairs", len(file.pairs)))
    for key, kind, content in file.pairs:
        text(key)
        put("<I", kind)
        write(kind, content)
    for info in file.tensors:
        text(info["name"])
        put("<I", file.counts.get("dims", len(info["dims"])))
        for dim in info["dims"]:
            put("<Q", dim)
        put("<I", info["type"])
        put("<Q", info["offset"])
    out.extend(b"\x00" * (-len(out) % 32))
    return bytes(out) + file.data


def spoil_gguf(rng: random.Random, raw: bytes) -> bytes:
    """Return a GGUF file with one to three faults in its header, or a few in its bytes."""
    if rng.random() < 0.25:
        return mutate.spoil(rng, raw, rng.choice((24, 400, len(raw))))
    file = parse_gguf(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change_gguf(rng, file)
    written = write_gguf(file)
    return written if rng.random() < 0.9 else mutate.spoil(rng, written)


def _change_gguf(rng: random.Random, file: Gguf) -> None:
    kind = rng.random()
    pair = rng.choice(file.pairs) if file.pairs else None
    info = rng.choice(file.tensors) if file.tensors else None
    if pair is not None and kind < 0.1:
        file.pairs.remove(pair)
    elif pair is not None and kind < 0.35:
        _change_value(rng, pair)
    elif pair is not None and kind < 0.42:
        pair[1] = rng.choice((*range(14), 255, 2**31))
    elif pair is not None and kind < 0.47:
        pair[0] = rng.choice((mutate.string(rng)[:400], pair[0] + b"x", b"", pair[0].swapcase()))
    elif pair is not None and kind < 0.52:
        file.pairs.append([pair[0], rng.choice((4, 5, 6, 8, 10)), mutate.number(rng)])
    elif kind < 0.60:
        file.counts[rng.choice(("tensors", "pairs", "array", "dims"))] = rng.choice(_COUNTS)
    elif kind < 0.64:
        file.counts["at"] = len(rng.choice(file.pairs)[0]) if file.pairs else 4
        file.counts["string"] = rng.choice(_COUNTS)
    elif kind < 0.68:
        file.version = rng.choice((0, 1, 2, 4, 99, 0x03000000, 2**32 - 1))
    elif kind < 0.72:
        for one in file.pairs:
            if one[0] == b"general.architecture":
                one[2] = rng.choice(_ARCHITECTURES).encode()
    elif kind < 0.76:
        extra = rng.choice(
            (
                [b"llama.rope.scaling.type", _STRING, rng.choice((b"yarn", b"linear", b"none", b"longrope", b"??"))],
                [b"llama.rope.scaling.factor", 6, rng.choice((0.0, 4.0, -1.0, float("nan"), float("inf")))],
                [b"llama.expert_count", 4, rng.choice((1, 8, 2**32 - 1))],
                [b"general.alignment", 4, rng.choice((0, 1, 3, 64, 2**31))],
                [b"tokenizer.chat_template", _STRING, rng.choice((b"{{ 1/0 }}", b"{% for %}", b"\xff\xfe"))],
                [b"general.file_type", 4, rng.choice((0, 7, 15, 999))],
            )
        )
        file.pairs.append(extra)
    elif info is not None and kind < 0.80:
        file.tensors.remove(info)
    elif info is not None and kind < 0.86:
        info["dims"] = rng.choice(
            (
                info["dims"][::-1],
                info["dims"][:1],
                [*info["dims"], 1, 1, 1],
                [],
                [rng.choice(_COUNTS) for _ in info["dims"]],
                [info["dims"][0] + 1, *info["dims"][1:]],
            ),
        )
    elif info is not None and kind < 0.91:
        info["type"] = rng.choice((*range(42), 255, 2**31))
    elif info is not None and kind < 0.95:
        info["offset"] = rng.choice((*_COUNTS, info["offset"] + 1, info["offset"] + 32))
    elif info is not None and kind < 0.98:
        info["name"] = rng.choice((mutate.string(rng)[:400], b"", info["name"] + b"x", b"rope_freqs.weight"))
        if rng.random() < 0.3:
            file.tensors.append(dict(info))
    else:
        file.data = file.data[: rng.randint(0, len(file.data))]


def _change_value(rng: random.Random, pair: list[Any]) -> None:
    kind, content = pair[1], pair[2]
    if kind == _STRING:
        pair[2] = rng.choice((mutate.string(rng), "", content[:-1], content * 1000))
    elif kind == _ARRAY:
        inner, items = content
        pair[2] = rng.choice(
            (
                [inner, []],
                [inner, items[: len(items) // 2]],
                [inner, items * 3],
                [inner, items[::-1]],
                [inner, [items[0]] * len(items)] if items else [inner, []],
                [rng.choice((0, 4, 6, 8)), items],
                [_ARRAY, [[_ARRAY, [[_ARRAY, []]]]]],
                [inner, [mutate.string(rng) if inner == _STRING else mutate.number(rng), *items[1:]]],
            )
        )
    else:
        pair[2] = rng.choice((0, 1, 3, content + 1 if content else 1, mutate.number(rng), 2**31 - 1, 2**20))


def spoil_safetensors(rng: random.Random, raw: bytes) -> bytes:
    """Return a safetensors file with faults in its header, in the length of it, or in its bytes."""
    kind = rng.random()
    (length,) = struct.unpack_from("<Q", raw)
    header, data = raw[8 : 8 + length], raw[8 + length :]
    if kind < 0.15:
        return mutate.spoil(rng, raw, rng.choice((8, 8 + length, len(raw))))
    if kind < 0.25:
        return struct.pack("<Q", rng.choice((*_COUNTS, length - 1, length + 1, len(raw)))) + header + data
    if kind < 0.32:
        return raw[:8] + header + rng.choice((data[:-1], data + b"\x00" * 8, b"", data[: len(data) // 2]))
    words = (
        "F32", "F16", "BF16", "F64", "I8", "I64", "BOOL", "U8", "F8_E4M3", "F4", "C64", "Q4", [1, 2], [0, 0],
        [2**62, 2**62], [0, len(data)], [len(data), 0], [-1, 4], {"format": "pt"}, {"format": "tf"},
    )  # fmt: skip
    new = mutate.dumps(mutate.document(rng, json.loads(header), words)).encode()
    new += b" " * (-len(new) % 8)
    return struct.pack("<Q", len(new)) + new + data
