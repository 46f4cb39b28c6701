"""Configs with values of the wrong type, and for models that are not there: one line, at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ara.errors import AraError, ModelError, UnsupportedModelError
from ara.models.config_check import check_sizes
from ara.models.hub import read_hub_config
from ara.models.sources import resolve
from tests.families.configs import tiny_config

Change = Callable[..., AraError]


@pytest.fixture
def refused(tiny_llama: Path, tmp_path: Path) -> Change:
    """Return a function that changes the config of a copy and returns how it is refused."""

    def change(content: str | None = None, file: str = "config.json", **values: Any) -> AraError:
        folder = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
        path = folder / file
        if content is None:
            content = json.dumps(json.loads(path.read_text()) | values)
        path.write_text(content)
        with pytest.raises(AraError) as caught:
            resolve(str(folder))
        assert len(str(caught.value).splitlines()) == 1
        assert caught.value.hint
        return caught.value

    return change


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("architectures", "LlamaForCausalLM", "architectures is 'LlamaForCausalLM', expected a list of names"),
        ("architectures", [7], r"architectures is \[7\], expected a list of names"),
        ("architectures", 3, "architectures is 3, expected a list of names"),
        ("auto_map", ["x"], r"auto_map is \['x'\], expected an object"),
        ("dtype", "nonsense", "dtype is 'nonsense', expected the name of a type"),
        ("dtype", ["float32"], "expected the name of a type"),
        ("head_dim", -1, "says head_dim -1"),
        ("hidden_size", [60], r"hidden_size.*expected int, got list"),
        ("hidden_size", None, r"hidden_size.*expected int, got NoneType"),
        ("hidden_size", 60 * 10**10, r"says num_attention_heads 6 and hidden_size 600000000000, but its weights have"),
        ("intermediate_size", 10**12, "says intermediate_size 1000000000000"),
        ("model_type", ["llama"], r"model_type is \['llama'\], expected a name"),
        ("model_type", None, "does not know the model_type None"),
        ("num_attention_heads", 7, "multiple of the number of attention heads"),
        ("num_hidden_layers", "3", r"num_hidden_layers.*expected int, got str"),
        ("num_hidden_layers", -1, "says num_hidden_layers -1, but its weights have 3 layers"),
        ("num_hidden_layers", 0, "says num_hidden_layers 0, but its weights have 3 layers"),
        ("num_hidden_layers", 4, "says num_hidden_layers 4, but its weights have 3 layers"),
        ("num_hidden_layers", 10_000_000, "says num_hidden_layers 10000000; the limit is 10,000"),
        ("num_labels", 10**9, "says num_labels 1000000000; the limit is 100,000"),
        ("num_labels", 1e300, "says num_labels 1e[+]300; the limit"),
        ("quantization_config", 0, "quantization_config is 0, expected an object"),
        ("rope_parameters", [1], r"rope_parameters.*with value \[1\]"),
        ("text_config", {"num_hidden_layers": 10**12}, "says num_hidden_layers 1000000000000"),
        ("transformers_weights", "other.safetensors", "transformers_weights is 'other.safetensors'"),
        ("vocab_size", 10**12, "says vocab_size 1000000000000 and hidden_size 60, but its weights have"),
        ("vocab_size", 0, "vocab_size is 0, expected a positive integer"),
    ],
)
def test_values_that_cannot_be(key: str, value: Any, words: str, refused: Change) -> None:
    error = refused(**{key: value})
    with pytest.raises((ModelError, UnsupportedModelError), match=words):
        raise error


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000 + "]" * 100_000, "more than 64 levels"),
        ("", "is not JSON"),
        ("[]", "expected an object"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_files_that_are_not_objects(file: str, content: str, words: str, refused: Change) -> None:
    error = refused(content, file)
    assert words in str(error)
    assert file in str(error)


def test_an_adapter_is_not_applied_unseen(refused: Change) -> None:
    assert "holds an adapter in addition to the model" in str(refused("{}", "adapter_config.json"))


def test_the_hubs_config_is_read_by_the_same_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    path = tmp_path / "snapshots" / ("a" * 40) / "config.json"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **options: str(path))
    for content, words in (("[" * 100_000, "more than 64 levels"), ("[1]", "expected an object"), ("{", "is not JSON")):
        path.write_text(content)
        with pytest.raises(ModelError, match=words):
            read_hub_config("some/model", None)
    path.write_text('{"model_type": "llama"}')
    assert read_hub_config("some/model", None) == ({"model_type": "llama"}, "a" * 40)


def test_layers_with_a_head_dim_of_their_own_pass() -> None:
    check_sizes(tiny_config("gemma4_text"), {"model.layers.3.mlp.up_proj.weight": (76, 96)}, "it")


def test_layers_that_run_several_times_count_once() -> None:
    config = tiny_config("hrm_text")
    check_sizes(config, {"model.L_module.layers.1.mlp.up_proj.weight": (760, 96)}, "it")
    with pytest.raises(ModelError, match="says num_layers_per_stack 2, but its weights have 1 layers"):
        check_sizes(config, {"model.L_module.layers.0.mlp.up_proj.weight": (760, 96)}, "it")
