"""From what the user typed to a model: order, identity, loading, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as transformers_logging

from ara.errors import ModelError, UnsupportedModelError, UsageError
from ara.models import sources
from ara.models.sources import resolve
from tests.recorder import Recorder
from tests.tiny import FAMILIES, save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny", "llama", seed=2)


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_as_saved(tmp_path: Path, family: str) -> None:
    source = resolve(str(save_tiny(tmp_path / family, family, seed=2)))
    model, expected = source.load_model(torch.float32), tiny_model(family, seed=2)
    assert source.identity.architecture == type(model).__name__
    assert source.config.model_type == model.config.model_type
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    loaded = model.state_dict()
    assert loaded.keys() == expected.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.state_dict().items())


def test_folder_identity_and_dtype(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    source = resolve("tiny")
    identity = source.identity
    assert (identity.requested, identity.kind, identity.location) == ("tiny", "folder", str(folder.resolve()))
    assert (identity.revision, identity.architecture) == (None, "LlamaForCausalLM")
    assert identity.fingerprint == resolve(str(folder)).identity.fingerprint
    assert {p.dtype for p in source.load_model(torch.bfloat16).parameters()} == {torch.bfloat16}
    text = "naïve\n\ttext 🙂"
    assert source.load_tokenizer()(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


def test_loading_says_nothing_and_restores_the_voice_of_transformers(folder: Path, capfd) -> None:
    transformers_logging.set_verbosity_info()
    try:
        source = resolve(str(folder))
        source.load_model(torch.float32)
        source.load_tokenizer()
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


def test_sharded_weights_load_and_a_lost_shard_is_named(tmp_path: Path) -> None:
    model = tiny_model("mistral", seed=1)
    model.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 1
    loaded = resolve(str(tmp_path / "m")).load_model(torch.float32)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of {len(shards)} weight files: {shards[1].name}"):
        resolve(str(tmp_path / "m"))


def test_a_missing_tensor_is_an_error_not_a_random_one(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        resolve(str(folder)).load_model(torch.float32)


def test_damaged_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"tiny/model\.safetensors is damaged") as caught:
        resolve(str(folder)).load_model(torch.float32)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused_with_the_way_to_convert(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model\.bin\)") as caught:
        resolve(str(folder))
    assert "save_pretrained" in str(caught.value.hint)


def test_no_weights_no_config_no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match=r"the tokenizer of .*tiny cannot be loaded") as caught:
        resolve(str(folder)).load_tokenizer()
    assert "tokenizer.json" in str(caught.value.hint)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights: .*it holds config\.json, generation_config\.json"):
        resolve(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"is not a model: .*it holds generation_config\.json"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is not JSON"), ("[1]", "holds a JSON list, expected an object"), ("", "is not JSON")],
    ids=["cut", "list", "empty"],
)
def test_broken_config(folder: Path, content: str, words: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=rf"config\.json {words}"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "ara"}}, "already compressed by ARA"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"already quantised \(bitsandbytes\)"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is an encoder-decoder model"),
        ({"model_type": "llama9"}, "does not know the model_type 'llama9'"),
        ({"model_type": None}, "does not know the model_type None"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "c.C"}}, "brings its own model code"),
    ],
    ids=["ara", "quantised", "t5", "new", "none", "remote-code"],
)
def test_unsuitable_folders(folder: Path, changes: dict[str, Any], words: str) -> None:
    _edit_config(folder, **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        resolve(str(folder))


def test_code_in_the_folder_never_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))
    (folder / "mine.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(folder / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    maps = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    _edit_config(folder, model_type="mine", architectures=["MineForCausalLM"], auto_map=maps)
    with pytest.raises(UnsupportedModelError, match="own model code"):
        resolve(str(folder))
    assert not (folder / "ran").exists()
    # A known model_type is loaded by transformers' own class, whatever else the config names.
    _edit_config(folder, model_type="llama")
    assert type(resolve(str(folder)).load_model(torch.float32)).__module__.startswith("transformers.")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("lama2-7b", "unknown model 'lama2-7b': did you mean llama2-7b"),
        ("", "unknown model ''"),
        ("zzzz", "unknown model 'zzzz': it is neither"),
        ("./missing", "missing does not exist"),
        ("~/no/such/folder", "does not exist, nor does"),
        ("/no/such/model.gguf", "does not exist"),
        ("model.gguf", r"model\.gguf does not exist"),
        ("a/b/c", "a/b/c does not exist"),
        ("a" * 5000, "unknown model 'a{100}': it is neither"),
        ("./" + "a" * 5000, "does not exist"),
    ],
)
def test_what_names_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=words) as caught:
        resolve(word)
    assert "ara models" in str(caught.value.hint)


@pytest.mark.parametrize("word", ["~nobody.at.all/model", "a\0b"])
def test_what_can_be_no_path(word: str) -> None:
    with pytest.raises(UsageError, match=r"^model '.*' cannot be used: "):
        resolve(word)


def test_a_file_that_is_no_gguf(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"is a file, expected a folder or a \.gguf file"):
        resolve(str(folder / "config.json"))


def test_a_revision_needs_the_hub(folder: Path) -> None:
    for model in (str(folder), "demo"):
        with pytest.raises(UsageError, match="is not on the hub"):
            resolve(model, revision="main")


def test_an_alias_wins_over_a_folder_and_says_so(
    folder: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.rename(folder.parent / "llama2-7b")
    monkeypatch.chdir(folder.parent)
    asked: list[str] = []

    def fail(repository: str, revision: str | None) -> None:
        asked.append(repository)
        raise ModelError("no network in tests")

    monkeypatch.setattr(sources, "read_hub_config", fail)
    with pytest.raises(ModelError, match="no network in tests"):
        resolve("llama2-7b", report=recorder)
    assert asked == ["meta-llama/Llama-2-7b-hf"]
    assert recorder.told == [
        ("warn", "llama2-7b is an alias; write ./llama2-7b for the folder of that name"),
        ("step", "Looking up meta-llama/Llama-2-7b-hf"),
    ]
    assert resolve("./llama2-7b").identity.kind == "folder"
