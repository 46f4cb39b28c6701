"""Compressed checkpoints of every family: written, loaded in three ways, saved again, multiplied back, refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import ara
from ara.decomposition.plain import Plain
from ara.errors import ModelError, NumericalError
from ara.layouts.modeling_ara import AraConfig, CompressedLinear, LowRankLinear, PivotedLinear, replace_linear
from ara.models.accounting import parameter_count, weight_bytes
from ara.models.checkpoint import (
    check_loads,
    checkpoint_bytes,
    load,
    quantization_of,
    read_config,
    save_checkpoint,
)
from ara.models.low_rank import apply_factors, low_rank_layers
from ara.models.weights import LinearSpec, WeightRef, bias_of, find_linears
from tests.tiny import FAMILIES, VOCABULARY, tiny_model, tiny_tokenizer

_REPOSITORY = Path(__file__).resolve().parents[3]
_TIED = {"gemma", "opt", "gpt2"}
_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "modeling_ara.py",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


# Some families with pivoted layers as well: with and without biases, grouped queries, Conv1D, tied embeddings.
VARIANTS = [*FAMILIES, "llama-pivoted", "gpt2-pivoted", "qwen2-pivoted"]


def _layout(variant: str) -> Literal["factors", "pivoted"]:
    return "pivoted" if variant.endswith("-pivoted") else "factors"


def _dense(variant: str) -> PreTrainedModel:
    return tiny_model(variant.partition("-")[0])


def _ids() -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(5))


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=_ids()).logits


def _factor_file(model: PreTrainedModel, linears: list[LinearSpec], path: Path) -> dict[str, Path]:
    tensors = {}
    for spec in linears:
        factors = Plain().decompose(spec.weight.read(model), None)
        tensors[f"{spec.name}.A"] = factors.a.float().contiguous()
        tensors[f"{spec.name}.B"] = factors.b.float().contiguous()
    save_file(tensors, path)
    return {spec.name: path for spec in linears}


def _half_ranks(linears: list[LinearSpec]) -> dict[str, int]:
    """Return half of the full rank, one more for every further layer, and leave one layer of the first block dense."""
    return {spec.name: spec.full_rank // 2 - spec.layer for spec in linears if spec.name != linears[1].name}


def _compressed(
    family: str, folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, dict[str, int]]:
    """Return a model with low-rank layers, and its ranks; its factors lie beside ``folder``."""
    model = _dense(family)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32 when a model is loaded
        parameter.data = parameter.data.to(dtype)
    linears = find_linears(model)
    ranks = _half_ranks(linears)
    folder.parent.mkdir(parents=True, exist_ok=True)
    files = _factor_file(model, linears, folder.with_suffix(".factors.safetensors"))
    apply_factors(model, ranks, files, _layout(family))
    return model, ranks


def _save(model: PreTrainedModel, folder: Path, ranks: dict[str, int], **options: Any) -> Path:
    pivoted = any(isinstance(module, PivotedLinear) for module in model.modules())
    save_checkpoint(
        model,
        tiny_tokenizer(),
        folder,
        ranks=ranks,
        provenance={"made": "here"},
        layout="pivoted" if pivoted else "factors",
        **options,
    )
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one checkpoint per family, and the in-memory models' logits beside them."""
    root = tmp_path_factory.mktemp("checkpoints")
    expected = {}
    for family in VARIANTS:
        model, ranks = _compressed(family, root / family)
        expected[family] = _logits(model)
        _save(model, root / family, ranks)
    save_file({"ids": _ids(), **expected}, root / "expected.safetensors")
    return root


def _copy(checkpoints: Path, family: str, to: Path, **quantization: Any) -> Path:
    """Copy a checkpoint, with other values in its ``quantization_config``."""
    folder = to / family
    shutil.copytree(checkpoints / family, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# -- factors into a model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_factors_puts_the_first_components_in_place(family: str, tmp_path: Path) -> None:
    dense = _dense(family)
    model, ranks = _compressed(family, tmp_path / family)
    assert low_rank_layers(model) == ranks
    with safe_open(tmp_path / f"{family}.factors.safetensors", "pt") as file:
        for name, rank in ranks.items():
            layer, original, weight = model.get_submodule(name), dense.get_submodule(name), WeightRef(name).read(dense)
            assert isinstance(layer, LowRankLinear)
            assert layer.rank == rank
            assert (layer.out_features, layer.in_features) == weight.shape
            assert torch.equal(layer.A.weight, file.get_tensor(f"{name}.A")[:rank])
            assert torch.equal(layer.B.weight, file.get_tensor(f"{name}.B")[:, :rank])
            u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
            torch.testing.assert_close(layer.weight.double(), (u * s)[:, :rank] @ vt[:rank], rtol=0, atol=1e-5)
            if bias_of(original) is None:
                assert layer.bias is None
            else:
                assert layer.bias is not None and torch.equal(layer.bias, original.bias)
    untouched = {name: p for name, p in dense.named_parameters() if not any(name.startswith(f"{n}.") for n in ranks)}
    assert all(torch.equal(model.get_parameter(name), p) for name, p in untouched.items())
    saved = sum((d.m * d.n - ranks[d.name] * (d.m + d.n)) for d in find_linears(dense) if d.name in ranks)
    assert parameter_count(dense) - parameter_count(model) == saved > 0


@pytest.mark.parametrize("family", VARIANTS)
def test_full_rank_gives_the_dense_logits(family: str, tmp_path: Path) -> None:
    model = _dense(family)
    expected = _logits(model)
    linears = find_linears(model)
    files = _factor_file(model, linears, tmp_path / "factors.safetensors")
    apply_factors(model, {spec.name: spec.full_rank for spec in linears}, files)
    torch.testing.assert_close(_logits(model), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", [name for name in VARIANTS if name not in FAMILIES])
def test_pivoted_and_factors_are_the_same_function(family: str, tmp_path: Path) -> None:
    pivoted, ranks = _compressed(family, tmp_path / "pivoted")
    factors, _ = _compressed(family.partition("-")[0], tmp_path / "factors")
    assert low_rank_layers(pivoted) == low_rank_layers(factors) == ranks
    torch.testing.assert_close(_logits(pivoted), _logits(factors), rtol=1e-3, atol=1e-3)
    assert parameter_count(pivoted) == parameter_count(factors) - sum(rank**2 for rank in ranks.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pivots_are_rounded_once_to_the_dtype_of_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """Factors lie in bfloat16 as a rule; a float32 model must not see that rounding twice."""
    model = tiny_model("llama").to(dtype)
    linears = find_linears(model)
    path = _factor_file(model.float(), linears, tmp_path / "f.safetensors")[linears[0].name]
    halves = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(halves, path)
    model = model.to(dtype)
    spec = linears[0]
    apply_factors(model, {spec.name: 20}, {spec.name: path}, "pivoted")
    layer = model.get_submodule(spec.name)
    exact = halves[f"{spec.name}.B"][:, :20].double() @ halves[f"{spec.name}.A"][:20].double()
    assert layer.A.weight.dtype == dtype
    off = (layer.weight.double() - exact).norm() / exact.norm()
    assert off < (1e-6 if dtype == torch.float32 else 0.02)


# -- three ways of loading --------------------------------------------------------------------------------------

_WITHOUT_ARA = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ara", "ara_cli", "export"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
"""
_SCRIPT = """
import json, sys
root, out, way = sys.argv[1:]
if way == "without ara":
    import transformers
elif way == "ara first":
    import ara, transformers
else:
    import transformers, transformers.quantizers.auto, ara
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
expected = load_file(root + "/expected.safetensors")
ids, logits, facts = expected.pop("ids"), {}, {}
def read(model):
    with torch.no_grad():
        return model(input_ids=ids).logits
for family in expected if way == "without ara" else ():
    try:
        transformers.AutoModelForCausalLM.from_pretrained(root + "/" + family, trust_remote_code=False)
        facts[family] = "loaded"
    except Exception as error:
        facts[family] = type(error).__name__
for family in expected:
    folder = root + "/" + family
    options = {"trust_remote_code": True} if way == "without ara" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not model.training
    logits[family] = read(model)
    if way == "ara first":
        logits[family + " by ara.load"] = read(ara.load(folder))
    else:
        again = out + "-again/" + family
        model.save_pretrained(again)
        if way == "without ara":
            logits[family + " again"] = read(transformers.AutoModelForCausalLM.from_pretrained(again))
save_file(logits, out + ".safetensors")
print(json.dumps({"facts": facts, "ara": "ara" in sys.modules}))
"""


def _run(checkpoints: Path, out: Path, way: str) -> dict[str, Any]:
    """Load all families in a fresh process; returns what it said and the logits."""
    facts = _said(_SCRIPT, str(checkpoints), str(out), way, home=out.parent, with_ara=way != "without ara")
    return {**facts, "logits": load_file(f"{out}.safetensors")}


def _said(script: str, *arguments: str, home: Path, with_ara: bool) -> dict[str, Any]:
    """Run a script in a fresh process in the folder ``home``; returns the JSON object of its last line."""
    home.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if with_ara:
        environment["PYTHONPATH"] = str(_REPOSITORY)
    done = subprocess.run(
        [sys.executable, "-c", script if with_ara else _WITHOUT_ARA + script, *arguments],
        capture_output=True,
        text=True,
        cwd=home,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def _different(checkpoints: Path, logits: dict[str, torch.Tensor]) -> list[str]:
    """Return the keys of ``logits`` that are not bit for bit those of the model in memory."""
    expected = load_file(checkpoints / "expected.safetensors")
    return [key for key, value in logits.items() if not torch.equal(value, expected[key.split()[0]])]


def test_after_import_ara_and_by_ara_load(checkpoints: Path, tmp_path: Path) -> None:
    done = _run(checkpoints, tmp_path / "out", "ara first")
    assert set(done["logits"]) == {*VARIANTS, *(f"{family} by ara.load" for family in VARIANTS)}
    assert _different(checkpoints, done["logits"]) == []


def test_with_transformers_imported_before_ara(checkpoints: Path, tmp_path: Path) -> None:
    done = _run(checkpoints, tmp_path / "out", "transformers first")
    assert set(done["logits"]) == set(VARIANTS)
    assert _different(checkpoints, done["logits"]) == []


def test_without_ara_by_the_code_in_the_checkpoint_and_not_without_it(checkpoints: Path, tmp_path: Path) -> None:
    done = _run(checkpoints, tmp_path / "out", "without ara")
    assert done["ara"] is False
    assert set(done["logits"]) == {*VARIANTS, *(f"{family} again" for family in VARIANTS)}
    assert _different(checkpoints, done["logits"]) == []
    # All were tried before with neither ara nor its code: an error, never random weights.
    assert set(done["facts"]) == set(VARIANTS)
    assert [family for family, outcome in done["facts"].items() if outcome == "loaded"] == []


def test_a_reader_ignorant_of_ara_fails_for_every_family(checkpoints: Path, tmp_path: Path) -> None:
    """Drop the quantization_config, as such a reader does: the empty guard tensor must stop the loading."""
    for family in VARIANTS:
        folder = tmp_path / family
        shutil.copytree(checkpoints / family, folder)
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"], config["auto_map"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(RuntimeError, match=r"mismatch"):
            AutoModelForCausalLM.from_pretrained(folder)


# -- saved again ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", VARIANTS)
def test_loaded_saved_and_loaded_again(family: str, checkpoints: Path, tmp_path: Path) -> None:
    model = load(checkpoints / family, device="cpu")
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", device="cpu")
    assert torch.equal(_logits(again), load_file(checkpoints / "expected.safetensors")[family])
    assert low_rank_layers(again) == low_rank_layers(model)
    config = read_config(tmp_path / "again")
    assert "auto_map" not in config  # its code file is not there
    assert config["quantization_config"] == read_config(checkpoints / family)["quantization_config"]
    stored = [load_file(folder / "model.safetensors") for folder in (checkpoints / family, tmp_path / "again")]
    assert set(stored[0]) == set(stored[1])
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])


@pytest.mark.parametrize("family", VARIANTS)
def test_dequantize_gives_an_ordinary_dense_model(family: str, checkpoints: Path, tmp_path: Path) -> None:
    model = load(checkpoints / family, device="cpu")
    products = {n: m.weight.clone() for n, m in model.named_modules() if isinstance(m, CompressedLinear)}
    assert products
    dense = model.dequantize()
    assert low_rank_layers(dense) == {}
    kind = Conv1D if family.startswith("gpt2") else nn.Linear
    for name, product in products.items():
        layer = dense.get_submodule(name)
        assert isinstance(layer, kind)
        torch.testing.assert_close(WeightRef(name).read(dense), product)
    expected = load_file(checkpoints / "expected.safetensors")[family]
    torch.testing.assert_close(_logits(dense), expected, rtol=1e-3, atol=1e-3)
    dense.save_pretrained(tmp_path / "dense")
    config = read_config(tmp_path / "dense")
    assert "quantization_config" not in config and "auto_map" not in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(again) is type(_dense(family))
    assert torch.equal(_logits(again), _logits(dense))
    assert parameter_count(again) == parameter_count(_dense(family))


@pytest.mark.parametrize("family", VARIANTS)
def test_a_dense_checkpoint_is_an_ordinary_one(family: str, tmp_path: Path) -> None:
    model, ranks = _compressed(family, tmp_path / family)
    expected = _logits(model)
    folder = _save(model, tmp_path / "dense", ranks, dense=True)
    assert {path.name for path in folder.iterdir()} == _FILES - {"modeling_ara.py"}
    config = read_config(folder)
    assert "quantization_config" not in config and "auto_map" not in config
    assert not quantization_of(folder, read_config(folder))
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    ordinary = tmp_path / "ordinary"
    _dense(family).save_pretrained(ordinary)
    with safe_open(ordinary / "model.safetensors", "pt") as file:
        assert shapes == {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    torch.testing.assert_close(_logits(load(folder, device="cpu")), expected, rtol=1e-3, atol=1e-3)


def test_nothing_low_rank_is_an_ordinary_checkpoint_too(tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = _save(model, tmp_path / "all-dense", {})
    assert {path.name for path in folder.iterdir()} == _FILES - {"modeling_ara.py"}
    assert not quantization_of(folder, read_config(folder))
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(folder)), _logits(model))


# -- what lies on the disk --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", VARIANTS)
def test_the_folder_holds_exactly_what_it_should(family: str, checkpoints: Path) -> None:
    folder = checkpoints / family
    assert {path.name for path in folder.iterdir()} == _FILES  # nothing pickled among them
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    code = _REPOSITORY / "ara" / "layouts" / "modeling_ara.py"
    assert (folder / "modeling_ara.py").read_bytes() == code.read_bytes()
    config = read_config(folder)
    assert config["architectures"] == [type(_dense(family)).__name__]
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_ara.AraForCausalLM"}
    assert config["dtype"] == "float32"
    model = _dense(family)
    assert config["quantization_config"] == {
        "quant_method": "ara",
        "format_version": 2 if _layout(family) == "pivoted" else 1,
        "layout": _layout(family),
        "ranks": _half_ranks(find_linears(model)),
        "provenance": {"made": "here"},
    }
    assert quantization_of(folder, read_config(folder))["quant_method"] == "ara"


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_is_what_the_ranks_say(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, ranks = _compressed(family, tmp_path / family, dtype)
    dense = _dense(family)
    linears = {spec.name: spec for spec in find_linears(dense)}
    parameters, indices = parameter_count(dense), 0
    for name, rank in ranks.items():
        m, n = linears[name].m, linears[name].n
        if _layout(family) == "pivoted":
            parameters += rank * n + (m - rank) * rank - m * n
            indices += m
        else:
            parameters += rank * (m + n) - m * n
    assert parameter_count(model) == parameters
    assert weight_bytes(model) == parameters * dtype.itemsize + indices * 4
    folder = _save(model, tmp_path / "out", ranks)
    path = folder / "model.safetensors"
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert path.stat().st_size == 8 + header + parameters * dtype.itemsize + indices * 4
    assert checkpoint_bytes(folder) == path.stat().st_size


@pytest.mark.parametrize("family", VARIANTS)
def test_tied_embeddings_stay_tied_and_are_stored_once(family: str, checkpoints: Path) -> None:
    keys = set(load_file(checkpoints / family / "model.safetensors"))
    tied = family.partition("-")[0] in _TIED
    assert ("lm_head.weight" in keys) is not tied
    model = load(checkpoints / family, device="cpu")
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) is tied
    stored = load_file(checkpoints / family / "model.safetensors")
    assert parameter_count(model) == sum(t.numel() for key, t in stored.items() if not key.endswith(".order"))


def test_large_checkpoints_are_split(tmp_path: Path) -> None:
    model, ranks = _compressed("llama", tmp_path / "llama")
    folder = _save(model, tmp_path / "out", ranks, max_shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert (folder / "model.safetensors.index.json").is_file()
    assert checkpoint_bytes(folder) == sum(path.stat().st_size for path in shards)
    assert torch.equal(_logits(load(folder, device="cpu")), _logits(model))


# -- ara.load ---------------------------------------------------------------------------------------------------


def test_load_takes_the_dtype_of_the_checkpoint_or_the_one_asked_for(tmp_path: Path) -> None:
    model, ranks = _compressed("qwen2", tmp_path / "qwen2", torch.bfloat16)
    folder = _save(model, tmp_path / "out", ranks)
    loaded = ara.load(folder, device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(_logits(loaded), _logits(model))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert {p.dtype for p in load(str(folder), "cpu", "float32").parameters()} == {torch.float32}


@pytest.mark.parametrize("family", VARIANTS)
def test_generate_works_and_agrees_with_and_without_cache(family: str, checkpoints: Path) -> None:
    model = load(checkpoints / family, device="cpu")
    prompt = _ids()[:1, :5]
    texts = [
        model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert texts[0].shape == (1, 11)
    assert torch.equal(texts[0][:, :5], prompt)
    assert torch.equal(texts[0], texts[1])


# -- damaged or too new -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [7, 99, "1", None])
def test_a_newer_format_is_refused(version: object, checkpoints: Path, tmp_path: Path) -> None:
    folder = _copy(checkpoints, "llama", tmp_path, format_version=version)
    with pytest.raises(ModelError, match=rf"ARA format {version!r}; this code reads up to 6: update ara-svd"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"layout": "columns"}),
        ("llama-pivoted", {"layout": "columns"}),
        ("llama-pivoted", {"format_version": 1}),
        ("llama-pivoted", {"layout": None}),
        ("llama-pivoted", {"layout": ["pivoted"]}),
    ],
)
def test_a_layout_that_the_format_has_not_is_refused(
    family: str, change: dict[str, Any], checkpoints: Path, tmp_path: Path
) -> None:
    folder = _copy(checkpoints, family, tmp_path, **change)
    with pytest.raises(ModelError, match=r"layout must be one of those of ARA format [12] \(factors"):
        load(folder, device="cpu")


@pytest.mark.parametrize("wrong", [-1, 10**6, 0])
def test_an_order_that_is_no_permutation_is_refused(wrong: int, checkpoints: Path, tmp_path: Path) -> None:
    folder = _copy(checkpoints, "llama-pivoted", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    order = tensors["model.layers.1.mlp.up_proj.order"]
    order[int(order.argmax())] = wrong
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.order is not a permutation of 0 … \d+"):
        load(folder, device="cpu")


@pytest.mark.parametrize("rank", [0, -1, True, "x", 2.5, None])
def test_ranks_that_cannot_be_are_refused(rank: object, checkpoints: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    folder = _copy(checkpoints, "llama", tmp_path, ranks={name: rank})
    with pytest.raises(ModelError) as caught:
        load(folder, device="cpu")
    assert f"ranks[{name!r}] must be a whole number of at least 1, got {rank!r}" in str(caught.value)
    assert str(folder) in str(caught.value)
    with pytest.raises(ValueError, match="whole number"):
        AraConfig(ranks={name: rank})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.0.self_attn.nope", "nothing"),
        ("model.layers.7.self_attn.q_proj", "nothing"),
        ("model.norm", "LlamaRMSNorm"),
        ("model.embed_tokens", "Embedding"),
    ],
)
def test_a_rank_of_an_unknown_module_is_refused(name: str, found: str, checkpoints: Path, tmp_path: Path) -> None:
    ranks = read_config(checkpoints / "llama")["quantization_config"]["ranks"]
    folder = _copy(checkpoints, "llama", tmp_path, ranks={**ranks, name: 3})
    with pytest.raises(ModelError, match=f"compresses '{name}', but LlamaForCausalLM has {found} there"):
        load(folder, device="cpu")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_rank_other_than_the_stored_one_is_refused(change: int, checkpoints: Path, tmp_path: Path) -> None:
    ranks = dict(read_config(checkpoints / "llama")["quantization_config"]["ranks"])
    ranks["model.layers.1.mlp.up_proj"] += change
    folder = _copy(checkpoints, "llama", tmp_path, ranks=ranks)
    expected = 29 + change
    with pytest.raises(
        ModelError,
        match=rf"cannot be loaded: the checkpoint has model\.layers\.1\.mlp\.up_proj\.A\.weight of shape \[29, 60\], "
        rf"its config asks for \[{expected}, 60\] \(2 tensors differ\)",
    ):
        load(folder, device="cpu")


_REFUSED = """
import io, json, logging, sys
root, way = sys.argv[1:]
if way == "ara":
    import ara
import transformers
from pathlib import Path
transformers.logging.set_verbosity_warning()
outcomes = {}
for config in Path(root).glob("*/*/config.json"):
    log = io.StringIO()
    transformers.logging.add_handler(logging.StreamHandler(log))
    try:
        transformers.AutoModelForCausalLM.from_pretrained(config.parent, trust_remote_code=way == "code")
        outcomes[config.parts[-3]] = "loaded"
    except (RuntimeError, ValueError) as error:
        outcomes[config.parts[-3]] = f"refused: {error} {log.getvalue()}"
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("way", ["ara", "code"])
def test_tensors_of_another_shape_are_refused_by_from_pretrained(way: str, checkpoints: Path, tmp_path: Path) -> None:
    """transformers before 5.20 reports none in a model that has a quantizer."""
    cases = {
        "factor": ("llama", "model.layers.1.mlp.up_proj.A.weight"),
        "order": ("llama-pivoted", "model.layers.1.mlp.up_proj.order"),
        "dense": ("llama", "model.norm.weight"),
        "tied": ("gemma", "model.embed_tokens.weight"),
    }
    for case, (family, name) in cases.items():
        folder = _copy(checkpoints, family, tmp_path / "at" / case)
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name][:-1].contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _copy(checkpoints, "llama", tmp_path / "at" / "intact")
    outcomes = _said(_REFUSED, str(tmp_path / "at"), way, home=tmp_path / "run", with_ara=way == "ara")
    assert outcomes.pop("intact") == "loaded"
    assert set(outcomes) == set(cases)
    unnamed = {case: outcomes[case] for case, (_, name) in cases.items() if name not in outcomes[case]}
    assert unnamed == {}


def test_the_quantizer_compares_shapes_with_any_transformers(checkpoints: Path) -> None:
    model = load(checkpoints / "llama", device="cpu")
    model.model.norm.weight = nn.Parameter(torch.ones(59))
    model.model.layers[0].mlp.up_proj.B.weight = nn.Parameter(torch.ones(92, 3))
    expected = r"up_proj\.B\.weight of shape \[92, 3\], its config asks for \[92, 30\] \(2 tensors differ\)"
    with pytest.raises(ValueError, match=expected):
        model.hf_quantizer.postprocess_model(model)


def test_a_rank_that_is_missing_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    """The layer would be left dense, with random weights."""
    ranks = dict(read_config(checkpoints / "llama")["quantization_config"]["ranks"])
    del ranks["model.layers.1.mlp.up_proj"]
    folder = _copy(checkpoints, "llama", tmp_path, ranks=ranks)
    with pytest.raises(ModelError, match=r"lacks 1 of .*mlp\.up_proj\.weight\), and holds .*up_proj\.A\.weight"):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    ("key", "value"),
    [("ranks", [3]), ("ranks", "all"), ("ranks", 7), ("provenance", ["x"]), ("layout", ["factors"]), ("layout", 1)],
)
def test_entries_of_another_type_are_refused(key: str, value: object, checkpoints: Path, tmp_path: Path) -> None:
    folder = _copy(checkpoints, "llama", tmp_path, **{key: value})
    with pytest.raises(ModelError, match=f"cannot be loaded: quantization_config.{key} must be") as caught:
        load(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_quantisation_that_is_no_object_and_a_config_that_fits_no_model(checkpoints: Path, tmp_path: Path) -> None:
    folder = _copy(checkpoints, "llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": ["ara"]}))
    with pytest.raises(ModelError, match="quantization_config is a list, expected an object"):
        quantization_of(folder, read_config(folder))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder, device="cpu")
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 7}))
    with pytest.raises(ModelError, match=r"cannot be loaded: The hidden size \(60\) is not a multiple"):
        load(folder, device="cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_is_seen_to_load_without_memory_for_it(variant: str, checkpoints: Path, tmp_path: Path) -> None:
    check_loads(checkpoints / variant)


def test_what_does_not_load_is_seen_without_memory_too(checkpoints: Path, tmp_path: Path) -> None:
    folder = _copy(checkpoints, "llama-pivoted", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.order"] = tensors["model.layers.1.mlp.up_proj.order"][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.order of shape \[91\], its config asks for \[92\]"):
        check_loads(folder)


def test_layers_of_a_family_that_fills_new_layers_its_own_way(tmp_path: Path) -> None:
    """xLSTM writes into the bias of every linear layer with a certain name, and a factor has none."""
    config = AutoConfig.for_model(
        "xlstm", vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_heads=4, qk_dim_factor=1.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    linears = find_linears(model)
    ranks = _half_ranks(linears)
    apply_factors(model, ranks, _factor_file(model, linears, tmp_path / "factors.safetensors"))
    expected = _logits(model)
    loaded = load(_save(model, tmp_path / "xlstm", ranks), device="cpu")
    assert torch.equal(_logits(loaded), expected)


def test_factors_that_the_dtype_does_not_hold_are_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    spec = find_linears(model)[0]
    files = _factor_file(model, [spec], tmp_path / "factors.safetensors")
    save_file({name: 1e6 * tensor for name, tensor in load_file(files[spec.name]).items()}, files[spec.name])
    with pytest.raises(NumericalError, match=rf"factors of {spec.name} exceed the range of float16"):
        apply_factors(model.half(), {spec.name: 3}, files)


def test_missing_factors_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    folder = _copy(checkpoints, "llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.A.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors: .*up_proj\.A\.weight$"):
        load(folder, device="cpu")


def test_folders_that_are_no_checkpoints(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a checkpoint folder"):
        load(tmp_path / "none")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json holds a JSON list"):
        load(tmp_path)
    folder = _copy(checkpoints, "llama", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder, device="cpu")
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      garbage")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder, device="cpu")


def test_replace_linear_reaches_nested_and_outermost_modules() -> None:
    model = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(3, 5)]), "b": nn.Linear(3, 5)})
    for name in ("a.0", "b"):
        layer = LowRankLinear(3, 5, 2, bias=False)
        replace_linear(model, name, layer)
        assert model.get_submodule(name) is layer
