"""One flipped bit each: in every kind of file that a command reads, and what the command must make of it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from tests.drill.cases import Outcome, Reference
from tests.drill.disk import Disk
from tests.drill.process import ara
from tests.drill.result import differences, snapshot

# Scenarios that can be cut off and gone on with.
UNFINISHED = ("decompose", "train-masks", "eval", "compare")


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        name: of it.
        files: patterns below the folder.
        readers: commands that read it, begun where everything is finished; none for a command that was cut off.
        cut_off: the scenario whose unfinished work it belongs to; it is run again.
        must: refuse: the command may not accept the file; remake: it may not stumble over it; either: whatever it
            does, it ends in the right result or refuses.
        named: what an error may call it beside the name of the file or of the result.
    """

    name: str
    files: tuple[str, ...]
    readers: tuple[str, ...] = ()
    cut_off: str | None = None
    must: str = "either"
    named: str = ""


def _manifest(stage: str) -> tuple[str, ...]:
    return (f"ws/{stage}/*/manifest.json",)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("factors", ("ws/decompose/*/*.safetensors",), ("allocate", "truncate", "eval"), must="refuse"),
        Kind("manifest of factors", _manifest("decompose"), ("allocate", "truncate", "eval", "report")),
        Kind("masks", ("ws/train-masks/*/*.safetensors",), ("allocate ara",), must="refuse"),
        Kind("manifest of masks", _manifest("train-masks"), ("allocate ara",)),
        Kind("ranks.json", ("ws/allocate/energy-0.70/ranks.json",), ("truncate", "eval", "report"), must="refuse"),
        Kind("manifest of ranks", ("ws/allocate/energy-0.70/manifest.json",), ("truncate", "eval", "report")),
        Kind("checkpoint, tensors", ("ws/truncate/*/checkpoint/*.safetensors",),
            ("eval", "export", "bench", "generate"), must="refuse"),
        Kind("checkpoint, the rest", ("ws/truncate/*/checkpoint/*.json", "ws/truncate/*/checkpoint/*.py"),
            ("eval", "export", "generate"), must="refuse"),
        Kind("manifest of the checkpoint", _manifest("truncate"), ("eval", "export", "report")),
        Kind("exported graph", ("ws/export/*/model.onnx*",), ("generate onnx", "eval onnx"), must="refuse"),
        Kind("export, the rest", ("ws/export/*/[!m]*.json",), ("generate onnx", "eval onnx"), must="refuse"),
        Kind("manifest of the export", _manifest("export"), ("generate onnx", "eval onnx")),
        Kind("figures", tuple(f"ws/{stage}/*/[!m]*.json" for stage in ("eval", "bench", "compare")), ("report",)),
        Kind("manifest of figures", (*_manifest("eval"), *_manifest("bench"), *_manifest("compare")), ("report",)),
        Kind("report", ("ws/report/*/report.*",), ("report again",), must="refuse"),
        Kind("token cache", ("ws/cache/tokens/*",), ("decompose", "allocate sensitivity"), must="remake"),
        Kind("sensitivity cache", ("ws/cache/tables/*",), ("allocate sensitivity",), must="remake"),
        Kind("workspace.json", ("ws/workspace.json",), ("decompose", "allocate"), named="ws "),
        Kind("model", ("model/*.safetensors", "model/config.json"), ("truncate", "decompose"), named="model "),
        *(Kind(f"{name}, journal", (f"ws/{name}/.*.partial/.journal.json",), cut_off=name, must="remake")
            for name in UNFINISHED),
        *(Kind(f"{name}, finished part", (f"ws/{name}/.*.partial/[!.]*.safetensors",
            f"ws/{name}/.*.partial/[!.]*.json"), cut_off=name, must="remake") for name in UNFINISHED),
        Kind("recovery, finished part", ("ws/recover/.*.partial/.work-*.safetensors",), cut_off="recover",
            must="remake"),
        Kind("training, checkpoint", ("ws/train-masks/.*.partial/.checkpoint.safetensors",), cut_off="train-masks",
            must="remake"),
    )
}  # fmt: skip


def flip(kind: Kind, case: int, chance: random.Random, disk: Disk, references: Mapping[str, Reference]) -> Outcome:
    """Flip one bit of a file, and run a command that reads it.

    Args:
        kind: of file.
        case: number of the case.
        chance: chooses reader, file, byte and bit.
        disk: to work on.
        references: by reader, and by ``cut off SCENARIO``.
    """
    reference = references[f"cut off {kind.cut_off}" if kind.cut_off else chance.choice(kind.readers)]
    disk.fill(reference.base)
    path = chance.choice(sorted(path for pattern in kind.files for path in disk.root.glob(pattern)))
    content = bytearray(path.read_bytes())
    position, bit = chance.randrange(len(content)), chance.randrange(8)
    content[position] ^= 1 << bit
    path.write_bytes(content)
    name = path.relative_to(disk.root).as_posix()
    before = _kept(snapshot(disk.root, raw=True))
    ended = ara(reference.scenario.words, disk.root)
    told = f"{name}, byte {position}, bit {bit}: {reference.scenario.name}"
    key = "/".join(name.split("/")[1:3])
    wrong = ["it leaves a traceback"] if "Traceback" in ended.err else []
    if ended.code == 0 and f"{key} is damaged and left out" in _report(disk):
        how = "refused"
    elif ended.code == 0:
        how = "made again" if kind.cut_off or "discarding the damaged" in ended.err else "unharmed"
        # The file itself stays as it is where nobody reads it.
        ignored = () if how == "made again" else (name,)
        found, expected = (
            {k: v for k, v in s.items() if k not in ignored} for s in (snapshot(disk.root), reference.result)
        )
        wrong += differences(found, expected)
        if reference.scenario.line.startswith("generate") and ended.out != reference.out:
            wrong.append(f"the answer is {ended.out!r}, not {reference.out!r}")
        if kind.must == "refuse":
            wrong.append("it was accepted")
    else:
        how = "refused"
        line = ended.errors[0] if ended.errors else ""
        if ended.code != 1 or len(ended.errors) != 1:
            wrong.append(f"it ended by {ended.code}: {ended.err[-600:]}")
        if not any(word and word in f"{line} " for word in (path.name, key, kind.named)):
            wrong.append(f"the error does not name the file: {line}")
        if kind.must == "remake":
            wrong.append(f"it stumbled: {line}")
        wrong += differences(_kept(snapshot(disk.root, raw=True)), before)
    return Outcome("flip", kind.name, case, told, tuple(wrong), how)


def _kept(found: dict[str, str]) -> dict[str, str]:
    """Return a snapshot without the caches, which a command may fill before it refuses."""
    return {name: content for name, content in found.items() if not name.startswith("ws/cache/")}


def _report(disk: Disk) -> str:
    """Return the document of the report that was just made; empty if none was."""
    return "".join(path.read_text(errors="replace") for path in disk.root.glob("ws/report/second/report.json"))
