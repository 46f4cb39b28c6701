"""An int8 graph that is too far from torch gets exact products, those that cost most in 8 bits first, and says so."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from ara.errors import NumericalError
from ara.layouts.grid import Grid
from ara.progress import SILENT
from export.config import ExportConfig
from export.onnx import fallback, proof
from export.onnx.fallback import attempts, candidates
from export.onnx.proof import read_reference
from export.onnx.settings import resolve
from export.onnx.stored_weights import Checkpoint
from export.onnx.tolerance import TOLERANCES, Tolerance
from export.onnx.writing import write_onnx
from tests.damage import contents
from tests.exportable import exported
from tests.recorder import Recorder

INT8: dict[str, Any] = {"precision": "int8", "parity_tokens": 32}
SPOILT = "model.layers.1.mlp.down_proj"


def allow(monkeypatch: pytest.MonkeyPatch, kl: float) -> None:
    monkeypatch.setitem(TOLERANCES, "int8", Tolerance(None, 0.0, kl, 1.0))


def worst(about: dict[str, Any]) -> float:
    return max(case["kl"] for case in about["parity"]["cases"])


def operators(folder: Path) -> dict[str, str]:
    """Return path → operator of the nodes that multiply by weights."""
    nodes = [node for node in ir.load(folder / "model.onnx").graph if node.op_type in ("MatMul", "MatMulNBits")]
    return {(node.name or "").rpartition("/")[0]: node.op_type for node in nodes}


@pytest.fixture(scope="module")
def spoilt(checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with a factor whose first input is tiny and its first column large: 8 bits lose it."""
    folder = Path(shutil.copytree(checkpoint("llama", "factors").folder, tmp_path_factory.mktemp("spoilt") / "source"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{SPOILT}.A.weight"][0] /= 300
    tensors[f"{SPOILT}.B.weight"][:, 0] *= 300
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# -- how many -------------------------------------------------------------------------------------------------------


def test_attempts_start_where_the_costs_predict_success_and_double() -> None:
    costs = [8.0, 4.0, 2.0, 1.0, *[0.1] * 10]
    # All together are 16: after two matrices 4 are left, after three 2, after four 1.
    assert list(attempts(costs, 16, 4 / 0.8)) == [2, 4, 8, 14]
    assert list(attempts(costs, 16, 4.1)) == [3, 6, 12, 14]
    assert list(attempts([cost / 1000 for cost in costs], 16, 4.1)) == [3, 6, 12, 14]
    # KL is not what misses: the smallest step.
    assert next(attempts(costs, 0.1, 4)) == 1
    assert list(attempts(costs, math.nan, 4)) == [14] and list(attempts([], 1, 1)) == []
    assert list(attempts([0.0, 0.0], 1, 0.1)) == [1, 2]


@pytest.mark.parametrize("count", [1, 2, 7, 64, 415])
def test_attempts_are_few_and_end_with_all(count: int) -> None:
    for allowed in (1e-9, 0.3, 0.9, 2):
        found = list(attempts([1.0] * count, 1, allowed))
        assert found[-1] == count and len(found) <= 2 + math.log2(count) and found == sorted(set(found))


# -- which ones -----------------------------------------------------------------------------------------------------


def test_the_matrix_that_costs_most_comes_first(spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, 1)
    plain = exported(spoilt, tmp_path / "plain", **INT8)
    assert plain["fallback"] is None
    allow(monkeypatch, worst(plain) / 2)
    report = Recorder()
    config = resolve(ExportConfig(execution_provider="cpu", **INT8))
    (tmp_path / "out").mkdir()
    about = write_onnx(Checkpoint(spoilt), tmp_path / "out", config, "0" * 64, report).model_dump(mode="json")
    assert list(about["fallback"]["matrices"]) == [f"{SPOILT}.B"]
    assert worst(about) <= worst(plain) / 2 and about["fallback"]["kl"] == worst(plain)
    found = operators(tmp_path / "out")
    assert [path for path, kind in found.items() if kind == "MatMul"] == [f"{SPOILT}.B"]
    assert about["fallback"]["candidates"] == len(found)
    assert any(fact.endswith(f"with 1 of {len(found)} products exact") for fact in report.facts)
    sizes = [sum(file["bytes"] for file in one["files"].values()) for one in (plain, about)]
    assert about["fallback"]["extra_bytes"] == sizes[1] - sizes[0] > 0
    m, k = Checkpoint(spoilt).shape(f"{SPOILT}.B.weight")
    assert about["fallback"]["weights"] == m * k
    assert json.loads((tmp_path / "out" / "ara_export.json").read_text()) == about


@pytest.mark.parametrize(
    ("layout", "settings"),
    [(None, {}), ("factors", {"merge_shared_inputs": True}), ("pivoted", {}), ("pivoted", {"last_logits": True})],
)
def test_any_graph_gets_nearer(
    layout: str | None,
    settings: dict[str, Any],
    checkpoint: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = checkpoint("llama", layout).folder
    allow(monkeypatch, 1)
    plain = exported(folder, tmp_path / "plain", **INT8, **settings)
    allow(monkeypatch, worst(plain) / 3)
    about = exported(folder, tmp_path / "out", **INT8, **settings)
    assert worst(about) <= worst(plain) / 3
    assert 0 < len(about["fallback"]["matrices"]) < about["fallback"]["candidates"]
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    kinds = {value.dtype for name, value in graph.initializers.items() if name in _multiplied(about)}
    assert kinds == {ir.DataType.FLOAT16}
    again = exported(folder, tmp_path / "again", **INT8, **settings)
    assert again == about and contents(tmp_path / "again") == contents(tmp_path / "out")


@pytest.mark.parametrize("grid", [Grid(8, 32, True), Grid(8, 16, False), Grid(4, 32, True)], ids=str)
def test_a_graph_of_few_bits_gets_nearer_and_no_larger(
    grid: Grid, checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama", "pivoted", grid=grid, embedding=grid, tie_word_embeddings=True).folder
    allow(monkeypatch, 1)
    plain = exported(folder, tmp_path / "plain", **INT8)
    assert plain["expanded"] == 0 and set(operators(tmp_path / "plain").values()) == {"MatMulNBits"}
    allow(monkeypatch, worst(plain) / 3)
    about = exported(folder, tmp_path / "out", **INT8)
    exact = about["fallback"]["matrices"]
    assert worst(about) <= worst(plain) / 3 and 0 < len(exact) < about["fallback"]["candidates"]
    assert about["expanded"] == (len(exact) if grid.bits == 8 else 0)
    data = [one["files"]["model.onnx.data"]["bytes"] for one in (plain, about)]
    assert data[1] <= 1.05 * data[0]


def _multiplied(about: dict[str, Any]) -> set[str]:
    return {f"{path}.weight" for path in about["fallback"]["matrices"]}


@pytest.mark.parametrize(("tied", "embedding"), [(True, None), (False, None), (True, Grid(8, 32, True))], ids=str)
def test_candidates_are_the_matrices_that_the_graph_has_in_8_bits(
    tied: bool, embedding: Grid | None, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    folder = checkpoint("qwen2", "pivoted", tie_word_embeddings=tied, embedding=embedding).folder
    exported(folder, tmp_path / "out", **INT8, parity=False)
    nodes = [node for node in ir.load(tmp_path / "out" / "model.onnx").graph if node.op_type == "MatMulNBits"]
    eight = {(node.name or "").rpartition("/")[0] for node in nodes if node.attributes["accuracy_level"].as_int() == 4}
    reference = read_reference(Checkpoint(folder), tmp_path / "out", None, 64, SILENT)
    found = candidates(reference, "cpu")
    assert {one.path for one in found} == eight and "lm_head" in eight
    per_weight = [one.cost / one.weights for one in found]
    assert per_weight == sorted(per_weight, reverse=True)
    # Without rounded inputs, only the weights cost something.
    on_cuda = candidates(reference, "cuda")
    assert sum(one.cost for one in on_cuda) < sum(one.cost for one in found)
    # A head of few bits is not rounded again, so nothing is rounded there.
    assert {one.path for one in found} - {one.path for one in on_cuda} == ({"lm_head"} if embedding else set())


# -- the end --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_reached_ends_with_all_exact(
    checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    original = proof.OnnxDecoder

    def counted(folder: Path) -> Any:
        built.append(folder)
        return original(folder)

    monkeypatch.setattr(proof, "OnnxDecoder", counted)
    allow(monkeypatch, -1)
    with pytest.raises(NumericalError) as caught:
        exported(checkpoint("llama", "pivoted").folder, tmp_path / "out", **INT8)
    number = len(operators(tmp_path / "out"))
    assert f"int8 graph does not match the checkpoint, even with {number} of {number} products exact" in str(
        caught.value
    )
    assert set(operators(tmp_path / "out").values()) == {"MatMul"}
    assert len(built) <= 3 + math.log2(number)


def test_a_graph_without_numbers_fails_soon(
    checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback, "rounding_costs", lambda model, ids, what: dict.fromkeys(what, math.nan))
    allow(monkeypatch, -1)
    with pytest.raises(NumericalError, match="what 8 bits cost cannot be measured: a gradient is NaN or infinite"):
        exported(checkpoint("llama", "pivoted").folder, tmp_path / "out", **INT8)


def test_other_precisions_have_no_fallback(
    checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCES, "fp16", Tolerance(None, 0.0, -1, 1.0))
    with pytest.raises(NumericalError, match="the fp16 graph does not match the checkpoint: prefill: KL"):
        exported(checkpoint("llama").folder, tmp_path / "out", precision="fp16")


def test_a_weight_beyond_float16_is_named(spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(spoilt, tmp_path / "source"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{SPOILT}.A.weight"][0] /= 1e6
    tensors[f"{SPOILT}.B.weight"][:, 0] *= 1e6
    assert tensors[f"{SPOILT}.B.weight"].abs().max() > torch.finfo(torch.float16).max
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    allow(monkeypatch, -1)
    with pytest.raises(NumericalError, match="a weight is beyond the range of float16"):
        exported(folder, tmp_path / "out", **INT8)
