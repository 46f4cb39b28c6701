"""Which linear layers are found in each family, and which models are refused, with words that help."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ara.errors import UnsupportedModelError, UsageError
from ara.layouts.modeling_ara import LowRankLinear, replace_linear, separate_experts
from ara.models.weights import LinearSpec, WeightRef, bias_of, find_blocks, find_linears, left_dense, shared_layers
from tests.families.configs import tiny_config
from tests.tiny import FAMILIES, random_model, tiny_model

_WIDE = [
    ("self_attn.q_proj", 84, 60),
    ("self_attn.k_proj", 28, 60),
    ("self_attn.v_proj", 28, 60),
    ("self_attn.o_proj", 60, 84),
    ("mlp.gate_proj", 92, 60),
    ("mlp.up_proj", 92, 60),
    ("mlp.down_proj", 60, 92),
]
_NARROW = [
    ("self_attn.q_proj", 60, 60),
    ("self_attn.k_proj", 20, 60),
    ("self_attn.v_proj", 20, 60),
]
_MLP = _WIDE[4:]
_EXPECTED = {
    "llama": ("model.layers", _WIDE),
    "mistral": ("model.layers", _WIDE),
    "qwen2": ("model.layers", [*_NARROW, ("self_attn.o_proj", 60, 60), *_MLP]),
    "qwen3": ("model.layers", _WIDE),
    "gemma": ("model.layers", _WIDE),
    "phi3": (
        "model.layers",
        [
            ("self_attn.o_proj", 60, 60),
            ("self_attn.qkv_proj", 100, 60),
            ("mlp.gate_up_proj", 184, 60),
            ("mlp.down_proj", 60, 92),
        ],
    ),
    "phi": ("model.layers", [*_NARROW, ("self_attn.dense", 60, 60), ("mlp.fc1", 92, 60), ("mlp.fc2", 60, 92)]),
    "opt": (
        "model.decoder.layers",
        [
            ("self_attn.q_proj", 60, 60),
            ("self_attn.k_proj", 60, 60),
            ("self_attn.v_proj", 60, 60),
            ("self_attn.out_proj", 60, 60),
            ("fc1", 92, 60),
            ("fc2", 60, 92),
        ],
    ),
    "gpt2": (
        "transformer.h",
        [("attn.c_attn", 180, 60), ("attn.c_proj", 60, 60), ("mlp.c_fc", 92, 60), ("mlp.c_proj", 60, 92)],
    ),
}


class _Model(nn.Module):
    """Three blocks, an embedding and a head around them."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(12, 50)


def _block(**layers: nn.Module) -> nn.Module:
    return nn.ModuleDict(layers)


# -- what is found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_of_all_blocks_are_found(family: str) -> None:
    prefix, kinds = _EXPECTED[family]
    linears = find_linears(tiny_model(family))
    found = {(s.name, s.layer, s.kind, s.m, s.n) for s in linears}
    assert found == {(f"{prefix}.{layer}.{kind}", layer, kind, m, n) for layer in range(3) for kind, m, n in kinds}
    assert len(linears) == len(found)
    assert [spec.layer for spec in linears] == sorted(spec.layer for spec in linears)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_out_by_in_and_biases_kept(family: str) -> None:
    model = tiny_model(family)
    for spec in find_linears(model):
        module = model.get_submodule(spec.name)
        weight, bias = spec.weight.read(model), bias_of(module)
        assert weight.shape == (spec.m, spec.n) and not weight.requires_grad
        assert weight.data_ptr() == module.weight.data_ptr()  # a view
        x = torch.randn(4, spec.n, generator=torch.Generator().manual_seed(0))
        expected = x @ weight.T + (0 if bias is None else bias)
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    has_bias = {spec.kind for spec in find_linears(model) if bias_of(model.get_submodule(spec.name)) is not None}
    everything = {kind for kind, _, _ in _EXPECTED[family][1]}
    attention = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    assert has_bias == {"qwen2": attention, "phi": everything, "opt": everything, "gpt2": everything}.get(family, set())


@pytest.mark.parametrize("family", FAMILIES)
def test_head_and_embeddings_are_never_among_them(family: str) -> None:
    model = tiny_model(family)
    found = {id(model.get_submodule(spec.name)) for spec in find_linears(model)}
    assert id(model.get_output_embeddings()) not in found
    assert id(model.get_input_embeddings()) not in found
    outside = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) not in found
    ]
    assert outside == ["lm_head"]


def test_the_blocks_are_the_list_with_most_parameters() -> None:
    model = _Model(_block(a=nn.Linear(12, 31)), _block(a=nn.Linear(12, 31)))
    model.adapters = nn.ModuleList([nn.Linear(12, 5)])
    name, blocks = find_blocks(model)
    assert name == "blocks" and blocks is model.blocks
    assert [spec.name for spec in find_linears(model)] == ["blocks.0.a", "blocks.1.a"]


def test_sizes_and_costs() -> None:
    spec = LinearSpec("x", 0, "x", 84, 60)
    assert (spec.full_rank, spec.dense_cost, spec.cost(3), spec.top_rank) == (60, 5040, 432, 34)
    pivoted = LinearSpec("x", 0, "x", 84, 60, "pivoted")
    assert (pivoted.cost(3), pivoted.cost(60), pivoted.top_rank) == (423, 5040, 59)


# -- weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Linear(12, 31), Conv1D(31, 12)], ids=["Linear", "Conv1D"])
def test_a_linear_layer_is_replaced_and_observed(layer: nn.Module) -> None:
    model, ref = _Model(_block(a=layer)), WeightRef("blocks.0.a")
    seen: list[tuple[int, ...]] = []
    x = torch.zeros(2, 5, 12)
    with ref.on_input(model, lambda x: seen.append(x.shape)), ref.on_output(model, lambda y: seen.append(y.shape)):
        model.blocks[0]["a"](x)
    model.blocks[0]["a"](x)
    assert seen == [(2, 5, 12), (2, 5, 31)]
    new = torch.randn(31, 12, generator=torch.Generator().manual_seed(1))
    ref.replace(model, new)
    torch.testing.assert_close(layer(x + 1) - layer(x), (x + 1) @ new.T)
    other = nn.Linear(12, 31)
    ref.replace(model, other)
    assert model.blocks[0]["a"] is other


# -- exclude ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["*.down_proj"], 18),
        (["mlp.down_proj"], 18),  # the kind alone
        (["model.layers.0.*"], 14),
        (["model.layers.0.*", "*.down_proj"], 12),
        (["self_attn.[qk]_proj"], 15),
        (["model.layers.2.mlp.up_proj"], 20),
        ([], 21),
    ],
)
def test_patterns_leave_layers_out(patterns: list[str], left: int) -> None:
    linears = find_linears(tiny_model("llama"), patterns)
    assert len(linears) == left
    names = [spec.name for spec in linears]
    if "model.layers.0.*" in patterns:
        assert not any(name.startswith("model.layers.0.") for name in names)
    if any("down" in pattern for pattern in patterns):
        assert not any("down" in name for name in names)


@pytest.mark.parametrize("patterns", [["*.down"], ["*.up_proj", "*.DOWN_PROJ"], ["lm_head"]])
def test_a_pattern_that_matches_nothing_is_named_with_what_there_is(patterns: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        find_linears(tiny_model("llama"), patterns)
    assert f"--exclude {patterns[-1]!r} matches no linear layer" in str(caught.value)
    assert caught.value.hint == "module kinds are " + ", ".join(kind for kind, _, _ in _WIDE)


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves no linear layer"):
        find_linears(tiny_model("gpt2"), ["attn.*", "mlp.*"])


# -- what is refused --------------------------------------------------------------------------------------------


def test_no_blocks() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^Sequential has no list of decoder blocks") as caught:
        find_linears(nn.Sequential(nn.Linear(3, 5)))
    assert "decoder-only" in (caught.value.hint or "")


def test_no_linear_layer() -> None:
    model = _Model(_block(conv=nn.Conv1d(3, 5, 2), norm=nn.LayerNorm(7)))
    with pytest.raises(UnsupportedModelError, match=r"no linear layer in its 1 blocks; found Conv1d, LayerNorm"):
        find_linears(model)


class _UnknownExperts(nn.Module):
    """Experts of a family that shares nothing with the interface of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.zeros(3, 31, 12))


def test_fused_experts_of_an_unknown_interface() -> None:
    with pytest.raises(UnsupportedModelError, match=r"fused expert weights \(1 of them, such as blocks.0.experts.ker"):
        find_linears(_Model(_block(a=nn.Linear(12, 31), experts=_UnknownExperts())))


def test_routers_are_no_candidates() -> None:
    model = separate_experts(tiny_model("mixtral"))
    before = {spec.name for spec in find_linears(model)}
    model.model.layers[1].mlp.router = nn.Linear(60, 5)  # 5 experts
    model.model.layers[1].mlp.other = nn.Linear(60, 7)
    assert {spec.name for spec in find_linears(model)} - before == {"model.layers.1.mlp.other"}
    # Llama 4 has a linear layer that does more than multiply.
    names = {spec.name for spec in find_linears(separate_experts(tiny_model("llama4_text")))}
    assert names
    assert not any("router" in name for name in names)


def test_experts_below_each_other_in_one_matrix() -> None:
    with pytest.raises(UnsupportedModelError, match=r"fused expert weights \(6 of them, such as .*experts\.mlp\.w1\)"):
        find_linears(random_model(tiny_config("dbrx")))


def test_layers_that_share_a_weight_stay_dense() -> None:
    model = _Model(
        _block(a=nn.Linear(12, 31), b=nn.Linear(31, 12)),
        _block(a=nn.Linear(12, 31), b=nn.Linear(31, 12)),
        _block(a=nn.Linear(12, 31), b=nn.Linear(31, 12)),
    )
    model.blocks[2]["a"].weight = model.blocks[0]["a"].weight
    assert shared_layers(model) == ["blocks.0.a", "blocks.2.a"]
    assert [spec.name for spec in find_linears(model)] == ["blocks.0.b", "blocks.1.a", "blocks.1.b", "blocks.2.b"]


def test_no_layer_has_a_weight_of_its_own() -> None:
    block = _block(a=nn.Linear(12, 31))
    with pytest.raises(UnsupportedModelError, match=r"^all 2 linear layers .* share their weights .*blocks\.0\.a"):
        find_linears(_Model(block, block))


def test_blocks_that_run_several_times() -> None:
    model = random_model(tiny_config("hrm_text"))
    with pytest.raises(UnsupportedModelError, match=r"the blocks of model\.L_module\.layers in the order 0, 1, 0, 1"):
        left_dense(model, find_linears(model), torch.arange(5)[None])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_already_factorised(family: str) -> None:
    model = tiny_model(family)
    name = find_linears(model)[-1].name
    replace_linear(model, name, LowRankLinear(92, 60, 7, bias=False))
    with pytest.raises(UnsupportedModelError, match=f"^{name} is already factorised") as caught:
        find_linears(model)
    assert "dense" in (caught.value.hint or "")


def test_quantised_weights() -> None:
    model = tiny_model("llama")
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    layer.weight = nn.Parameter(torch.zeros(92, 60, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        UnsupportedModelError, match=r"model\.layers\.1\.mlp\.up_proj holds torch\.int8 weights"
    ) as caught:
        find_linears(model)
    assert "unquantised" in (caught.value.hint or "")


def test_conv1d_outside_transformers_models_is_transposed_too() -> None:
    layer = Conv1D(31, 12)  # out, in
    assert layer.weight.shape == (12, 31)
    model = _Model(_block(a=layer))
    assert WeightRef("blocks.0.a").read(model).shape == (31, 12)
    assert [(s.kind, s.m, s.n) for s in find_linears(model)] == [("a", 31, 12)]
    assert bias_of(SimpleNamespace(bias=None)) is None  # type: ignore[arg-type]
