"""Workspaces that were edited, damaged or interrupted: manifests, files of results, journals, locks, caches, ranks."""

from __future__ import annotations

import json
import random
from typing import Any

from ara.workspace.manifest import digest
from tests.fuzz import binary, mutate
from tests.fuzz.calls import (
    AGAIN,
    ALLOCATE,
    ALLOCATE_ARA,
    GENERATE,
    GENERATE_ONNX,
    REPORT,
    STATUS,
    TRUNCATE,
    WS,
    no_file,
)
from tests.fuzz.harness import Case
from tests.fuzz.registry import target
from tests.fuzz.sandbox import Content, Folder, Link, Pipe
from tests.fuzz.seeds import FACTORS, RANKS
from tests.fuzz.words import MANIFEST_WORDS
from tests.fuzz.workspaces import Seeds, sealed

# Stage → commands that read its manifest and its files; the cheap ones stand there often.
_READERS: dict[str, list[list[str]]] = {
    "decompose": [STATUS, ALLOCATE, ALLOCATE, ALLOCATE_ARA, TRUNCATE, AGAIN["decompose"]],
    "train-masks": [STATUS, ALLOCATE_ARA, ALLOCATE_ARA, ALLOCATE_ARA, AGAIN["train-masks"]],
    "allocate": [STATUS, TRUNCATE, TRUNCATE, TRUNCATE, AGAIN["allocate"]],
    "truncate": [STATUS, GENERATE, GENERATE, GENERATE, AGAIN["truncate"], AGAIN["export"], AGAIN["eval"]],
    "eval": [STATUS, STATUS, AGAIN["eval"]],
    "bench": [STATUS],
    "compare": [STATUS],
    "export": [STATUS, GENERATE_ONNX, GENERATE_ONNX, AGAIN["export"]],
    "report": [STATUS, AGAIN["report"], AGAIN["report"]],
}
# Share of the cases of a workspace that are read by a whole report, which takes as long as twenty other commands.
_REPORTED = {"eval": 0.08, "bench": 0.08, "compare": 0.08}


def _reader(rng: random.Random, stage: str, damaged: bool = False) -> list[str]:
    """Return a command that reads results of a stage; a damaged report would be made again, as dearly as a new one."""
    if rng.random() < _REPORTED.get(stage, 0.02):
        return [*REPORT, *WS]
    if damaged and stage == "report":
        return [*STATUS, *WS]
    return [*rng.choice(_READERS[stage]), *WS]


@target("manifest", 8)
def _manifest(rng: random.Random, seeds: Seeds) -> Case:
    """Manifests as a careless hand leaves them: most do not match their checksums any more."""
    key = rng.choice(seeds.results)
    name = f"ws/{key}/manifest.json"
    data = mutate.json_bytes(rng, seeds.json(name), MANIFEST_WORDS)
    argv = _reader(rng, key.partition("/")[0], damaged=True)
    return Case(argv, {name: data if rng.random() < 0.95 else no_file(rng)})


@target("sealed-manifest", 24)
def _sealed_manifest(rng: random.Random, seeds: Seeds) -> Case:
    """Manifests that fit their checksums, so that every field of them is read."""
    key = rng.choice(seeds.results)
    manifest = seeds.json(f"ws/{key}/manifest.json")
    part = rng.choice(("results", "results", "config", "model", "parents", "files", "tensors", None))
    if part is not None and manifest.get(part):
        manifest[part] = mutate.document(rng, manifest[part], MANIFEST_WORDS)
    else:
        manifest = mutate.document(rng, manifest, MANIFEST_WORDS)
    return Case(_reader(rng, key.partition("/")[0]), dict(sealed(seeds, {key: manifest}, {})))


@target("sealed-file", 12)
def _sealed_file(rng: random.Random, seeds: Seeds) -> Case:
    """Files of results whose checksums are right: ranks.json, results.json, report.json, configs, factors."""
    names = [name for key in seeds.results for name in seeds.names(f"ws/{key}") if not name.endswith("manifest.json")]
    name = rng.choice([name for name in names if name.endswith(rng.choice((".json", ".json", ".safetensors", "")))])
    data = seeds.bytes(name)
    if name.endswith(".json"):
        data = mutate.json_bytes(rng, json.loads(data), MANIFEST_WORDS)
    elif name.endswith(".safetensors"):
        data = binary.spoil_safetensors(rng, data)
    else:
        data = mutate.spoil(rng, data)
    return Case(_reader(rng, name.split("/")[1]), dict(sealed(seeds, {}, {name: data})))


@target("workspace", 5)
def _workspace(rng: random.Random, seeds: Seeds) -> Case:
    readers = [*(reader for stage in ("decompose", "allocate", "truncate") for reader in _READERS[stage])]
    data = mutate.json_bytes(rng, seeds.json("ws/workspace.json"), MANIFEST_WORDS)
    files: dict[str, Content] = {"ws/workspace.json": data if rng.random() < 0.9 else no_file(rng)}
    return Case([*rng.choice(readers), *WS], files)


@target("workspace-folders", 4)
def _workspace_folders(rng: random.Random, seeds: Seeds) -> Case:
    """Files and folders that do not belong there, and those that are missing or no files."""
    files: dict[str, Content] = {}
    kind = rng.random()
    if kind < 0.5:
        files[rng.choice(seeds.names("ws"))] = no_file(rng)
    elif kind < 0.8:
        place = rng.choice(
            ("ws/", "ws/decompose/", "ws/allocate/", "ws/unknown/", f"ws/allocate/{RANKS}/", "ws/cache/")
        )
        name = rng.choice(
            (
                "x",
                ".x",
                ".x.partial",
                ".x.old",
                "x.old",
                ".energy.old",
                ".energy.copy",
                "é",
                "a b",
                "manifest.json",
                "\udcff",
            )
        )
        files[place + name + rng.choice(("", "/y", "/manifest.json"))] = rng.choice(
            (Folder(), b"", b"{}", Link("."), Pipe())
        )
    else:
        files[f"ws/{rng.choice(('.lock', '.lock-owner.json', 'cache', 'decompose', 'eval'))}"] = rng.choice(
            (Folder(), Pipe(), Link("x"), b"x")
        )
    stage = rng.choice(("decompose", "allocate", "truncate", "train-masks", "export"))
    return Case(_reader(rng, stage), files)


@target("lock", 2)
def _lock(rng: random.Random, seeds: Seeds) -> Case:
    owner = {"pid": 4711, "command": "ara decompose x", "since": "2024-01-01T00:00:00+00:00"}
    data = mutate.json_bytes(rng, owner)
    readers = [reader for stage in ("decompose", "allocate", "truncate") for reader in _READERS[stage]]
    files: dict[str, Content] = {"ws/.lock-owner.json": data if rng.random() < 0.9 else no_file(rng)}
    return Case([*rng.choice(readers), *WS], files, locked="ws")


@target("journal", 8)
def _journal(rng: random.Random, seeds: Seeds) -> Case:
    """Work that was interrupted, and what is left of it."""
    folder = f"half/decompose/.{FACTORS}.partial"
    files: dict[str, Content] = {}
    kind = rng.random()
    if kind < 0.8:
        files[f"{folder}/.journal.json"] = _journal_bytes(rng, seeds.json(f"{folder}/.journal.json"))
    elif kind < 0.9:
        name = seeds.names(folder, "*.safetensors")[0]
        files[name] = rng.choice((no_file(rng), binary.spoil_safetensors(rng, seeds.bytes(name))))
    else:
        files[f"{folder}/{rng.choice(('.checkpoint.safetensors', 'x', '.journal.json'))}"] = no_file(rng)
    argv = rng.choice((["status"], AGAIN["decompose"], AGAIN["decompose"], AGAIN["decompose"]))
    return Case([*argv, "-w", "../half", "-q"], files)


def _journal_bytes(rng: random.Random, valid: dict[str, Any]) -> bytes:
    """Return a spoilt journal; most fit their checksum, else nothing in them would be believed."""
    if rng.random() < 0.3:
        return mutate.json_bytes(rng, valid, MANIFEST_WORDS)
    del valid["digest"]
    part = rng.choice(("files", "tensors", "results", None))
    if part is None:
        valid = mutate.document(rng, valid, MANIFEST_WORDS)
    else:
        valid[part] = mutate.document(rng, valid[part], MANIFEST_WORDS)
    try:
        plain = json.loads(mutate.dumps(valid))
        return json.dumps({**plain, "digest": digest(plain)}).encode()
    except (TypeError, ValueError, RecursionError):  # no object any more, or no JSON
        return mutate.dumps(valid).encode()


@target("cache", 3)
def _cache(rng: random.Random, seeds: Seeds) -> Case:
    """Tokens and tables that were kept to be read again."""
    name = rng.choice(seeds.names("ws/cache"))
    data = (
        binary.spoil_safetensors(rng, seeds.bytes(name))
        if name.endswith(".safetensors")
        else mutate.spoil(rng, seeds.bytes(name))
    )
    argv = rng.choice(([*AGAIN["decompose"], "--force"], [*AGAIN["train-masks"], "--force"]))
    return Case([*argv, *WS], {name: data if rng.random() < 0.9 else no_file(rng)})


@target("ranks", 12)
def _ranks(rng: random.Random, seeds: Seeds) -> Case:
    valid = seeds.json(f"ws/allocate/{RANKS}/ranks.json")
    words = ("dense", "factors", "pivoted", 1, 8, 15, 24, 0, "8", 8.0)
    if rng.random() < 0.5:
        valid["ranks"] = mutate.document(rng, valid["ranks"], words)
        data = mutate.dumps(valid).encode()
    else:
        data = mutate.json_bytes(rng, valid, words)
    keep = rng.choice(([], [], ["--keep", "0.7"]))
    return Case(
        ["allocate", "--ranks", "../in/mine.json", *keep, *WS],
        {"in/mine.json": data if rng.random() < 0.96 else no_file(rng)},
    )
