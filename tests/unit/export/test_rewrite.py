"""Factors put into graphs that were exported from the dense model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from ara.decomposition.plain import Plain
from ara.errors import ModelError, UsageError
from ara.progress import SILENT
from export.config import ExportConfig
from export.onnx_target import resolve, write_onnx
from export.rewrite import load_graph, rewrite
from export.runner import OnnxDecoder
from export.weights import Checkpoint


def exported(source: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    folder.mkdir()
    config = resolve(ExportConfig(execution_provider="cpu", **settings))
    return write_onnx(Checkpoint(source), folder, config, "0" * 64, SILENT).model_dump(mode="json")


@pytest.fixture
def dense(checkpoint: Callable[..., Any], tmp_path: Path) -> Path:
    """Return a graph of the dense llama."""
    exported(checkpoint("llama", None).folder, tmp_path / "dense", parity=False)
    return tmp_path / "dense" / "model.onnx"


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_a_rewritten_graph_is_the_compressed_model(
    layout: str, dense: Path, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    made = checkpoint("llama", layout)
    about = exported(made.folder, tmp_path / "out", rewrite=str(dense))
    assert about["rewritten"] and max(case["difference"] for case in about["parity"]["cases"]) < 1e-4
    assert (tmp_path / "out" / "genai_config.json").is_file()
    names = {node.name for node in ir.load(tmp_path / "out" / "model.onnx").graph}
    ranks = Checkpoint(made.folder).ranks
    assert all(f"{path}.A/MatMul" in names and f"{path}/MatMul" not in names for path in ranks)
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (tmp_path / "out", dense.parent)]
    assert sizes[0] < sizes[1]
    prompt = torch.arange(4, 20)
    expected = made.model.generate(prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(OnnxDecoder(tmp_path / "out").generate(prompt.numpy(), 20, set())) == expected[0, 16:].tolist()


class _Small(nn.Module):
    """Two linear layers, one of them with a bias, and names as other exporters write them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = torch.randn(13, 7, generator=generator)
        self.down = torch.randn(7, 13, generator=generator)


def small_graph(small: _Small, names: tuple[str, str]) -> ir.Model:
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=["b", 7])
    weights = [
        ir.val("onnx::MatMul_7", const_value=ir.tensor(small.up.T.contiguous().numpy(), name="onnx::MatMul_7")),
        ir.val("w2", const_value=ir.tensor(small.down.numpy(), name="w2")),
        ir.val("bias", const_value=ir.tensor(torch.arange(7.0).numpy(), name="bias")),
    ]
    first = ir.node("MatMul", [x, weights[0]], name=names[0])
    second = ir.node("Gemm", [first.outputs[0], weights[1], weights[2]], {"transB": 1}, name=names[1])
    first.outputs[0].name, second.outputs[0].name = "h", "y"
    second.outputs[0].dtype, second.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["b", 7])
    graph = ir.Graph([x], second.outputs, nodes=[first, second], initializers=weights, opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


class _Stored(Checkpoint):
    """Factors in memory."""

    def __init__(self, small: _Small, ranks: dict[str, int]) -> None:
        self.folder, self.ranks, self.pivoted, self._tensors = Path("memory"), ranks, False, {}
        for path, rank in ranks.items():
            factors = Plain().decompose(small.up if path.endswith("up") else small.down, None)
            self._tensors[f"{path}.A.weight"] = factors.a[:rank].float()
            self._tensors[f"{path}.B.weight"] = factors.b[:, :rank].float()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def test_names_of_other_exporters_and_gemm_nodes(tmp_path: Path) -> None:
    import onnxruntime as ort

    small = _Small()
    model = small_graph(small, ("/model/layers.0/mlp/up/MatMul", "/model/layers.0/mlp/down/Gemm"))
    ranks = {"model.layers.0.mlp.up": 5, "model.layers.0.mlp.down": 4}
    stored = _Stored(small, ranks)
    assert rewrite(model, stored) == list(ranks)
    assert set(model.graph.initializers) == {"bias", *stored._tensors}
    ir.save(model, tmp_path / "m.onnx")
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    (y,) = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"]).run(
        None, {"x": x.numpy()}
    )
    t = stored._tensors
    up, down = (t[f"{path}.B.weight"] @ t[f"{path}.A.weight"] for path in ranks)
    torch.testing.assert_close(torch.from_numpy(y), x @ up.T @ down.T + torch.arange(7.0), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    small = _Small()
    names = ("/model/layers.0/mlp/up/MatMul", "/model/layers.0/mlp/down/Gemm")
    with pytest.raises(ModelError, match=r"no MatMul or Gemm of its own for 1 of 1 layers, model\.layers\.1\.mlp\.up"):
        rewrite(small_graph(small, names), _Stored(small, {"model.layers.1.mlp.up": 3}))
    twice = ("/model/layers.0/mlp/up/MatMul", "/model/layers.0/mlp/up/Gemm")
    with pytest.raises(ModelError, match=r"two nodes for model\.layers\.0\.mlp\.up"):
        rewrite(small_graph(small, twice), _Stored(small, {"model.layers.0.mlp.up": 3}))
    other = _Small()
    other.up = torch.randn(13, 7, generator=torch.Generator().manual_seed(9))
    with pytest.raises(ModelError, match=r"is not the one that was factorised \(cosine"):
        rewrite(small_graph(other, names), _Stored(small, {"model.layers.0.mlp.up": 5}))
    with pytest.raises(ModelError, match="shape"):
        swapped = ("/model/layers.0/mlp/down/MatMul", "/model/layers.0/mlp/up/Gemm")
        rewrite(small_graph(small, swapped), _Stored(small, {"model.layers.0.mlp.up": 5}))
    (tmp_path / "no.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"no\.onnx cannot be read as ONNX"):
        load_graph(tmp_path / "no.onnx")


def test_a_dense_checkpoint_has_nothing_to_put_in(dense: Path, checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no low-rank layers"):
        exported(checkpoint("llama", None).folder, tmp_path / "out", rewrite=str(dense))


def test_a_graph_with_unknown_inputs_cannot_be_compared(
    dense: Path, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    model = ir.load(dense)
    model.graph.inputs[1].name = "mask"
    ir.save(model, tmp_path / "other.onnx", external_data="other.data")
    source = checkpoint("llama").folder
    with pytest.raises(ModelError, match=r"wants mask; known inputs are input_ids, attention_mask, position_ids"):
        exported(source, tmp_path / "out", rewrite=str(tmp_path / "other.onnx"))
    assert exported(source, tmp_path / "again", rewrite=str(tmp_path / "other.onnx"), parity=False)["parity"] is None


def test_settings_of_our_own_graph_are_refused(tmp_path: Path) -> None:
    for settings in ({"precision": "int8"}, {"merge_shared_inputs": True}, {"last_logits": True}):
        with pytest.raises(UsageError, match="--rewrite changes nothing but the factors"):
            resolve(ExportConfig(execution_provider="cpu", rewrite="x.onnx", **settings))


def test_the_neighbour_for_genai_gets_our_file_name(
    dense: Path, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    import json

    genai = dense.with_name("genai_config.json")
    document = json.loads(genai.read_text())
    document["model"]["decoder"]["filename"] = "theirs.onnx"
    genai.write_text(json.dumps(document))
    source = checkpoint("llama").folder
    exported(source, tmp_path / "out", rewrite=str(dense), parity=False)
    found = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert found["model"]["decoder"]["filename"] == "model.onnx"
    for number, (text, words) in enumerate((("[]", "holds a JSON list"), ('{"model": 1}', "is not what GenAI reads"))):
        genai.write_text(text)
        with pytest.raises(ModelError, match=words):
            exported(source, tmp_path / str(number), rewrite=str(dense), parity=False)
