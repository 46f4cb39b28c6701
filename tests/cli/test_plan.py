"""``ara plan`` on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ara, done, refused

QUICK = ("--no-probe", "--seq-len", 48, "--device", "cpu", "--dtype", "float32")


def test_tables_name_parameters_stages_and_the_least_machine(tiny_llama: Path, tmp_path: Path) -> None:
    result = done("plan", tiny_llama, *QUICK, "-w", tmp_path / "ws")
    for words in ("LlamaForCausalLM", "21 layers", "factorised layers", "checkpoint at keep 0.8", "least machine"):
        assert words in result.stdout
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert {"decompose", "train-masks", "allocate", "truncate", "recover", "eval", "export"} <= set(rows)
    assert "fits" in rows["decompose"] and rows["decompose"].rstrip().endswith("–")
    assert not (tmp_path / "ws").exists()


def test_json_is_the_plan(tiny_llama: Path, tmp_path: Path) -> None:
    words = ("plan", tiny_llama, *QUICK, "-w", tmp_path, "--json")
    found, less = (json.loads(done(*words, "--remove", share).stdout) for share in (0.2, 0.5))
    assert found["keep"] == 0.8 and less["keep"] == 0.5
    assert found["parameters"] == less["parameters"] and found["checkpoint_bytes"] > less["checkpoint_bytes"]
    assert found["stages"][0]["stage"] == "decompose"
    assert found["speed"] is None and {stage["seconds"] for stage in found["stages"]} == {None}


def test_a_folder_without_weights_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    result = done("plan", tmp_path, *QUICK)
    assert "the folder has none" in result.stdout
    refused(ara("decompose", tmp_path, "-q"), 1, "has a config.json but no weights")


def test_the_probe_gives_times(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ara.planning.probe._SECONDS", 0.0)
    monkeypatch.setattr("ara.planning.probe._EIGEN_WIDTH", 70)
    found = json.loads(done("plan", tiny_llama, *QUICK[1:], "-w", tmp_path / "ws", "--json").stdout)
    assert all(stage["seconds"] > 0 for stage in found["stages"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--keep", "0.0001"), "keep 0.0001 allows"),
        (("--keep", "0"), "--keep must be in (0, 1]"),
        (("--size", "1KB"), "--size 1KB allows 1,000"),
        (("--size", "much"), "size: string should match"),
        (("--size", "1GB", "--keep", "0.5"), "are given together"),
    ],
)
def test_impossible_budgets(words: tuple[str, ...], said: str, tiny_llama: Path, tmp_path: Path) -> None:
    refused(ara("plan", tiny_llama, *QUICK, *words, "-q", "-w", tmp_path), 2, said, hint=False)


def test_an_unknown_model(tmp_path: Path) -> None:
    refused(ara("plan", "lama2-7b", "-q", "-w", tmp_path), 1, "did you mean llama2-7b")


def test_a_size_shows_both_checkpoints(tiny_llama: Path, tmp_path: Path) -> None:
    found: Any = done("plan", tiny_llama, *QUICK, "--size", "160KB", "-w", tmp_path)
    assert "before ara quantise, 156.2 KiB after it" in found.stdout


# config.json of LLaMA-2-7B, without what names tokens.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}


@pytest.mark.parametrize("page", ["README.md", "docs/large-models.md"])
def test_the_plan_of_llama_is_shown(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, FLOPs and time depend on the machine; the disk does not."""
    monkeypatch.chdir(tmp_path)
    folder = Path("llama2-7b")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    found = done("plan", "./llama2-7b", "--keep", "0.8", "--no-probe", "--device", "cpu", "--dtype", "float32").stdout
    text = (Path(__file__).parents[2] / page).read_text()
    shown = _disks(text)
    assert shown and shown.items() <= _disks(found).items()
    assert {"decompose", "allocate", "truncate", "recover", "eval"} <= shown.keys()
    assert "least machine: memory" in text


def _disks(text: str) -> dict[str, str]:
    """Return stage → its disk, from the rows of a plan."""
    row = r"^ ([\w-]+)(?: \(optional\))? +[\d.]+ \w+ +[\d.]+ \w+ +[a-z ]+? {2,}([\d.]+ \w+)"
    return dict(re.findall(row, text, re.MULTILINE))
