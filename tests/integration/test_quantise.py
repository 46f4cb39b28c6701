"""``ara quantise``: the checkpoint that it writes, what reads it, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx.numpy_helper import to_array
from safetensors.torch import load_file

import ara
from ara.artifacts.checkpoint import CheckpointResults
from ara.layouts.modeling_ara import AraConfig, RoundedLinear
from ara.models.accounting import weight_bytes
from ara.models.checkpoint import load
from ara.workspace.store import Workspace
from tests.commands import ara as command
from tests.commands import done, refused
from tests.damage import listing
from tests.tiny import save_tiny

CPU = ("--device", "cpu", "--dtype", "float32")
FEW = (*CPU, "--samples", 12, "--held-out", 6)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.arange(3, 23)[None]).logits
    return found


def written(root: Path, *words: Any) -> Path:
    """Round the checkpoint of a workspace, and return the folder of the result."""
    words = words if "--bits" in words else ("--bits", 8, *words)
    return root / "quantise" / json.loads(done("quantise", *FEW, *words, "-w", root, "--json").stdout)["name"]


def made(model: Path, root: Path, text: str, *words: Any) -> Path:
    """Make a workspace with a compressed checkpoint."""
    few = [model, "--text", text, "--samples", 16, "--seq-len", 48, *CPU, "--rank-samples", 8, "--held-out", 4]
    done("run", *few, "--keep", 0.5, "--recover", "none", "--no-eval", *words, "-w", root)
    return root


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("layout", ["factors", "pivoted"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_checkpoint_holds_few_bits_and_computes_with_them(
    family: str, layout: str, bits: int, tmp_path: Path, tiny_text: str
) -> None:
    root = made(save_tiny(tmp_path / "model", family), tmp_path / "ws", tiny_text, "--layout", layout)
    folder = written(root, "--bits", bits, "--tolerance", 9)
    assert folder.name.endswith(f"-int{bits}")
    model = ara.load(folder / "checkpoint")
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    found = {name: one for name, one in own.named_modules() if isinstance(one, RoundedLinear)}
    (results,) = (
        CheckpointResults.read(one) for one in Workspace.open(root).views("checkpoint") if one.stage == "quantise"
    )
    assert results.rounding is not None and results.rounding.bits == {str(bits): len(found)} and found
    assert {one.bits for one in found.values()} == {bits}
    torch.testing.assert_close(logits(own), logits(model), rtol=1e-4, atol=1e-4)
    (before,) = (one for one in Workspace.open(root).views("checkpoint") if one.stage == "truncate")
    exact = logits(load(before.path / "checkpoint", "cpu", "float32"))
    error = float((logits(model) - exact).norm() / exact.norm())
    assert 0 < error < (0.05 if bits == 8 else 0.6)
    assert results.disk_bytes < CheckpointResults.read(before).disk_bytes


def test_all_other_tensors_and_the_sizes_are_as_they_were(copied: Path) -> None:
    folder = written(copied, "--bits", 4, "--block", 16, "--tolerance", 9)
    before = load_file(copied / "truncate" / "energy-0.70" / "checkpoint" / "model.safetensors")
    after = load_file(folder / "checkpoint" / "model.safetensors")
    config = json.loads((folder / "checkpoint" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3 and set(map(tuple, config["rounded"].values())) == {(4, 16, True)}
    for name, tensor in before.items():
        path = name.removesuffix(".weight")
        if path not in config["rounded"]:
            assert torch.equal(after[name], tensor), name
            continue
        m, n = tensor.shape
        blocks = -(-n // 16)
        shapes = {key: tuple(after[f"{path}.{key}"].shape) for key in ("steps", "scales", "zeros")}
        assert shapes == {"steps": (m, 8 * blocks), "scales": (m, blocks), "zeros": (m, -(-blocks // 2))}
        assert after[f"{path}.scales"].dtype == torch.float16


def test_a_cast_does_not_round_the_scales(copied: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = written(copied) / "checkpoint"
    exact, cast = (AutoModelForCausalLM.from_pretrained(folder, dtype=kind) for kind in (torch.float32, torch.bfloat16))
    cast.to(torch.float16)
    for name, one in exact.named_modules():
        if isinstance(one, RoundedLinear):
            other = cast.get_submodule(name)
            assert other.scales.dtype == torch.float16 and torch.equal(one.weight, other.weight)


def test_calibration_beats_rounding_to_nearest_on_held_out_text(copied: Path) -> None:
    losses = {}
    for method in ("calibrated", "nearest"):
        written(copied, "--bits", 4, "--block", 32, "--method", method, "--name", method, "--tolerance", 9)
        results = CheckpointResults.read(Workspace.open(copied).view(f"quantise/{method}"))
        assert results.rounding is not None
        losses[method] = results.rounding.loss_after - results.rounding.loss_before
    assert losses["calibrated"] < losses["nearest"]


def test_later_commands_read_it(copied: Path, tiny_text: str) -> None:
    name = written(copied).name
    words = ["--tasks", tiny_text, "--seq-len", 48, "--max-windows", 2, *CPU, "-w", copied]
    document = json.loads(done("eval", *words, "--json").stdout)
    assert document["parents"][0]["key"] == f"quantise/{name}"
    assert "8 bits per weight" in (copied / "quantise" / name / "checkpoint" / "README.md").read_text()
    done("report", "-w", copied)
    page = next((copied / "report").rglob("*.html")).read_text()
    assert "Rounding" in page and "8 bits per weight" in page


def test_a_run_that_was_killed_resumes_to_the_same_bytes(copied: Path, killed: Any) -> None:
    written(copied, "--name", "one")
    words = [str(word) for word in (*FEW, "--bits", 8, "--name", "two", "-w", copied)]
    killed("ara.stages.rounding_parts:RoundingParts.finish_part", 2, "after", "quantise", *words)
    again = done("quantise", *words)
    assert "resum" in again.stderr
    assert _weights(copied / "quantise" / "two") == _weights(copied / "quantise" / "one")


def _weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "checkpoint").glob("*.safetensors")}


def test_what_cannot_be_rounded_is_said(copied: Path) -> None:
    name = written(copied).name
    refused(command("quantise", *FEW, "-w", copied), 2, "gives no layer 4 or 8 bits")
    refused(command("quantise", *FEW, "--from", f"quantise/{name}", "-w", copied), 2, "is rounded to 8 bits")
    refused(command("recover", *FEW, "--from", f"quantise/{name}", "-w", copied), 1, "is rounded to 8 bits")
    done("truncate", "--densify", "-w", copied)
    refused(command("quantise", *FEW, "--checkpoint", "energy-0.70-dense", "-w", copied), 1, "is densified")
    for words, message in ((("--bits", 3), "3"), (("--block", 48), "48")):
        refused(command("quantise", *FEW, *words, "-w", copied), 2, message, hint=False)


def test_a_loss_beyond_the_tolerance_leaves_nothing(copied: Path) -> None:
    before = listing(copied / "truncate")
    result = command("quantise", *FEW, "--bits", 4, "--block", 256, "--tolerance", 1e-9, "-w", copied)
    assert result.exit_code == 1 and "allowed are 1e-09" in result.stderr and "--bits 8" in result.stderr
    assert not any((copied / "quantise").iterdir()) and listing(copied / "truncate") == before


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_embedding_and_head_have_bits_of_their_own(family: str, tmp_path: Path, tiny_text: str) -> None:
    root = made(save_tiny(tmp_path / "model", family), tmp_path / "ws", tiny_text)
    folder = written(root, "--bits", 4, "--embedding-bits", 8, "--tolerance", 9)
    assert folder.name.endswith("-int4-embedding8")
    results = CheckpointResults.read(Workspace.open(root).view(f"quantise/{folder.name}"))
    assert results.rounding is not None
    assert results.rounding.embedding_bits == 8 and set(results.rounding.bits) == {"4"}
    card = (folder / "checkpoint" / "README.md").read_text()
    assert "the embedding and the head have 8 bits per weight" in card
    from transformers import AutoModelForCausalLM

    own = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    assert results.weight_bytes == weight_bytes(own) < results.disk_bytes
    torch.testing.assert_close(logits(own), logits(ara.load(folder / "checkpoint")), rtol=1e-4, atol=1e-4)
    refused(command("quantise", *FEW, "--from", f"quantise/{folder.name}", "-w", root), 2, "is rounded to 4 and 8 bits")


def test_the_embedding_alone_can_be_rounded(copied: Path) -> None:
    words = ("quantise", *FEW, "--embedding-bits", 4, "--tolerance", 9, "-w", copied)
    result = done(*words)
    assert "4 (embedding and head)" in result.stdout
    folder = copied / "quantise" / "energy-0.70-embedding4" / "checkpoint"
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert about["format_version"] == 4 and set(about["rounded"]) == {"model.embed_tokens", "lm_head"}
    long = command(*words, "--block", 64, "--name", "long")
    assert long.exit_code == 2 and "is longer than a row of the embedding, which has 60 numbers" in long.stderr
    assert not (copied / "quantise" / "long").exists()
    refused(command("quantise", *FEW, "--bits", 8, "--embedding-bits", 3, "-w", copied), 2, "3", hint=False)


@pytest.mark.parametrize("entry", [[4, 32], [3, 32, True], [4, 48, True], [4, 32, 1], "4:32", [True, 32, True], None])
def test_a_bad_entry_of_the_config_is_refused(entry: Any) -> None:
    with pytest.raises(ValueError, match="rounded"):
        AraConfig({}, 3, rounded={"model.layers.0.mlp.up_proj": entry})
    with pytest.raises(ValueError, match="needs ARA format 3"):
        AraConfig({}, 2, rounded={"x": [4, 32, True]})


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
@pytest.mark.parametrize(("bits", "words"), [(4, ()), (8, ("--no-zero-points", "--block", 16))])
def test_the_graph_has_the_same_numbers(
    bits: int, words: tuple[Any, ...], layout: str, checkpoint: Callable[..., Any], tmp_path: Path, tiny_text: str
) -> None:
    model = checkpoint("llama", None).folder
    root = made(model, tmp_path / "ws", tiny_text, "--layout", layout)
    folder = written(root, "--bits", bits, "--tolerance", 9, *words)
    command = ["export", "--execution-provider", "cpu", "-w", root, "--json"]
    stored = load_file(folder / "checkpoint" / "model.safetensors")
    rounded = json.loads((folder / "checkpoint" / "config.json").read_text())["quantization_config"]["rounded"]
    # By default, inputs are rounded to 8 bits, as far as that costs little.
    printed = done(*command)
    exported = json.loads(printed.stdout)
    results = exported["results"]
    assert exported["parents"][0]["key"] == f"quantise/{folder.name}" and exported["name"] == f"{folder.name}-int8"
    assert results["precision"] == "int8" and results["rounded"] == len(rounded)
    assert all(case["kl"] <= 0.01 for case in results["parity"]["cases"])
    assert f"{len(rounded)} matrices of few bits as stored: their inputs are rounded to 8 bits" in printed.stderr
    # Exact products are an option.
    printed = done(*command, "--precision", "fp32")
    exact = json.loads(printed.stdout)
    assert all(case["kl"] < 1e-5 for case in exact["results"]["parity"]["cases"])
    assert exact["results"]["expanded"] == (len(rounded) if bits == 8 else 0)
    assert f"{len(rounded)} matrices of few bits as stored: their products are exact" in printed.stderr
    assert ("take the memory of float weights" in printed.stderr) is (bits == 8)
    for name in (exported["name"], exact["name"]):
        graph = onnx.load(root / "export" / name / "model.onnx")
        tensors = {one.name: to_array(one).reshape(-1) for one in graph.graph.initializer}
        for path in rounded:
            assert (tensors[f"{path}.steps"] == stored[f"{path}.steps"].flatten().numpy()).all()
    merged = json.loads(done(*command, "--precision", "fp32", "--merge-shared-inputs", "--name", "merged").stdout)
    assert all(case["kl"] < 1e-5 for case in merged["results"]["parity"]["cases"])
