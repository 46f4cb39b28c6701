"""Exported graphs against torch: every family, layout and variant; what cannot be exported is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig

from ara.errors import ModelError, NumericalError, UnavailableError, UnsupportedModelError, UsageError
from ara.layouts.grid import Grid
from export.config import ExportConfig
from export.onnx.architecture import read_decoder
from export.onnx.graph import GraphBuilder
from export.onnx.proof import check_rotary
from export.onnx.runner import OnnxDecoder
from export.onnx.settings import resolve
from export.onnx.stored_weights import Checkpoint
from export.onnx.tolerance import TOLERANCES
from export.onnx.writing import write_onnx
from tests.decoders import BASIC
from tests.exportable import exported
from tests.recorder import Recorder

CPU = {"execution_provider": "cpu"}
THETA = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    **THETA,
}


def worst(about: dict[str, Any]) -> float:
    return max(case["difference"] for case in about["parity"]["cases"])


@pytest.mark.parametrize("layout", [None, "factors", "pivoted"])
@pytest.mark.parametrize("family", BASIC)
def test_every_family_and_layout_is_the_checkpoint(
    family: str, layout: str | None, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    about = exported(checkpoint(family, layout).folder, tmp_path / "out")
    assert [case["case"] for case in about["parity"]["cases"]] == ["prefill", "decode", "chunks", "padded"]
    assert worst(about) < 1e-4
    assert all(case["agreement"] == 1 for case in about["parity"]["cases"])
    assert bool(about["ranks"]) is (layout is not None)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, **THETA}}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **THETA}}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": YARN}),
        ("phi3", {"head_dim": 32, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA}}),
    ],
)
def test_variants_are_exact(
    family: str, changes: dict[str, Any], checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    plain = checkpoint(family)
    changed = checkpoint(family, **changes)
    ids = torch.arange(4, 60)[None]
    same = changes.get("rope_parameters", {}).get("rope_type") == "dynamic"  # it differs beyond the context only
    with torch.inference_mode():
        assert torch.allclose(plain.model(ids).logits, changed.model(ids).logits, atol=1e-3) is same
    assert worst(exported(changed.folder, tmp_path / "out")) < 1e-4


def test_late_positions_are_those_of_the_model(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """YaRN reaches beyond ``max_position_embeddings``; one late angle that is off is found."""
    made = checkpoint("llama", rope_parameters=YARN, max_position_embeddings=64)
    about = exported(made.folder, tmp_path / "out")
    assert about["decoder"]["context"] == 256 and worst(about) < 1e-4
    decoder = read_decoder(made.model.config)
    check_rotary(decoder, made.model)
    cos, sin = decoder.rotary_tables("")
    cos[200, 3] += 1e-3
    object.__setattr__(decoder, "rotary_tables", lambda name: (cos, sin))
    with pytest.raises(NumericalError, match=r"differs from the model's by 0\.001 between positions 0 and 255"):
        check_rotary(decoder, made.model)


def test_a_window_that_the_comparison_does_not_reach_is_told(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = checkpoint("mistral", sliding_window=60)
    for tokens, reached in ((30, False), (90, True)):
        (tmp_path / str(tokens)).mkdir()
        config = resolve(ExportConfig(**CPU, parity_tokens=tokens))
        report = Recorder()
        about = write_onnx(Checkpoint(made.folder), tmp_path / str(tokens), config, "0" * 64, report)
        assert about.parity is not None and about.parity.cases[0].tokens == tokens - 1
        assert any("sliding window of 60 tokens is longer" in line for line in report.facts) is not reached


@pytest.mark.parametrize("layout", [None, "factors", "pivoted"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_merged_inputs_give_the_same(
    family: str, layout: str | None, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    about = exported(checkpoint(family, layout).folder, tmp_path / "out", merge_shared_inputs=True)
    assert worst(about) < 1e-4
    nodes = [node.op_type for node in ir.load(tmp_path / "out" / "model.onnx").graph]
    assert nodes.count("Split") == (3 if family == "phi3" else 6)


def test_last_logits_are_those_of_the_last_position(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = checkpoint("llama")
    about = exported(made.folder, tmp_path / "out", last_logits=True)
    assert [case["case"] for case in about["parity"]["cases"]] == ["prefill", "decode", "chunks"]
    logits, _ = OnnxDecoder(tmp_path / "out").forward(np.arange(4, 40)[None])
    assert logits.shape[1] == 1
    with torch.inference_mode():
        expected = made.model(torch.arange(4, 40)[None]).logits[:, -1:]
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_half_precision_is_near(family: str, checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    about = exported(checkpoint(family, "pivoted").folder, tmp_path / "out", precision="fp16")
    assert 1e-5 < worst(about) < 0.1
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    assert {value.dtype for name, value in graph.initializers.items() if name.endswith(".weight")} == {
        ir.DataType.FLOAT16
    }


@pytest.mark.parametrize("layout", [None, "factors", "pivoted"])
def test_eight_bits_are_near_and_small(layout: str | None, checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = checkpoint("llama", layout)
    about = exported(made.folder, tmp_path / "out", precision="int8", parity=False)
    logits, _ = OnnxDecoder(tmp_path / "out").forward(np.arange(4, 40)[None])
    with torch.inference_mode():
        expected = made.model(torch.arange(4, 40)[None]).logits.numpy()
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()
    assert about["parity"] is None
    exported(made.folder, tmp_path / "full")
    sizes = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("out", "full")]
    assert sizes[0] < 0.6 * sizes[1]


def test_what_the_folder_holds_and_says(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    made = checkpoint("llama", "pivoted")
    about = exported(made.folder, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "ara_export.json",
        "chat_template.jinja",
        "genai_config.json",
        "generation_config.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((tmp_path / "out" / "ara_export.json").read_text()) == about
    assert about["source"] == {"name": "checkpoint", "sha256": "0" * 64}
    assert about["layout"] == "pivoted" and about["precision"] == "fp32" and about["execution_provider"] == "cpu"
    assert about["ranks"] == json.loads((made.folder / "config.json").read_text())["quantization_config"]["ranks"]
    genai = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert genai["model"]["type"] == "llama" and genai["model"]["context_length"] == 200
    assert genai["model"]["decoder"]["head_size"] == 16 and genai["model"]["decoder"]["num_key_value_heads"] == 2


def test_nodes_and_weights_are_named_after_their_modules(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    exported(checkpoint("llama").folder, tmp_path / "out", parity=False)
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    names = {node.name for node in graph}
    assert {"model.layers.1.mlp.up_proj.A/MatMul", "model.layers.1.mlp.up_proj.B/MatMul", "lm_head/MatMul"} <= names
    assert "model.layers.0.self_attn.k_proj/MatMul" in names  # the one that the fixture leaves dense
    assert len(names) == len(list(graph))
    shape = graph.initializers["model.layers.1.mlp.up_proj.A.weight"].shape
    assert shape is not None and shape[0] == 102
    assert [value.name for value in graph.inputs][:4] == [
        "input_ids",
        "attention_mask",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert [value.name for value in graph.outputs][:3] == ["logits", "present.0.key", "present.0.value"]


def test_weights_are_read_one_at_a_time(
    checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is alive only while it is written: no two large ones at once."""
    import gc
    import weakref

    alive: list[weakref.ref[np.ndarray]] = []
    most = 0
    original = GraphBuilder._array

    def watched(self: GraphBuilder, tensor: torch.Tensor, *kind: Any) -> np.ndarray:
        nonlocal most
        array = original(self, tensor, *kind)
        gc.collect()
        alive[:] = [reference for reference in alive if reference() is not None]
        alive.append(weakref.ref(array))
        most = max(most, len(alive))
        return array

    monkeypatch.setattr(GraphBuilder, "_array", watched)
    exported(checkpoint("llama").folder, tmp_path / "out", parity=False)
    assert most <= 3


# -- beyond tolerance, and what cannot be -----------------------------------------------------------------------


@pytest.mark.parametrize("part", ["epsilon", "rotary", "bias"])
def test_a_graph_that_is_wrong_is_found_out(
    part: str, checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoint("qwen2")
    if part == "epsilon":

        def without(self: GraphBuilder, x: ir.Value, path: str, width: int) -> ir.Value:
            return self.op("Mul", [x, *self._norm_weights(path, width)], path)

        monkeypatch.setattr(GraphBuilder, "_plain_norm", without)
    elif part == "rotary":
        from export.onnx.architecture import Decoder

        original = Decoder.rotary_tables
        monkeypatch.setattr(Decoder, "rotary_tables", lambda self, name: tuple(t.flip(1) for t in original(self, name)))
        with pytest.raises(NumericalError, match="rotary embedding of the graph differs from the model's by"):
            exported(made.folder, tmp_path / "early")
        monkeypatch.setattr("export.onnx.proof.check_rotary", lambda decoder, model: None)
    else:
        original_rest = GraphBuilder._rest
        from dataclasses import replace

        monkeypatch.setattr(
            GraphBuilder, "_rest", lambda self, h, layer: original_rest(self, h, replace(layer, bias=None))
        )
        with pytest.raises(ModelError, match=r"9 tensors of the checkpoint have no place in the graph"):
            exported(made.folder, tmp_path / "early")
        monkeypatch.setattr(GraphBuilder, "_refuse_leftovers", lambda self: None)
    with pytest.raises(
        NumericalError, match="the fp32 graph does not match the checkpoint: prefill: largest difference"
    ):
        exported(made.folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "changes", "complaint"),
    [
        ("llama", {"head_dim": 14}, "heads are 14 wide"),
        ("llama", {"hidden_act": "relu6"}, "the activation 'relu6' is not known"),
        (
            "phi3",
            {
                "original_max_position_embeddings": 64,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 64,
                    **THETA,
                },
            },
            "rotary embeddings of type 'longrope'",
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    family: str, changes: dict[str, Any], complaint: str, checkpoint: Callable[..., Any]
) -> None:
    config = AutoConfig.from_pretrained(checkpoint(family, None, **changes).folder)
    with pytest.raises(UnsupportedModelError, match=complaint) as caught:
        read_decoder(config)
    assert caught.value.hint


def test_precisions_that_cannot_be() -> None:
    with pytest.raises(UnavailableError, match=r"does not round to 4 bits: .*3\.80"):
        resolve(ExportConfig(precision="int4", execution_provider="cpu"))
    # A rounded checkpoint keeps its bits in every precision.
    assert resolve(ExportConfig(precision="int4", execution_provider="cpu"), rounded=True).precision == "int8"
    with pytest.raises(UsageError, match="no fp32 on CUDA"):
        resolve(ExportConfig(precision="fp32", execution_provider="cuda"))
    assert resolve(ExportConfig(execution_provider="cuda")).precision == "fp16"
    assert resolve(ExportConfig(execution_provider="cpu")).precision == "fp32"
    assert resolve(ExportConfig(execution_provider="cpu"), rounded=True).precision == "int8"
    # Nothing would tell how much rounded inputs cost.
    assert resolve(ExportConfig(execution_provider="cpu", parity=False), rounded=True).precision == "fp32"
    assert resolve(ExportConfig(execution_provider="cpu", precision="fp32"), rounded=True).precision == "fp32"
    assert resolve(ExportConfig(execution_provider="cuda"), rounded=True).precision == "fp16"
    assert set(TOLERANCES) == {"fp32", "fp16", "int8"}


@pytest.mark.parametrize(
    ("family", "tied", "grid"),
    [
        ("llama", True, Grid(8, 32, True)),
        ("llama", True, Grid(4, 32, True)),
        ("llama", False, Grid(4, 16, False)),
        ("qwen2", True, Grid(8, 64, False)),
        ("gemma", True, Grid(4, 64, True)),
        ("phi3", False, Grid(8, 16, True)),
    ],
    ids=str,
)
def test_an_embedding_of_few_bits_is_in_the_graph_once(
    family: str, tied: bool, grid: Grid, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """Rows of 102 numbers end in the middle of a block."""
    made = checkpoint(family, None, embedding=grid, tie_word_embeddings=tied)
    about = exported(made.folder, tmp_path / "out")
    assert worst(about) < 1e-4 and all(case["agreement"] == 1 for case in about["parity"]["cases"])
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    kinds = [node.op_type for node in graph]
    assert kinds.count("GatherBlockQuantized") == 1
    steps = [name for name in graph.initializers if name.endswith(".steps")]
    assert steps == ["model.embed_tokens.steps"] if tied else sorted(steps) == ["lm_head.steps", steps[0]]
    (head,) = (node for node in graph if (node.name or "").rpartition("/")[0] == "lm_head" and "Mul" in node.op_type)
    if grid.bits == 8:
        assert head.op_type == "FusedMatMul" and about["expanded"] == 1
    else:
        assert head.attributes["accuracy_level"].value == 0 and about["expanded"] == 0
