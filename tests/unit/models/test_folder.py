"""The index of a model in several files: followed inside its folder only, and read by one function everywhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ara.errors import ModelError
from ara.models.folder import INDEX, read_index
from ara.models.sources import resolve
from export.onnx.stored_weights import Checkpoint
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "model"
    tiny_model("llama").save_pretrained(folder, max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def test_shards_are_one_model(shards: Path) -> None:
    expected = tiny_model("llama").state_dict()
    loaded = resolve(str(shards)).load_model(torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert set(read_index(shards / INDEX, "")) == set(expected)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("../../x.safetensors", r"names the file '\.\./\.\./x\.safetensors', which is not in its folder"),
        ("/etc/passwd", "which is not in its folder"),
        ("a/b.safetensors", "which is not in its folder"),
        ("a\\b.safetensors", "which is not in its folder"),
        ("..", "which is not in its folder|is not a safetensors file"),
        ("", "which is not a safetensors file"),
        ("x.safetensors\0", "which is not in its folder"),
        ("pytorch_model.bin", "which is not a safetensors file"),
        ("missing.safetensors", r"lacks 1 of \d+ weight files: missing\.safetensors"),
        (7, "names 7 as the file of .*, expected a string"),
        (None, "names None as the file of"),
        (["x.safetensors"], "expected a string"),
    ],
)
def test_a_file_that_must_not_be_read(value: Any, words: str, copy: Path, tmp_path: Path) -> None:
    (tmp_path.parent / "x.safetensors").write_bytes(b"")
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = value
    (copy / INDEX).write_text(json.dumps(index))
    for read in (lambda: resolve(str(copy)), lambda: Checkpoint(copy)):
        _refused(read, words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "expected an object"),
        ("[" * 100_000, "more than 64 levels"),
        ("{}", 'it has no "weight_map"'),
        ('{"weight_map": {}}', 'it has no "weight_map"'),
        ('{"weight_map": ["a"]}', 'it has no "weight_map"'),
    ],
)
def test_what_is_no_index(content: str, words: str, copy: Path) -> None:
    (copy / INDEX).write_text(content)
    for read in (lambda: resolve(str(copy)), lambda: Checkpoint(copy)):
        _refused(read, words)


def test_an_index_that_transformers_cannot_read(copy: Path) -> None:
    index = json.loads((copy / INDEX).read_text())
    for metadata in ({}, {"metadata": [1]}):
        (copy / INDEX).write_text(json.dumps({"weight_map": index["weight_map"], **metadata}))
        _refused(lambda: resolve(str(copy)), 'has no "metadata"')


def test_a_pipe_and_a_damaged_shard(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:50])
    _refused(lambda: resolve(str(copy)), rf"{shard.name} is damaged")
    (copy / INDEX).unlink()
    os.mkfifo(copy / INDEX)
    for read in (lambda: resolve(str(copy)), lambda: Checkpoint(copy)):
        _refused(read, "it is a pipe, expected a regular file")


def _refused(read: Callable[[], object], words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        read()
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.hint
