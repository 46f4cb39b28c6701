"""Folders of models, GGUF files, checkpoints and exports that somebody else has written."""

from __future__ import annotations

import random

from tests.fuzz import binary, mutate
from tests.fuzz.calls import EXPORTED, decompose, export_source, generate, generate_onnx, no_file
from tests.fuzz.harness import Case
from tests.fuzz.registry import target
from tests.fuzz.sandbox import Content, Gone
from tests.fuzz.words import CONFIG_WORDS, TOKENIZER_WORDS
from tests.fuzz.workspaces import Seeds


@target("config", 14)
def _config(rng: random.Random, seeds: Seeds) -> Case:
    folder = rng.choice(("model", "model", "sharded"))
    name = f"in/{folder}/config.json"
    return Case(decompose(rng, f"../in/{folder}"), {name: mutate.json_bytes(rng, seeds.json(name), CONFIG_WORDS)})


@target("generation-config", 4)
def _generation_config(rng: random.Random, seeds: Seeds) -> Case:
    if rng.random() < 0.5:
        name, argv = "in/model/generation_config.json", decompose(rng, text=False)
    else:
        name, argv = "in/checkpoint/generation_config.json", generate(rng)
    valid = {**seeds.json(name), "max_new_tokens": 4, "temperature": 1.0, "do_sample": False}
    return Case(argv, {name: mutate.json_bytes(rng, valid, (1, [1, 2], "cuda"))})


@target("tokenizer", 12)
def _tokenizer(rng: random.Random, seeds: Seeds) -> Case:
    choices = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json")
    return _tokenizer_case(rng, seeds, rng.choice(choices))


@target("tokenizer-extras", 3)
def _tokenizer_extras(rng: random.Random, seeds: Seeds) -> Case:
    """Files that a tokenizer may have: older transformers wrote them."""
    valid = {
        "special_tokens_map.json": {
            "bos_token": "<bos>",
            "eos_token": {"content": "<eos>", "lstrip": False},
            "pad_token": "<pad>",
        },
        "added_tokens.json": {"<extra>": 260, "<other>": 261},
        "vocab.json": {"a": 0, "b": 1, "ab": 2},
        "preprocessor_config.json": {"do_resize": True},
    }
    name = rng.choice(list(valid))
    files: dict[str, Content] = {f"in/model/{name}": mutate.json_bytes(rng, valid[name])}
    if rng.random() < 0.3:
        files["in/model/merges.txt"] = mutate.spoil(rng, b"#version: 0.2\na b\n")
    if rng.random() < 0.3:
        files["in/model/tokenizer.json"] = Gone()
    return Case(decompose(rng, text=True), files)


def _tokenizer_case(rng: random.Random, seeds: Seeds, file: str) -> Case:
    if rng.random() < 0.7:
        folder, argv = "in/model", decompose(rng, text=True)
    else:
        folder, argv = "in/checkpoint", generate(rng)
    name = f"{folder}/{file}"
    return Case(argv, {name: mutate.json_bytes(rng, seeds.json(name), TOKENIZER_WORDS)})


@target("weights", 8)
def _weights(rng: random.Random, seeds: Seeds) -> Case:
    names = ["in/model/model.safetensors", *seeds.names("in/sharded", "*.safetensors")]
    name = rng.choice((names[0], rng.choice(names)))
    folder = name.split("/")[1]
    return Case(decompose(rng, f"../in/{folder}", text=False), {name: binary.spoil_safetensors(rng, seeds.bytes(name))})


@target("index", 6)
def _index(rng: random.Random, seeds: Seeds) -> Case:
    name = "in/sharded/model.safetensors.index.json"
    words = (
        "model-00001-of-00002.safetensors",
        "config.json",
        "../model/model.safetensors",
        ".",
        "model.bin",
        "a" * 300,
    )
    files: dict[str, Content] = {name: mutate.json_bytes(rng, seeds.json(name), words)}
    if rng.random() < 0.1:
        files[rng.choice(seeds.names("in/sharded", "*.safetensors"))] = Gone()
    return Case(decompose(rng, "../in/sharded", text=False), files)


@target("gguf", 10)
def _gguf(rng: random.Random, seeds: Seeds) -> Case:
    raw = binary.spoil_gguf(rng, seeds.bytes("in/tiny.gguf"))
    return Case(decompose(rng, "../in/tiny.gguf", text=rng.random() < 0.15), {"in/tiny.gguf": raw})


@target("folder", 4)
def _folder(rng: random.Random, seeds: Seeds) -> Case:
    """Files that are missing, or are no files."""
    folder = rng.choice(("model", "sharded", "checkpoint", "export"))
    files: dict[str, Content] = {}
    for name in rng.sample(seeds.names(f"in/{folder}"), rng.choice((1, 1, 2, 3))):
        files[name] = no_file(rng)
    if folder == "checkpoint":
        return Case(rng.choice((generate(rng), export_source())), files, outputs=EXPORTED)
    if folder == "export":
        return Case(generate_onnx(), files)
    if rng.random() < 0.3:
        files |= {
            f"in/{folder}/{rng.choice(('pytorch_model.bin', 'x.gguf', 'modeling_x.py', 'params.json'))}": rng.randbytes(
                9
            )
        }
    return Case(decompose(rng, f"../in/{folder}", text=True), files)


@target("checkpoint", 10)
def _checkpoint(rng: random.Random, seeds: Seeds) -> Case:
    if rng.random() < 0.7:
        name = "in/checkpoint/config.json"
        valid = seeds.json(name)
        if rng.random() < 0.6:  # the part that is ours
            valid["quantization_config"] = mutate.document(
                rng, valid["quantization_config"], ("factors", "pivoted", "ara", 1, 2, 24)
            )
            data = mutate.dumps(valid).encode()
        else:
            data = mutate.json_bytes(rng, valid, CONFIG_WORDS)
    else:
        name = "in/checkpoint/model.safetensors"
        data = binary.spoil_safetensors(rng, seeds.bytes(name))
    return Case(generate(rng) if rng.random() < 0.7 else export_source(), {name: data}, outputs=EXPORTED)


@target("export", 6)
def _export(rng: random.Random, seeds: Seeds) -> Case:
    name = rng.choice(
        ("ara_export.json", "ara_export.json", "ara_export.json", "model.onnx", "model.onnx.data", "genai_config.json")
    )
    name = f"in/export/{name}"
    if name.endswith(".json"):
        words = ("fp32", "fp16", "int8", "int4", "cpu", "cuda", [0, 1], 128)
        return Case(generate_onnx(), {name: mutate.json_bytes(rng, seeds.json(name), words)})
    return Case(generate_onnx(), {name: mutate.spoil(rng, seeds.bytes(name))})


@target("rewrite", 2)
def _rewrite(rng: random.Random, seeds: Seeds) -> Case:
    files: dict[str, Content] = {"in/dense.onnx": mutate.spoil(rng, seeds.bytes("in/export/model.onnx"))}
    if rng.random() < 0.5:
        files["in/model.onnx.data"] = seeds.bytes("in/export/model.onnx.data")
    return Case([*export_source(), "--rewrite", "../in/dense.onnx"], files, outputs=EXPORTED)
