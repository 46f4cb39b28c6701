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

# One for each way to be built: gates, biases, packed and transposed layers, windows, shared keys, convolutions, states,
# several kinds of blocks, shared layers; and for each reason to be refused.
_SAMPLE = (
    *("bert", "bart", "bloom", "deepseek_v3", "ernie4_5", "exaone4", "falcon", "gemma2", "gemma3", "gemma4_text"),
    *("gpt2", "gptj", "granite", "hrm_text", "lfm2", "llama", "mamba2", "mixtral", "nemotron", "olmo2", "phi3"),
    *("qwen3", "qwen3_5_text", "zamba2"),
)


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
