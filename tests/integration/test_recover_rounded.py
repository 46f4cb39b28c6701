"""``ara recover`` of a rounded checkpoint: its place in the lineage, the report, the graph, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx.numpy_helper import to_array
from safetensors.torch import load_file

from tests.commands import ara, done, refused
from tests.tiny import save_tiny

CPU = ("--device", "cpu", "--dtype", "float32")
FEW = (*CPU, "--samples", 12, "--held-out", 6)
STEPS = ("--steps", 12, "--batch", 4, "--check-every", 3, "--rate", 1e-4, "--block-rate", 1e-3)
EXPORT = ("export", "--execution-provider", "cpu", "--precision", "fp32")
FROM = ("--from", "quantise/energy-0.50-closed-int4")


@pytest.fixture(scope="module")
def lineage(checkpoint: Callable[..., Any], tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with a checkpoint that was truncated, repaired and rounded; only to be read."""
    root = tmp_path_factory.mktemp("lineage") / "ws"
    done(
        "decompose",
        checkpoint("llama", None).folder,
        "--text",
        tiny_text,
        "--samples",
        16,
        "--seq-len",
        48,
        *CPU,
        "-w",
        root,
    )
    done("allocate", "--keep", 0.5, "--method", "energy", "--layout", "pivoted", "--name", "energy-0.50", "-w", root)
    done("truncate", "-w", root)
    done("recover", *FEW, "-w", root)
    done("quantise", *FEW, "--bits", 4, "--block", 16, "--tolerance", 9, "-w", root)
    return root


@pytest.fixture
def root(lineage: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lineage, tmp_path / "ws"))


def test_a_second_repair_after_rounding_has_its_place_everywhere(root: Path, tiny_text: str) -> None:
    result = done("recover", "--level", "distill", *FEW, *STEPS, *FROM, "-w", root)
    name = "energy-0.50-closed-int4-distill"
    assert f"recover/{name}" in result.output and "Recovery after rounding" in result.stdout
    assert "ara eval --tasks wikitext2 -w" in result.output
    assert "ara eval --tasks wikitext2 -w" in done("status", "-w", root).output
    manifest = json.loads((root / "recover" / name / "manifest.json").read_text())
    results = manifest["results"]
    assert [row["level"] for row in results["recovery"]["levels"]] == ["closed"]
    assert [row["level"] for row in results["recovery_after_rounding"]["levels"]] == ["block", "distill"]
    assert results["recovery_after_rounding"]["after"] < results["recovery_after_rounding"]["before"]
    assert [parent["key"].split("/")[0] for parent in manifest["parents"]] == ["quantise", "decompose"]
    assert "is there already" in done("recover", "--level", "distill", *FEW, *STEPS, *FROM, "-w", root).stderr
    # Report and card: in the order in which it was done, with all commands.
    done("eval", "--tasks", tiny_text, "--seq-len", 48, "--max-windows", 2, *CPU, "-w", root)
    done("report", "-w", root)
    card = (root / "recover" / name / "checkpoint" / "README.md").read_text()
    places = [card.index(words) for words in ("at the level closed", "rounding was", "After the rounding, its scales")]
    kept = [row["level"] for row in results["recovery_after_rounding"]["levels"] if row["kept"]]
    assert places == sorted(places) and f"at the level{'s' * (len(kept) > 1)} {', '.join(kept)}" in card
    work = [one["key"] for one in json.loads((root / "report" / name / "report.json").read_text())["work"]]
    keys = ["truncate/energy-0.50", "recover/energy-0.50-closed", FROM[1], f"recover/{name}"]
    assert [key for key in work if key in keys] == keys
    page = (root / "report" / name / "report.html").read_text()
    titles = [page.index(f"<h2>{title}</h2>") for title in ("Recovery", "Rounding", "Recovery after rounding")]
    assert titles == sorted(titles)
    # The checkpoints that are taken by default are not rounded.
    again = json.loads(done("quantise", *FEW, "--bits", 8, "--method", "nearest", "-w", root, "--json").stdout)
    assert again["parents"][0]["key"] == "recover/energy-0.50-closed"
    refused(ara("quantise", *FEW, "--bits", 8, "--from", f"recover/{name}", "-w", root), 2, "is rounded to 4 bits")
    first = json.loads(done("recover", *FEW, "--name", "first", "-w", root, "--json").stdout)
    assert first["parents"][0]["key"] == "truncate/energy-0.50"


def test_the_graph_has_the_trained_scales_and_the_same_whole_numbers(root: Path) -> None:
    # Whether the level block is kept here depends on the last bits, so on the processor.
    done("recover", "--level", "distill", *FEW, *STEPS, *FROM, "--name", "repaired", "-w", root)
    graphs = {}
    for key in (FROM[1], "recover/repaired"):
        name = key.replace("/", "-")
        exported = json.loads(done(*EXPORT, "--from", key, "--name", name, "-w", root, "--json").stdout)
        cases = exported["results"]["parity"]["cases"]
        assert cases and all(case["kl"] < 0.02 for case in cases)
        model = onnx.load(root / "export" / name / "model.onnx")
        tensors = {one.name: to_array(one) for one in model.graph.initializer}
        nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        graphs[key] = [[tensors[place] for place in node.input[1:4]] for node in nodes]
    before, after = graphs.values()
    assert len(before) == len(after) > 0
    for (q, scales, z), (other_q, other_scales, other_z) in zip(before, after, strict=True):
        assert (q == other_q).all() and (z == other_z).all() and (scales != other_scales).any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the level closed cannot repair it"),
        (("--level", "distill", "--train", "factors"), "--train factors changes all numbers"),
        (("--level", "distill", "--train", "lora"), "--train lora changes all numbers"),
        (("--level", "distill", "--only", "--train", "lora", "--keep-adapter"), "--train lora changes all numbers"),
    ],
)
def test_what_would_change_whole_numbers_is_refused(root: Path, words: tuple[Any, ...], message: str) -> None:
    before = {path.name for path in (root / "recover").iterdir()}
    result = ara("recover", *FEW, *words, *FROM, "-w", root)
    # The first one is a matter of the checkpoint, the others are of the options.
    assert result.exit_code == (2 if words else 1), result.stderr
    assert result.stderr.count("error: ") == 1 and message in result.stderr, result.stderr
    assert {path.name for path in (root / "recover").iterdir()} == before


def test_biases_of_a_rounded_checkpoint_have_its_precision(tmp_path: Path, tiny_text: str) -> None:
    root = tmp_path / "ws"
    words = [save_tiny(tmp_path / "model", "qwen2"), "--text", tiny_text, "--samples", 16, "--seq-len", 48, *CPU]
    done("decompose", *words, "-w", root)
    done("allocate", "--keep", 0.6, "--method", "energy", "-w", root)
    done("truncate", "--dtype", "bfloat16", "-w", root)
    done("quantise", *FEW, "--bits", 4, "--tolerance", 9, "--name", "few", "-w", root)
    done("recover", "--level", "block", *FEW, *STEPS, "--from", "quantise/few", "--name", "few", "-w", root)
    for stage in ("truncate/energy-0.60", "quantise/few", "recover/few"):
        tensors = load_file(root / stage / "checkpoint" / "model.safetensors")
        kinds = {str(one.dtype) for name, one in tensors.items() if name.endswith(".bias")}
        assert kinds == {"torch.bfloat16"}, stage
