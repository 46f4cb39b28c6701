"""Whatever is wrong gets one line with a hint and exit code 1 or 2, and leaves nothing behind."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from ara.evaluation import tasks
from ara.layouts.modeling_ara import AraQuantizer
from ara.stages import measure
from ara.workspace.store import Workspace
from tests.commands import ara, refused
from tests.damage import contents, flip, listing
from tests.tiny import save_tiny, tiny_config, tiny_model, tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
NAME = "energy-0.70"
FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.fixture
def root(tmp_path):
    """A workspace that is not there, and must not be afterwards."""
    yield tmp_path / "new"
    assert not (tmp_path / "new").exists()


@pytest.fixture
def unchanged(copied):
    """A finished workspace that must stay as it is."""
    before = contents(copied)
    yield copied
    now = contents(copied)
    now.pop(".lock-owner.json", None)
    assert now == before
    assert not [path for path in copied.rglob("*") if path.name.endswith((".partial", ".old"))]


def decompose(model, text, root, *more):
    words = ["--samples", 8, "--seq-len", 40, "--device", "cpu", "--dtype", "float32", "-q"]
    return ara("decompose", model, "--text", text, "-w", root, *words, *more)


def save_broken(path, change):
    """Save a tiny llama after ``change(model)``."""
    model = tiny_model("llama")
    with torch.no_grad():
        change(model)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


# -- models ---------------------------------------------------------------------------------------------------------


def test_unknown_alias_shows_near_ones(root, tiny_text):
    refused(decompose("qwen3-0.7b", tiny_text, root), 1, "qwen3-0.7b", "qwen3-0.6b")


def test_missing_folder(root, tiny_text, tmp_path):
    refused(decompose(tmp_path / "nowhere", tiny_text, root), 1, "does not exist")


def test_unreachable_hub_says_what_to_do(root, tiny_text):
    result = subprocess.run(
        [sys.executable, "-m", "ara_cli", "decompose", "nobody/nothing", "--text", tiny_text, "-w", str(root), "-q"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root.parent / "hf")},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 2, result.stderr
    assert lines[0].startswith("error: ")
    assert "nobody/nothing" in lines[0]
    assert lines[1].startswith("hint: ")
    assert "HF_HUB_OFFLINE" in result.stderr or "offline" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
        ("vit", "causal"),
        ("bert", "encoder"),
    ],
)
def test_model_that_is_no_decoder(root, tiny_text, tmp_path, kind, word):
    config = AutoConfig.for_model(kind)
    config.save_pretrained(tmp_path / kind)
    message = refused(decompose(tmp_path / kind, tiny_text, root), 1, word, "decoder-only")
    assert kind in message


def test_model_without_linear_layer(root, tiny_text, tmp_path):
    config = tiny_config("llama")
    config.num_hidden_layers = 0
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "flat")
    tiny_tokenizer().save_pretrained(tmp_path / "flat")
    refused(decompose(tmp_path / "flat", tiny_text, root), 1, "no linear layer in its 0 blocks", "nn.Linear")


def test_a_checkpoint_that_does_not_load_is_not_handed_out(unchanged, monkeypatch):
    """Some families have code of their own that trips over the layers: it must be seen when they are written."""

    def fail(*arguments, **options):
        raise AttributeError("'NoneType' object has no attribute 'shape'")

    monkeypatch.setattr(AraQuantizer, "_process_model_after_weight_loading", fail)
    message = refused(ara("truncate", "--name", "x", "-w", unchanged, "-q"), 1, "has no attribute 'shape'")
    assert "does not load" in message and "--densify" in message


def test_compressed_checkpoint_is_not_compressed_again(root, tiny_text, finished):
    folder = finished / "truncate" / NAME / "checkpoint"
    refused(decompose(folder, tiny_text, root), 1, "already compressed by ARA")


@pytest.mark.parametrize("method", ["two-sided", "whitened", "plain", "asvd"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weight_is_named(root, tiny_text, tmp_path, method, value):
    """Also by the method that stores block 0 before it comes to the broken one."""

    def change(model):
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value

    model = save_broken(tmp_path / "broken", change)
    result = decompose(model, tiny_text, root, "-m", method, "--moment-memory", 1e-6)
    refused(result, 1, "model.layers.1.mlp.up_proj: the weight holds 1 values that are NaN or infinite")


def test_broken_embedding_shows_in_the_inputs(root, tiny_text, tmp_path):
    model = save_broken(tmp_path / "broken", lambda model: model.model.embed_tokens.weight.fill_(float("nan")))
    refused(decompose(model, tiny_text, root), 1, "inputs of model.layers.0.self_attn.q_proj hold NaN or infinity")


def test_activations_that_overflow_name_the_layer(root, tiny_text, tmp_path):
    """Weights are finite and the first block is stored before the second one overflows."""

    def change(model):
        model.model.layers[0].mlp.up_proj.weight.mul_(1e10)
        model.model.layers[0].mlp.down_proj.weight.mul_(1e35)

    model = save_broken(tmp_path / "broken", change)
    result = decompose(model, tiny_text, root, "--moment-memory", 1e-6)
    message = refused(result, 1, "NaN or infinity", "--dtype float32")
    assert "the outputs of model.layers.0.mlp.down_proj hold" in message
    result = decompose(model, tiny_text, root, "--moment-memory", 1e-6, "--method", "whitened")
    assert "inputs of model.layers.1." in refused(result, 1, "NaN or infinity", "--dtype float32")


def test_model_that_changed_since(unchanged, tmp_path):
    index = json.loads((unchanged / "workspace.json").read_text())
    location = Path(index["model"]["location"])
    aside = location.with_name("aside")
    location.rename(aside)
    try:
        refused(ara("truncate", "--name", "x", "-w", unchanged, "-q"), 1, "does not exist")
        save_tiny(location, "llama", seed=9)
        refused(
            ara("truncate", "--name", "x", "-w", unchanged, "-q"), 1, "has changed since decompose/two-sided was made"
        )
    finally:
        shutil.rmtree(location, ignore_errors=True)
        aside.rename(location)


# -- budgets and settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["0", "1.5", "-1", "nan", "inf", "-0.0"])
def test_keep_outside_its_range(unchanged, tiny_llama, root, keep):
    refused(
        ara("allocate", "--keep", keep, "-w", unchanged, "-q"), 2, "--keep must be in (0, 1]", f"got {float(keep):g}"
    )
    refused(ara("run", tiny_llama, "--keep", "0.8", "--keep", keep, "-w", root, "-q"), 2, "--keep must be in (0, 1]")


@pytest.mark.parametrize("remove", ["1", "-0.1", "nan", "20"])
def test_remove_outside_its_range(unchanged, tiny_llama, root, remove):
    refused(ara("allocate", "--remove", remove, "-w", unchanged, "-q"), 2, "--remove must be in [0, 1)")
    refused(ara("run", tiny_llama, "--remove", remove, "-w", root, "-q"), 2, "--remove must be in [0, 1)")


def test_keep_and_remove_together(unchanged, tiny_llama, root):
    words = ("--keep", "0.8", "--remove", "0.2", "-q")
    refused(ara("allocate", *words, "-w", unchanged), 2, "both given", "--keep 0.8 is --remove 0.2")
    refused(ara("run", tiny_llama, *words, "-w", root), 2, "both given")


def test_keep_that_is_no_number(unchanged):
    result = ara("allocate", "--keep", "most", "-w", unchanged)
    assert result.exit_code == 2
    assert "Invalid value for '--keep'" in result.stderr
    assert "Traceback" not in result.output


def test_keep_below_the_least_ranks_says_what_would_do(unchanged):
    refused(ara("allocate", "--keep", "0.01", "-w", unchanged, "-q"), 2, "keep 0.01 allows 900", "use --keep 0.0")


def test_all_wrong_settings_are_shown_together(root, tiny_llama):
    result = ara("decompose", tiny_llama, "--samples", 0, "--seq-len", 1, "--seed", -1, "--dtype", "int3", "-w", root)
    assert result.exit_code == 2
    for field in ("samples", "seq-len", "seed", "dtype"):
        assert f"  - {field}: " in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "twosided"], "did you mean two-sided"),
        (["-O", "alpha"], "expected NAME=VALUE"),
        (["-O", "alpha=1"], "alpha"),
        (["-m", "asvd", "-O", "alpha=9"], "alpha"),
        (["--device", "gpu"], "unknown device 'gpu'"),
        (["--exclude", "*.nothing"], "matches no linear layer"),
        (["--name", "../outside"], "cannot be the name of a result"),
        (["--revision", "main"], "not on the hub"),
        (["--seq-len", "257"], "--seq-len 257 is more than the 256 positions of the model"),
    ],
)
def test_wrong_option_of_decompose(root, tiny_llama, tiny_text, words, expected):
    result = decompose(tiny_llama, tiny_text, root, *words)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.count("error: ") == 1
    assert expected in result.stderr
    assert not (root.parent / "outside").exists()


def test_windows_longer_than_learned_positions(root, tiny_text, tmp_path):
    model = save_tiny(tmp_path / "gpt2", "gpt2")
    refused(decompose(model, tiny_text, root, "--seq-len", 300), 2, "300 is more than the 256 positions")


@pytest.mark.parametrize("size", ["banana", "5", "-5GB", "5 giga", "0x5GB"])
def test_shard_size_that_is_none(unchanged, size):
    result = ara("truncate", "--max-shard-size", size, "--name", "x", "-w", unchanged, "-q")
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "max-shard-size" in result.stderr


def test_ranks_file_that_is_none(unchanged, tmp_path):
    words = ("allocate", "-w", unchanged, "-q", "--ranks")
    refused(ara(*words, tmp_path / "none.json"), 1, "none.json cannot be read")
    (tmp_path / "bad.json").write_text("{")
    refused(ara(*words, tmp_path / "bad.json"), 1, "bad.json is not JSON")
    (tmp_path / "new.json").write_text('{"format_version": 5, "ranks": {}}')
    refused(ara(*words, tmp_path / "new.json"), 1, "format_version 5, expected 1 to 4")


# -- texts ----------------------------------------------------------------------------------------------------------


def test_few_tokens_are_warned_about_with_numbers(tmp_path, tiny_llama, tiny_text):
    result = decompose(tiny_llama, tiny_text, tmp_path / "ws", "--samples", 2)
    assert result.exit_code == 0
    expected = "warning: 80 calibration tokens are few for inputs 92 wide: 0.9 per dimension, 8 or more are advisable"
    assert expected in result.stderr
    assert "(--samples 19)" in result.stderr
    advised = decompose(tiny_llama, tiny_text, tmp_path / "advised", "--samples", 19)
    assert advised.exit_code == 0
    assert "are few for inputs" not in advised.stderr


def test_replacing_a_result_made_from_other_settings_is_said(tmp_path, tiny_llama, tiny_text):
    assert decompose(tiny_llama, tiny_text, tmp_path / "ws", "--samples", 19).exit_code == 0
    other = decompose(tiny_llama, tiny_text, tmp_path / "ws", "--samples", 20)
    assert "warning: replacing decompose/two-sided, which was made with other settings (samples)" in other.stderr
    assert "--name keeps both" in other.stderr
    faster = decompose(tiny_llama, tiny_text, tmp_path / "ws", "--samples", 20, "--moment-memory", 0.01)
    assert faster.exit_code == 0 and "replacing" not in faster.stderr


def test_text_with_too_few_windows_is_warned_about(tmp_path, tiny_llama):
    (tmp_path / "short.txt").write_text("a" * 100)
    result = decompose(tiny_llama, f"file:{tmp_path / 'short.txt'}", tmp_path / "ws")
    assert result.exit_code == 0
    assert "warning: the text has only 2 of the 8 requested windows of 40 tokens" in result.stderr


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("none.txt", None, "does not exist"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n ", "is empty"),
        ("short.txt", b"short", "one window needs 40"),
        ("latin.txt", b"caf\xe9\n", "line 1: not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("empty.jsonl", b"", "is empty"),
    ],
)
def test_text_that_cannot_be_used(root, tiny_llama, tmp_path, name, data, word):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    refused(decompose(tiny_llama, f"file:{tmp_path / name}", root), 1, word, name)


def test_unknown_text_and_task(root, unchanged, tiny_llama, monkeypatch):
    refused(decompose(tiny_llama, "wikitext", root), 2, "did you mean wikitext2", "file:PATH")
    monkeypatch.setattr(tasks, "_manager", lambda folder: SimpleNamespace(all_tasks=["boolq"]))
    refused(ara("eval", "--tasks", "wikitex2", "-w", unchanged, "-q"), 1, "did you mean wikitext2")
    refused(ara("eval", "--tasks", " , ", "-w", unchanged, "-q"), 2, "names no task")


def test_task_that_cannot_be_used(unchanged, tmp_path):
    refused(ara("eval", "--tasks", f"file:{tmp_path}/none.txt", "-w", unchanged, "-q"), 1, "none.txt does not exist")
    (tmp_path / "short.txt").write_text("short")
    refused(ara("eval", "--tasks", f"file:{tmp_path}/short.txt", "-w", unchanged, "-q"), 1, "one window needs 256")
    refused(ara("eval", "--seq-len", 999, "-w", unchanged, "-q"), 2, "999 is more than the 256 positions")


def test_data_folder_without_the_text(root, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("ARA_DATA_DIR", str(tmp_path))
    refused(decompose(tiny_llama, "c4", root), 1, str(tmp_path), "python-docs")


# -- workspaces -----------------------------------------------------------------------------------------------------


def test_no_workspace(tmp_path):
    for command in ("allocate", "truncate", "eval", "status"):
        refused(ara(command, "-w", tmp_path / "none", "-q"), 1, "there is no workspace at", "ara decompose MODEL")
    assert listing(tmp_path) == set()


def test_folder_of_something_else(tmp_path, tiny_llama, tiny_text):
    (tmp_path / "photo.jpg").write_text("x")
    refused(decompose(tiny_llama, tiny_text, tmp_path), 1, "is not an ara workspace")
    assert listing(tmp_path) == {"photo.jpg"}


def test_stage_that_is_missing(tmp_path, tiny_llama, tiny_text):
    decompose(tiny_llama, tiny_text, tmp_path / "ws")
    refused(ara("truncate", "-w", tmp_path / "ws", "-q"), 1, "no result of ara allocate yet", "run ara allocate first")
    refused(ara("eval", "-w", tmp_path / "ws", "-q"), 1, "no result of ara truncate yet")
    refused(ara("allocate", "--factors", "two-side", "-w", tmp_path / "ws", "-q"), 1, "did you mean two-sided")


def test_workspace_of_another_model(unchanged, tiny_text, tmp_path):
    other = save_tiny(tmp_path / "other", "qwen3")
    refused(decompose(other, tiny_text, unchanged), 1, "belongs to", "use one workspace per model")


def test_workspace_of_a_newer_format(unchanged, tiny_llama, tiny_text):
    index = unchanged / "workspace.json"
    clean = index.read_text()
    index.write_text(json.dumps({"format_version": 2}))
    for result in (ara("status", "-w", unchanged, "-q"), decompose(tiny_llama, tiny_text, unchanged)):
        refused(result, 1, "has format 2; this ara reads formats up to 1", "update")
    index.write_text(clean)
    manifest = unchanged / "decompose" / "two-sided" / "manifest.json"
    clean = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(clean), "format_version": 2}))
    refused(ara("allocate", "-w", unchanged, "-q"), 1, "manifest.json has format 2", "update")
    manifest.write_text(clean)


@pytest.mark.parametrize(
    ("stage", "command"),
    [("decompose", "allocate"), ("decompose", "truncate"), ("decompose", "eval"), ("truncate", "eval")],
)
def test_one_flipped_byte_in_any_tensor_file_is_named(unchanged, stage, command):
    manifest = json.loads(next((unchanged / stage).glob("*/manifest.json")).read_text())
    files = [path for path in sorted((unchanged / stage).rglob("*.safetensors"))]
    assert len(files) == {"decompose": 6, "truncate": 1}[stage]
    for path in files:
        clean = path.read_bytes()
        header = int.from_bytes(clean[:8], "little")
        table = json.loads(clean[8 : 8 + header])
        last = max((name for name in table if name != "__metadata__"), key=lambda name: table[name]["data_offsets"][1])
        for position, words in ((0, ["header"]), (12, []), (8 + header, []), (-1, [f"damaged tensors: {last}"])):
            flip(path, position)
            refused(ara(command, "-w", unchanged, "-q"), 1, str(path), f"ara {stage} --force", *words)
            path.write_bytes(clean)
        assert last in manifest["tensors"]


@pytest.mark.parametrize("key", ["decompose/two-sided", f"allocate/{NAME}", f"truncate/{NAME}"])
def test_edited_manifest_and_other_files_are_named(copied, key):
    command = {"decompose": "allocate", "allocate": "truncate", "truncate": "eval"}[key.partition("/")[0]]
    folder = copied / key
    for name in ("manifest.json", *(("ranks.json",) if "allocate" in key else ())):
        clean = (folder / name).read_text()
        (folder / name).write_text(clean.replace("0.", "1.", 1))
        refused(ara(command, "-w", copied, "-q"), 1, name)
        (folder / name).write_text(clean)
    assert ara("status", "-w", copied, "-q").exit_code == 0


def test_missing_and_cut_tensor_files_are_named(unchanged):
    path = unchanged / "decompose" / "two-sided" / "layer-001.safetensors"
    clean = path.read_bytes()
    path.write_bytes(clean[:-1])
    refused(ara("allocate", "-w", unchanged, "-q"), 1, "layer-001.safetensors has ")
    path.unlink()
    refused(ara("allocate", "-w", unchanged, "-q"), 1, "layer-001.safetensors is missing")
    path.write_bytes(clean)


def test_locked_workspace(unchanged, tiny_llama, tiny_text):
    with Workspace.open(unchanged).lock("ara decompose demo"):
        results = [ara(command, "-w", unchanged, "-q") for command in ("allocate", "truncate", "eval")]
        results.append(decompose(tiny_llama, tiny_text, unchanged))
        assert ara("status", "-w", unchanged, "-q").exit_code == 0  # reading is allowed
    for result in results:
        refused(result, 1, f"is being written by process {os.getpid()} (ara decompose demo", "wait for it to end")


# -- disks ----------------------------------------------------------------------------------------------------------


def test_disk_without_room_is_told_before_the_work(root, tiny_llama, tiny_text, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**20, 2**20, 2**10))
    refused(decompose(tiny_llama, tiny_text, root), 1, "the factors need 1 MiB", "0 MiB free", "free some space")


def full(*args, **kwargs):
    raise FULL


def test_disk_that_fills_up_in_decompose(root, tiny_llama, tiny_text, monkeypatch):
    monkeypatch.setattr("safetensors.torch.save_file", full)
    refused(decompose(tiny_llama, tiny_text, root), 1, "the disk is full: writing", "then run the same command again")


def test_disk_that_fills_up_after_a_block_keeps_the_block(tmp_path, tiny_llama, tiny_text, monkeypatch):
    import safetensors.torch

    original, calls = safetensors.torch.save_file, []

    def later(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) > 3:
            raise FULL
        original(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", later)
        refused(decompose(tiny_llama, tiny_text, tmp_path / "ws"), 1, "the disk is full")
    (partial,) = (tmp_path / "ws" / "decompose").iterdir()
    # The moments of a block are written before its factors.
    assert {path.name for path in partial.iterdir()} == {
        ".journal.json",
        "layer-000.safetensors",
        "moments-000.safetensors",
        "moments-001.safetensors",
    }
    assert decompose(tiny_llama, tiny_text, tmp_path / "ws").exit_code == 0


def test_disk_that_fills_up_in_truncate_and_allocate(unchanged, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("ara.models.shards.save_file", full)
        refused(ara("truncate", "--name", "x", "-w", unchanged, "-q"), 1, "the disk is full")
    write = Path.write_text

    def no_room(path, *args, **kwargs):
        if path.name == "ranks.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", no_room)
    refused(ara("allocate", "--keep", "0.5", "--method", "energy", "-w", unchanged, "-q"), 1, "the disk is full")


def test_disk_that_fills_up_in_eval_keeps_what_is_measured(copied, tiny_text, monkeypatch):
    words = ("--tasks", tiny_text, "--seq-len", 64, "--max-windows", 1, "--device", "cpu", "--dtype", "float32")
    write = Path.write_text

    def no_room(path, *args, **kwargs):
        if path.name == "results.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *args, **kwargs)

    before = contents(copied)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", no_room)
        refused(ara("eval", *words, "-w", copied, "-q", "--name", "full"), 1, "the disk is full")
    assert {name: sha for name, sha in contents(copied).items() if name in before} == before
    monkeypatch.setattr(measure, "interleaved_perplexity", None)  # not measured again
    assert ara("eval", *words, "-w", copied, "-q", "--name", "full").exit_code == 0


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a real file system of so many bytes; needs root on Linux."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        if sys.platform != "linux" or os.geteuid() != 0:
            pytest.skip("a small file system can be mounted by root on Linux only")
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if result.returncode:
            pytest.skip(f"no file system can be mounted here: {result.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_full_disk_for_real(small_disk, finished, tiny_llama, tiny_text, monkeypatch):
    disk = small_disk(300 << 10)
    refused(decompose(tiny_llama, tiny_text, disk / "ws"), 1, "the factors need 1 MiB", "free some space")
    assert listing(disk) == set()
    # As if others filled the disk after that look at it: the first block fits, the second does not.
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 2**40))
        refused(decompose(tiny_llama, tiny_text, disk / "ws"), 1, "the disk is full")
    assert {path.split("/")[0] for path in listing(disk / "ws" / "decompose")} <= {".two-sided.partial"}
    used = sum(path.stat().st_blocks * 512 for path in finished.rglob("*") if path.is_file())
    disk = small_disk((used + 4095) // 4096 * 4096 + (120 << 10))
    root = Path(shutil.copytree(finished, disk / "ws"))
    before = contents(root)
    refused(ara("truncate", "--name", "x", "-w", root, "-q"), 1, "the disk is full")
    assert contents(root) == before
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    refused(ara("allocate", "--keep", "0.5", "-w", root, "-q"), 1, "the disk is full")
    assert contents(root) == before
