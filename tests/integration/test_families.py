"""Families with parts that cannot be factorised: these stay dense, are named, and the rest goes the whole way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ara.config import AllocateConfig, DecomposeConfig, EvalConfig, TruncateConfig
from ara.data.texts import load_documents
from ara.data.tokens import evaluation_windows
from ara.models.checkpoint import load
from ara.models.low_rank import low_rank_layers
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.evaluate import evaluate
from ara.stages.truncate import truncate
from tests.recorder import Recorder
from tests.tiny import VOCABULARY, tiny_tokenizer

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 60,
    "intermediate_size": 92,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_RECURRENT = {
    "lru_width": 60,
    "num_attention_heads": 6,
    "attention_window_size": 16,
    "num_hidden_layers": 3,
    "block_types": ["recurrent", "recurrent", "attention"],
}
_MAMBA = {"num_hidden_layers": 2, "state_size": 7, "time_step_rank": 9}
_SHARED = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "hybrid_layer_ids": [1, 3],
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "attention_hidden_size": 120,
    "attention_head_dim": 20,
    "n_mamba_heads": 8,
    "mamba_headdim": 15,
    "mamba_d_state": 7,
    "chunk_size": 16,
    "adapter_rank": 9,
}
_GATES = "weights that belong to no linear layer (model.layers.0.temporal_block.rg_lru.input_gate_weight, "


@pytest.mark.parametrize(
    ("kind", "values", "method", "said"),
    [
        (
            "mamba",
            _MAMBA,
            "two-sided",
            "2 linear layers that the forward pass does not call (backbone.layers.0.mixer.dt",
        ),
        ("mamba", _MAMBA, "plain", "2 linear layers that the forward pass does not call (backbone.layers.0.mixer.dt"),
        ("recurrent_gemma", _RECURRENT, "two-sided", f"4 {_GATES}"),
        ("zamba2", _SHARED, "two-sided", "linear layers that share their weights (model.layers.1.shared_transformer."),
    ],
    ids=["mamba", "mamba without text", "recurrent_gemma", "zamba2"],
)
def test_parts_that_stay_dense(
    kind: str, values: dict[str, Any], method: str, said: str, tmp_path: Path, tiny_text: str
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**_SIZES, **values})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / kind)
    tiny_tokenizer().save_pretrained(tmp_path / kind)
    place = {"device": "cpu", "dtype": "float32"}
    report = Recorder()
    run = Run(tmp_path / "ws", report=report)
    decomposed = {
        "model": str(tmp_path / kind),
        "method": method,
        "text": tiny_text,
        "samples": 6,
        "seq_len": 32,
        **place,
    }
    made = decompose(DecomposeConfig(**decomposed), run)
    (told,) = [fact for fact in report.facts if fact.startswith("left dense: ")]
    assert said in told
    chunks = decompose(DecomposeConfig(**decomposed, moment_memory=1e-6), Run(tmp_path / "chunks"))
    assert chunks.manifest.files == made.manifest.files  # type: ignore[union-attr]
    allocate(AllocateConfig(keep=0.6, method="uniform"), run)
    view = truncate(TruncateConfig(), run)
    loaded = load(view.path / "checkpoint", "cpu")
    ranks = low_rank_layers(loaded)
    assert ranks and not any(name.endswith("dt_proj") for name in ranks)
    # The dense model of the table is the model, window by window: nothing is carried over.
    settings = EvalConfig(tasks=(tiny_text,), seq_len=32, max_windows=5, continuations=0, **place)
    results = evaluate(settings, run).manifest.results  # type: ignore[union-attr]
    (task,) = results["tasks"].values()
    windows = evaluation_windows(
        load_documents(tiny_text, "evaluation"), tiny_tokenizer(), seq_len=32, max_windows=5
    ).ids
    with torch.no_grad():
        likelihoods = model(input_ids=windows, use_cache=False).logits.log_softmax(-1)
    nll = -likelihoods[:, :-1].gather(2, windows[:, 1:, None]).mean().item()
    assert task["models"]["dense"]["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
