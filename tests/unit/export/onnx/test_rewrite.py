"""Factors put into graphs that were exported from the dense model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from ara.decomposition.plain import Plain
from ara.errors import ModelError, UsageError
from export.config import ExportConfig
from export.onnx.rewrite import graph_errors, load_graph, rewrite
from export.onnx.runner import OnnxDecoder
from export.onnx.settings import resolve
from export.onnx.stored_weights import Checkpoint, Rounding
from tests.exportable import exported


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
        self.folder, self.ranks, self.layout, self._tensors = Path("memory"), ranks, "factors", {}
        self.rounded, self._matrices, self._transposed = {}, {}, set()
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
    taken = small_graph(small, names)
    weight = ir.tensor(small.up.numpy(), name="model.layers.0.mlp.up.A.weight")
    taken.graph.register_initializer(ir.val(weight.name, const_value=weight))
    with pytest.raises(ModelError, match=r"the graph has a weight model\.layers\.0\.mlp\.up\.A\.weight of its own"):
        rewrite(taken, _Stored(small, {"model.layers.0.mlp.up": 3}))
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
    few = _Stored(small, {"model.layers.0.mlp.up": 3})
    few.rounded = dict.fromkeys(("model.layers.0.mlp.up.A", "model.embed_tokens"), Rounding(8, 32, True))
    with pytest.raises(ModelError, match=r"model\.embed_tokens has few bits .* keep its own numbers"):
        rewrite(small_graph(small, names), few)
    (tmp_path / "no.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelError, match=r"no\.onnx cannot be read as ONNX"):
        load_graph(tmp_path / "no.onnx")


FIRST = "onnx::MatMul_7"


def saved(folder: Path) -> Path:
    """Save a small graph, and its first weight once more in ``w.data`` beside it; return its path."""
    small = _Small()
    model = small_graph(small, ("/model/layers.0/mlp/up/MatMul", "/model/layers.0/mlp/down/Gemm"))
    (folder / "w.data").write_bytes(small.up.T.contiguous().numpy().tobytes())
    ir.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def moved(path: Path, location: str, offset: int = 0, sides: tuple[int, int] = (7, 13), place: str = "graph") -> None:
    """Say of a weight of a graph that it lies in another file."""
    model = ir.load(path)
    shape = ir.Shape(sides)
    tensor = ir.ExternalTensor(location, offset, None, ir.DataType.FLOAT, shape=shape, name=FIRST, base_dir=path.parent)
    if place == "graph":
        model.graph.initializers[FIRST].const_value = tensor
    else:
        constant = ir.node("Constant", [], {"value": tensor}, name="c")
        constant.outputs[0].name = "c"
        if place == "attribute":
            model.graph.append(constant)
        else:
            body = ir.Graph([], constant.outputs, nodes=[constant], name="body")
            model.graph.append(ir.node("If", [model.graph.inputs[0]], {"then_branch": body, "else_branch": body}))
    ir.save(model, path)


@pytest.mark.parametrize("place", ["graph", "attribute", "subgraph"])
@pytest.mark.parametrize("location", ["../../etc/passwd", "/etc/passwd", "sub/../../w.data", "link.data"])
def test_weights_outside_the_folder_are_not_read(location: str, place: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    (tmp_path / "link.data").symlink_to("/etc/passwd")
    moved(path, location, place=place)
    with pytest.raises(ModelError, match=rf"takes the weight {FIRST} from .*, outside its folder"):
        load_graph(path)


def test_weights_that_are_not_there_whole(tmp_path: Path) -> None:
    path = saved(tmp_path)
    moved(path, "w.data")
    assert load_graph(path).graph.initializers[FIRST].const_value is not None
    os.mkfifo(tmp_path / "pipe.data")
    for location, offset, sides, words in (
        ("pipe.data", 0, (7, 13), r"pipe\.data, the weights of .*, cannot be read \(it is a pipe"),
        ("no.data", 0, (7, 13), r"no\.data, the weights of .*, cannot be read \(No such file"),
        ("w.data", 1, (7, 13), r"w\.data has 364 bytes, onnx::MatMul_7 of .* would end at 365"),
        ("w.data", 0, (10**6, 10**6), r"would end at 4,000,000,000,000"),
        ("w.data", -4, (7, 13), "cannot be read as ONNX"),
    ):
        moved(saved(tmp_path), location, offset, sides)
        with pytest.raises(ModelError, match=words):
            load_graph(path)


def test_files_that_are_no_graph(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    for name, words in (("pipe.onnx", "it is a pipe"), ("none.onnx", "No such file"), (".", "Is a directory")):
        with pytest.raises(ModelError, match=rf"cannot be read \(.*{words}"):
            load_graph(tmp_path / name)
    whole = saved(tmp_path).read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:40] + b"\xff" * 40 + whole[80:], b"{" * 1000):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(ModelError, match=r"no MatMul|cannot be"), graph_errors(tmp_path / "m.onnx"):
            rewrite(load_graph(tmp_path / "m.onnx"), _Stored(_Small(), {"model.layers.0.mlp.up": 5}))


def test_a_graph_that_is_not_what_it_says_is_one_line(
    dense: Path, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """Nodes without inputs, weights that are no matrix, attributes of another type, cycles."""
    source, path = checkpoint("llama").folder, dense.with_name("changed.onnx")

    def refused(model: ir.Model, words: str) -> None:
        ir.save(model, path, external_data="changed.data")
        with pytest.raises(ModelError, match=words):
            exported(source, tmp_path / "out", rewrite=str(path), parity=False)
        (tmp_path / "out").rmdir()

    model = ir.load(dense)
    wrong = next(node for node in model.graph if (node.name or "").endswith("up_proj/MatMul"))
    model.graph.append(ir.node("MatMul", [], name="nothing"))
    assert wrong.inputs[1] is not None
    wrong.inputs[1].const_value = ir.tensor(torch.zeros(4).numpy(), name=wrong.inputs[1].name)
    wrong.inputs[1].shape = ir.Shape([4])
    refused(model, r"is no matrix in the graph: its shape is \[4\]")
    model = ir.load(dense)
    first = next(node for node in model.graph if node.op_type == "MatMul")
    late = list(model.graph)[-1].outputs[0]
    first.replace_input_with(0, late)
    refused(model, "cannot be rewritten: .*cycle")


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
