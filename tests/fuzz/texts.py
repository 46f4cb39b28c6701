"""Texts in every format, prompts and chat templates."""

from __future__ import annotations

import gzip
import json
import random

from tests.fuzz import mutate
from tests.fuzz.calls import WS, decompose, generate, generate_onnx, no_file
from tests.fuzz.harness import Case
from tests.fuzz.registry import target
from tests.fuzz.sandbox import Content, Gone
from tests.fuzz.seeds import EVAL, PLACE, STORY
from tests.fuzz.words import TEMPLATES
from tests.fuzz.workspaces import Seeds

STORY_TEXT = f"file:{STORY}"


@target("text", 14)
def _text(rng: random.Random, seeds: Seeds) -> Case:
    name = rng.choice(seeds.names("in/texts"))
    data = seeds.bytes(name)
    if ".jsonl" in name or ".ndjson" in name:
        data = _spoil_lines(rng, seeds.bytes("in/texts/story.jsonl"))
        data = gzip.compress(data, 1, mtime=0) if name.endswith(".gz") else data
    elif name.endswith(".json"):
        data = mutate.json_bytes(rng, json.loads(data), ({"text": "a"}, ["a"]))
    elif name.endswith((".csv", ".tsv")):
        data = _spoil_table(rng, data)
    if rng.random() < 0.4:
        data = mutate.spoil(rng, data)
    if name.endswith(".gz") and rng.random() < 0.2:
        data = gzip.compress(mutate.spoil(rng, gzip.decompress(seeds.bytes(name))), 1, mtime=0)
    if rng.random() < 0.05:
        ending = rng.choice(
            (".txt", ".jsonl", ".parquet", ".csv", ".gz", ".pdf", "", ".JSONL", ".zst", ".zip", ".jsonl.gz")
        )
        name = f"in/texts/other{ending}"
    where = f"file:../{name}"
    if rng.random() < 0.15:
        where += "#" + rng.choice(("text", "n", "nothing", "", "text#text", mutate.string(rng)))
    files: dict[str, Content] = {name: data if rng.random() < 0.97 else no_file(rng)}
    argv = decompose(rng, text=True)
    argv[argv.index("--text") + 1] = where
    if rng.random() < 0.03:
        argv = ["eval", *EVAL, *PLACE, *WS]
        argv[argv.index("--tasks") + 1] = where
    return Case(argv, files)


def _spoil_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        at = rng.randrange(len(lines))
        valid = json.loads(lines[at]) if lines[at].startswith(b"{") else {"text": "x"}
        new = rng.choice(
            (
                lambda valid: mutate.json_bytes(rng, valid, ("a", ["a"], {"text": "a"})),
                lambda valid: json.dumps({"text": mutate.string(rng)}).encode(),
                lambda valid: json.dumps({"content": "no such field"}).encode(),
                lambda valid: rng.choice((b"", b" ", b"\x00", b"null", b"[]", b'"text"', b"{}", b"\xff", b"1" * 5000)),
            )
        )(valid)
        lines[at] = new
    if rng.random() < 0.1:
        lines = lines[:1] * rng.choice((0, 1, 3))
    return b"\n".join(lines)


def _spoil_table(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    new = (
        b'"open',
        b"a,b,c,d,e",
        b"",
        b",,,,",
        b'"a""b',
        b"\x00,1",
        b"x" * 200_000 + b",1",
        b'"' + b"y" * 140_000 + b'",1',
        b"text,text",
        b";;",
    )
    lines[at] = rng.choice(new)
    return b"\n".join(lines)


@target("data-dir", 2)
def _data_dir(rng: random.Random, seeds: Seeds) -> Case:
    """Texts by their names, from a folder that ARA_DATA_DIR names."""
    kind, where = rng.choice((("wikitext2", "wikitext2_raw/train_first_1MB.jsonl"), ("c4", "c4_sample/c4_rp1.jsonl")))
    argv = decompose(rng, text=True)
    argv[argv.index("--text") + 1] = kind
    files: dict[str, Content] = {f"in/data/{where}": _spoil_lines(rng, seeds.bytes("in/texts/story.jsonl"))}
    if rng.random() < 0.1:
        files[f"in/data/{where}"] = no_file(rng)
    return Case(argv, files, {"ARA_DATA_DIR": rng.choice(("../in/data", "{root}/in/data", "../in/data", "~"))})


@target("conversations", 2)
def _conversations(rng: random.Random, seeds: Seeds) -> Case:
    """Conversations, alone or in a mixture, and what a mixture may be called."""
    lines = seeds.bytes("in/texts/story.jsonl").split(b"\n")
    texts = [json.loads(line)["text"] for line in lines if line]
    spoken = [
        [{"role": "user", "content": one}, {"role": "assistant", "content": other}]
        for one, other in zip(texts[::2], texts[1::2], strict=True)
    ]
    data = "\n".join(json.dumps({"messages": messages}) for messages in spoken).encode()
    name = rng.choice(("in/texts/spoken.jsonl", "in/texts/spoken.jsonl", "in/texts/spoken, a:0.5.jsonl"))
    where = rng.choice((f"chat:../{name}", f"chat:../{name}:0.5,{STORY_TEXT}:0.5", f"chat:../{name},{STORY_TEXT}"))
    if rng.random() < 0.3:
        share = rng.choice(("0", "2", "-1", "nan", "1e-9", "", "x", "0.5:0.5", mutate.string(rng)))
        where = rng.choice((f"{where}:{share}", f"{where},", f"{where},{mutate.string(rng)}", f"chat:{share}"))
    argv = decompose(rng, text=True)
    argv[argv.index("--text") + 1] = where
    files: dict[str, Content] = {name: _spoil_lines(rng, data) if rng.random() < 0.97 else no_file(rng)}
    return Case(argv, files)


@target("prompt", 3)
def _prompt(rng: random.Random, seeds: Seeds) -> Case:
    argv = rng.choice((generate(rng), generate_onnx()))
    text = rng.choice(
        (mutate.string(rng), mutate.string(rng) * rng.choice((1, 20, 300)), "word " * rng.choice((10, 60, 5000)))
    )
    if rng.random() < 0.5 and not text.startswith("-"):
        argv[1] = text[:60_000]
        return Case(argv)
    argv[1] = "-"
    return Case(argv, stdin=text.encode("utf-8", "replace").decode())


@target("template", 3)
def _template(rng: random.Random, seeds: Seeds) -> Case:
    text = rng.choice(TEMPLATES)
    if rng.random() < 0.3:
        text = rng.choice((text + rng.choice(TEMPLATES), mutate.string(rng) + text, text[: rng.randint(0, len(text))]))
    chat = rng.random() < 0.95
    folder, argv = rng.choice((("in/checkpoint", generate(rng, chat)), ("in/export", generate_onnx(chat))))
    argv[1] = rng.choice(("hello", mutate.string(rng)))
    if argv[1].startswith("-"):
        argv[1] = "hello"
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.8:
        data = mutate.spoil(rng, data) if rng.random() < 0.1 else data
        return Case(argv, {f"{folder}/chat_template.jinja": data})
    config = seeds.json(f"{folder}/tokenizer_config.json")
    config["chat_template"] = rng.choice((text, [{"name": "default", "template": text}], {"default": text}, [text], 7))
    return Case(
        argv, {f"{folder}/chat_template.jinja": Gone(), f"{folder}/tokenizer_config.json": json.dumps(config).encode()}
    )
