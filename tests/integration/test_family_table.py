"""The committed table of families is what its script finds, for families of every kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from ara.models.families import DATA, known_families
from tests.families.probe import architectures, probe

# One for each way to be built: gates, biases, packed and transposed layers, windows, shared keys, convolutions, states,
# several kinds of blocks, shared layers, parts that read pictures or sound; and for each reason to be refused.
_SAMPLE = (
    *("bert", "bart", "deepseek_v3", "falcon", "gemma2", "gemma3", "gemma4_text", "gpt2", "gptj", "hrm_text", "lfm2"),
    *("llama", "mamba2", "mixtral", "phi3", "qwen3_5_text", "xlstm", "zamba2"),
    *("blip-2", "gemma4", "git", "llama4", "molmo2", "paligemma", "qwen2_audio", "qwen3_vl"),
)
# Some families have models with experts and models without.
_WITHOUT_EXPERTS = {
    "granitemoehybrid": {"num_local_experts": 0, "layer_types": ["mamba", "attention"]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp"]},
    "jamba": {"num_experts": 1, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("kind", _WITHOUT_EXPERTS)
def test_hybrids_without_experts_work(kind: str, tmp_path: Path) -> None:
    family = probe(kind, architectures("language")[kind], tmp_path, _WITHOUT_EXPERTS[kind])
    assert family.outcome == "works", family.reason
    assert not [name for name in family.dense if "expert" in name]


# A minute on a machine that does nothing else.
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    transformers.__version__ != known_families().transformers,
    reason=f"transformers {transformers.__version__}; the table is for {known_families().transformers}",
)
def test_sample_of_the_table(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.families", *_SAMPLE, "--jobs", "1", "--output", str(tmp_path / "found.json")]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=os.environ)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count(" s  ") == len(_SAMPLE)
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(DATA.read_text()), "make families"
