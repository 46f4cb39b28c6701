"""Checkpoints written tensor by tensor are those of the loaded model, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ara.decomposition.plain import Plain
from ara.errors import ModelError, NumericalError
from ara.layouts.modeling_ara import separate_experts
from ara.models.checkpoint import check_loads, save_checkpoint
from ara.models.cutting import save_cut
from ara.models.low_rank import apply_factors
from ara.models.sources import ModelSource, resolve
from ara.models.weights import LinearSpec, find_linears
from tests.recorder import Recorder
from tests.tiny import FAMILIES, MIXTURES, save_tiny, save_with_tokenizer, tiny_model, tiny_tokenizer

LAYOUTS = ("factors", "pivoted")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ModelSource, list[LinearSpec], Path]]:
    """Return a model, its layers and a file with their factors, by family."""
    root, found = tmp_path_factory.mktemp("sources"), {}
    for family in FAMILIES:
        source = resolve(str(save_tiny(root / family, family)))
        model, tensors = source.load_model(torch.float32), {}
        linears = find_linears(model)
        for spec in linears:
            factors = Plain().decompose(spec.weight.read(model), None)
            tensors |= {f"{spec.name}.A": factors.a.contiguous(), f"{spec.name}.B": factors.b.contiguous()}
        save_file(tensors, root / f"{family}.safetensors")
        found[family] = source, linears, root / f"{family}.safetensors"
    return found


def ranks_of(linears: list[LinearSpec]) -> dict[str, int]:
    """Return a rank for every layer but one."""
    return {spec.name: min(3 + i % 5, spec.full_rank) for i, spec in enumerate(linears) if i != 1}


def both(found: tuple[ModelSource, list[LinearSpec], Path], folder: Path, layout: Any, **how: Any) -> tuple[Path, Path]:
    """Write the checkpoint from files, and that of the loaded model."""
    source, linears, file = found
    ranks, files = ranks_of(linears), dict.fromkeys((spec.name for spec in linears), file)
    how = {"ranks": ranks, "layout": layout, "provenance": {"ara_version": "0"}, **how}
    stored = source.stored_model(BF16)
    assert stored.converted() is None
    save_cut(stored, tiny_tokenizer(), folder / "cut", files=files, **how)
    model = source.load_model(BF16)
    apply_factors(model, ranks, files, "factors" if how.get("dense") else layout)
    save_checkpoint(model, tiny_tokenizer(), folder / "whole", **how)
    return folder / "cut", folder / "whole"


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_files_are_those_of_the_loaded_model(sources: Any, family: str, layout: str, tmp_path: Path) -> None:
    cut, whole = both(sources[family], tmp_path, layout)
    assert contents(cut) == contents(whole)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma"])
def test_a_dense_checkpoint_is_that_of_the_loaded_model(sources: Any, family: str, tmp_path: Path) -> None:
    cut, whole = both(sources[family], tmp_path, "pivoted", dense=True)
    assert contents(cut) == contents(whole)


def test_a_checkpoint_in_several_files(sources: Any, tmp_path: Path) -> None:
    cut, whole = both(sources["gemma"], tmp_path, "pivoted", max_shard_size="20KB")
    tensors = {}
    for path in cut.glob("*.safetensors"):
        found = load_file(path)
        assert sum(tensor.nbytes for tensor in found.values()) <= 20_000 or len(found) == 1
        tensors |= found
    expected = {key: tensor for path in whole.glob("*.safetensors") for key, tensor in load_file(path).items()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in tensors)
    indexes = [json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (cut, whole)]
    assert indexes[0]["metadata"] == indexes[1]["metadata"]
    # Names and index as Hugging Face writes them.
    count = len(list(cut.glob("*.safetensors")))
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert sorted(path.name for path in cut.glob("*.safetensors")) == names
    assert indexes[0]["weight_map"] == {key: name for name in names for key in load_file(cut / name)}
    check_loads(cut)


def test_one_layer_is_built_at_a_time(sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of a layer are neighbours, so that each layer is built once."""
    import ara.models.cutting

    built: list[str] = []
    build = ara.models.cutting.build_layer

    def counted(file: safe_open, name: str, *arguments: Any, **more: Any) -> Any:
        built.append(name)
        return build(file, name, *arguments, **more)

    monkeypatch.setattr(ara.models.cutting, "build_layer", counted)
    source, linears, file = sources["phi"]
    files = dict.fromkeys((spec.name for spec in linears), file)
    how: dict[str, Any] = {"ranks": ranks_of(linears), "layout": "pivoted", "provenance": {}}
    save_cut(source.stored_model(BF16), tiny_tokenizer(), tmp_path, files=files, **how)
    assert sorted(built) == sorted(how["ranks"])


def test_weights_beyond_float16_are_refused(sources: Any, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    stored = resolve(str(folder)).stored_model(torch.float16)
    with pytest.raises(NumericalError, match=r"model\.norm\.weight of .* exceeds the range of float16 .* in 1 numbers"):
        save_cut(stored, tiny_tokenizer(), tmp_path / "cut", ranks={}, files={}, provenance={}, layout="factors")


def test_names_without_the_prefix_of_the_model_are_found(sources: Any, tmp_path: Path) -> None:
    source, linears, file = sources["gpt2"]
    folder = Path(shutil.copytree(source.identity.location, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    # As the first GPT-2 checkpoints of the hub name them.
    renamed = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    other = resolve(str(folder))
    cut, own = (
        both((one, linears, file), tmp_path / name, "factors")[0] for one, name in ((other, "a"), (source, "b"))
    )
    assert contents(cut) == contents(own)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_transformers_computes_weights_the_whole_model_is_loaded(
    sources: Any, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, linears, file = sources["llama"]
    report, stored = Recorder(), source.stored_model(BF16)
    why = "transformers converts weights of this family when it loads them"
    monkeypatch.setattr(stored, "converted", lambda separate: why)
    how: dict[str, Any] = {"ranks": ranks_of(linears), "layout": layout, "provenance": {}}
    files = dict.fromkeys((spec.name for spec in linears), file)
    found = save_cut(stored, tiny_tokenizer(), tmp_path / "cut", files=files, report=report, **how)
    assert f"{why}: the whole model is loaded" in report.facts
    assert save_cut(source.stored_model(BF16), tiny_tokenizer(), tmp_path / "own", files=files, **how) == found
    assert contents(tmp_path / "cut") == contents(tmp_path / "own")


@pytest.mark.parametrize("family", [*MIXTURES, "llama4_text"])
@pytest.mark.parametrize("form", ["of the hub", "of the model"])
@pytest.mark.parametrize("dense", [False, True], ids=["cut", "dense"])
def test_experts_are_read_one_by_one(family: str, form: str, dense: bool, tmp_path: Path) -> None:
    """From files that hold a tensor per expert, as on the hub, and from files that hold all in one."""
    model = tiny_model(family)
    if form == "of the model":
        model._weight_conversions = []  # written as they are in memory
    source = resolve(str(save_with_tokenizer(tmp_path / "model", model)))
    linears, tensors = find_linears(source.load_model(torch.float32)), {}
    separate_experts(model)
    for spec in linears:
        factors = Plain().decompose(spec.weight.read(model), None)
        tensors |= {f"{spec.name}.A": factors.a.contiguous(), f"{spec.name}.B": factors.b.contiguous()}
    save_file(tensors, tmp_path / "factors.safetensors")
    merged = source.stored_model(BF16).merged
    assert merged == (form == "of the hub" and family in ("mixtral", "qwen2_moe", "deepseek_v3"))
    cut, whole = both((source, linears, tmp_path / "factors.safetensors"), tmp_path, "factors", dense=dense)
    if dense:  # save_pretrained uses the hub's names
        ids = torch.arange(3, 40)[None]
        models = [
            AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager") for folder in (cut, whole)
        ]
        assert torch.equal(*(model(input_ids=ids).logits for model in models))
    else:
        one, other = load_file(cut / "model.safetensors"), load_file(whole / "model.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert (cut / "config.json").read_bytes() == (whole / "config.json").read_bytes()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    stored = resolve(str(folder)).stored_model(BF16)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match="is damaged"):
        stored.read("model.norm.weight")
