"""What is said of configs and weights that transformers does not load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ara.errors import ModelError, first_line
from ara.evaluation.perplexity import interleaved_perplexity
from ara.models.loading import forward_errors
from ara.models.sources import resolve
from tests.tiny import tiny_config, tiny_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 7}, r"hidden size \(60\) is not a multiple of the number of attention heads \(7\)"),
        ({"hidden_size": "abc"}, r"cannot be used: Field 'hidden_size' expected int, got str"),
        (
            {"rope_parameters": {"rope_type": "su", "rope_theta": 1e4, "factor": 2.0}},
            r"names the rope_type 'su'; transformers knows default, .*yarn",
        ),
        ({"hidden_act": "nope"}, r"cannot be built \(there is no 'nope'\)"),
        ({"num_attention_heads": 0}, r"the config of .* cannot be used: .*zero"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_useful_line_of_what_transformers_says(
    weights: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    (tmp_path / "model.safetensors").symlink_to(weights / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**tiny_config("llama").to_diff_dict(), **change}))
    with pytest.raises(ModelError, match=said) as caught:
        resolve(str(tmp_path)).load_model(torch.float32)
    assert "\n" not in str(caught.value)
    assert "config.json" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n\n  one\ntwo"), "one"),
        (ValueError("Several problems:\n\n   the first\n   the second"), "Several problems: the first"),
        (KeyError("su"), "there is no 'su'"),
        (KeyError("a whole sentence"), "a whole sentence"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("ends:"), "ends:"),
    ],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_a_model_that_its_own_code_cannot_run_is_no_bug_of_ours() -> None:
    """xLSTM in bfloat16, for one: transformers' own dense model fails."""
    model = tiny_model("llama").to(torch.bfloat16)
    model.model.norm.weight.data = torch.ones(61, dtype=torch.bfloat16)
    windows = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(
        ModelError, match=r"^LlamaForCausalLM fails in a forward pass in bfloat16: RuntimeError: "
    ) as told:
        interleaved_perplexity({"dense": model}, windows)
    assert str(told.value.hint).startswith("try --dtype float32; ")
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), ModelError("ours")):
        with pytest.raises(type(error)) as passed, forward_errors(model):
            raise error
        assert passed.value is error
