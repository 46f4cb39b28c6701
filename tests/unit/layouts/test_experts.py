"""Separate experts: the way there and back, and products of all experts at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ara.layout_names import LayoutName
from ara.layouts import layout_named
from ara.layouts.modeling_ara import (
    AraConfig,
    LowRankLinear,
    SeparateExperts,
    SharedLinear,
    StackedExperts,
    densify,
    dequantise,
    expert_parameters,
    fuse_experts,
    fused_experts,
    replace_linear,
    rounded_like,
    separate_experts,
    shared_layers_of_experts,
)
from ara.models.experts import every_expert_sees_all, recording_routes, replaying_routes, run_one_by_one
from ara.models.weights import find_linears, left_dense
from tests.tiny import MIXTURES, tiny_model

IDS = torch.arange(3, 3 + 2 * 30).view(2, 30)
every_family = pytest.mark.parametrize("family", MIXTURES)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def experts(model: nn.Module) -> list[SeparateExperts]:
    return [module for module in model.modules() if isinstance(module, SeparateExperts)]


def mixed(family: str) -> Any:
    """Return a model with low-rank experts 0, 2 and 3 of 5, at ranks that differ, and dense ones."""
    model = separate_experts(tiny_model(family))
    generator = torch.Generator().manual_seed(1)
    for module in experts(model):
        for name in expert_parameters(module):
            pool = getattr(module, name)
            for expert, rank in ((0, 7), (2, 11), (3, 20)):
                m, n = pool[expert].weight.shape
                a, b = (torch.randn(shape, generator=generator) * 0.1 for shape in ((rank, n), (m, rank)))
                pool[expert] = layout_named("factors").build(a, b, pool[expert].bias)
    return model


def with_implementation(model: Any, name: str) -> Any:
    model.config._experts_implementation = name
    return model


@pytest.mark.parametrize("family", [*MIXTURES, "llama4_text"])
def test_there_and_back(family: str) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    paths, expected = list(fused_experts(model)), logits(model)
    assert len(paths) in (2, 3)
    separate_experts(model)
    assert not fused_experts(model)
    layers = [spec for spec in find_linears(model) if spec.pool is not None]
    assert len(layers) == 2 * 5 * len(paths)
    assert {spec.pool.rpartition(".")[0] for spec in layers if spec.pool} == set(paths)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    fuse_experts(model)
    after = model.state_dict()
    assert list(fused_experts(model)) == paths
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_separate_layers_share_the_memory_of_the_fused_parameter() -> None:
    model = tiny_model("mixtral")
    fused = {path: module.down_proj.data_ptr() for path, module in fused_experts(model).items()}
    separate_experts(model)
    for path, pointer in fused.items():
        layers = model.get_submodule(path).down_proj
        step = layers[0].weight.nbytes
        assert [layer.weight.data_ptr() for layer in layers] == [pointer + step * at for at in range(5)]


@every_family
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_all_experts_at_once(family: str, implementation: str) -> None:
    model = mixed(family)
    expected = logits(with_implementation(model, "eager"))
    assert not any("_stacked" in vars(module) for module in experts(model))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = logits(with_implementation(model, implementation))
    assert all("_stacked" in vars(module) for module in experts(model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # Padded in memory, not in a file.
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_experts_one_by_one_have_no_stacks() -> None:
    model = with_implementation(mixed("mixtral"), "grouped_mm")
    expected = logits(with_implementation(mixed("mixtral"), "eager"))
    run_one_by_one(model)
    assert torch.equal(logits(model), expected)
    assert not any("_stacked" in vars(module) for module in experts(model))


def test_stacks_follow_the_weights() -> None:
    model = with_implementation(mixed("gpt_oss"), "grouped_mm")
    before = logits(model)
    (stacks, *_) = (vars(module)["_stacked"] for module in experts(model))
    assert logits(model).equal(before)
    assert vars(experts(model)[0])["_stacked"] is stacks  # not made again
    layer = experts(model)[0].down_proj[0]
    with torch.no_grad():
        layer.B.weight.mul_(2)  # in place: the stack is the same memory
        changed = logits(model)
        layer.B.weight.data = layer.B.weight / 2  # elsewhere: a new stack
        layer.B.bias.add_(1)
    assert not torch.allclose(changed, before)
    after = logits(model)
    assert vars(experts(model)[0])["_stacked"] is not stacks
    torch.testing.assert_close(after, logits(with_implementation(model, "eager")), atol=1e-5, rtol=1e-5)
    model.to(torch.bfloat16).to(torch.float32)
    rounded = logits(with_implementation(model, "grouped_mm"))
    torch.testing.assert_close(rounded, logits(with_implementation(model, "eager")), atol=1e-5, rtol=1e-5)
    assert not torch.equal(rounded, after)


def test_dtype_that_kernels_cannot_read() -> None:
    model = with_implementation(mixed("mixtral").to(torch.float64), "grouped_mm")
    assert torch.equal(logits(model), logits(with_implementation(model, "eager")))
    assert not any("_stacked" in vars(module) for module in experts(model))


def test_loop_where_it_has_to_be() -> None:
    """Observers and gradients need every layer to run."""
    model = with_implementation(mixed("mixtral"), "grouped_mm")
    module = experts(model)[0]
    seen: list[int] = []
    with module.down_proj[0].A.register_forward_hook(lambda layer, args, output: seen.append(len(output))):
        logits(model)
    assert seen
    assert seen[0] > 0
    module.down_proj[0].requires_grad_(True)
    model(input_ids=IDS).logits.sum().backward()
    assert module.down_proj[0].A.weight.grad is not None


def test_a_layer_around_a_factor_is_called() -> None:
    """An adapter computes more than the product with the weight that it wraps."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = with_implementation(mixed("mixtral"), "grouped_mm")
    before = logits(model)
    for module in experts(model):
        factor = module.down_proj[0].A
        around = Doubled(factor.in_features, factor.out_features, bias=False)
        around.weight = factor.weight  # the same one, as in an adapter of PEFT
        module.down_proj[0].A = around
    after = logits(model)
    assert not torch.allclose(after, before)
    assert torch.equal(after, logits(with_implementation(model, "eager")))


def test_width_that_kernels_cannot_read() -> None:
    layer = nn.Linear(62, 40, bias=False)
    assert layer.in_features * layer.weight.itemsize % StackedExperts.BYTES
    model = with_implementation(mixed("mixtral").to(torch.bfloat16), "grouped_mm")
    assert experts(model)[0].gate_up_proj[0].in_features * 2 % StackedExperts.BYTES
    logits(model)
    assert not any("_stacked" in vars(module) for module in experts(model))


def test_experts_that_a_pass_does_not_call_stay_factorisable() -> None:
    model = separate_experts(tiny_model("mixtral"))
    specs = find_linears(model)
    called: set[str] = set()
    hooks = [spec.weight.on_input(model, lambda x, name=spec.name: called.add(name)) for spec in specs if spec.pool]
    uncalled, others = left_dense(model, specs, IDS[:1, :1])
    for hook in hooks:
        hook.remove()
    assert len(called) < sum(spec.pool is not None for spec in specs)
    assert (uncalled, others) == ([], [])


def test_every_expert_sees_all_tokens() -> None:
    model = separate_experts(tiny_model("mixtral"))
    expected = logits(model)
    seen: list[int] = []
    for module in experts(model):
        for layer in module.down_proj:
            layer.register_forward_pre_hook(lambda layer, args: seen.append(len(args[0])))
    with every_expert_sees_all(model):
        found = logits(model)
    assert seen == [IDS.numel()] * 15
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    seen.clear()
    logits(model)
    assert sum(seen) == 3 * 2 * IDS.numel()


def test_routes_of_another_model() -> None:
    dense, other = (separate_experts(tiny_model("mixtral", seed)) for seed in (0, 1))
    with recording_routes(dense) as routes:
        logits(dense)
    with recording_routes(other) as own:
        logits(other)
    assert len(routes) == len(own) == 3
    assert not torch.equal(routes[0][0], own[0][0])
    counts: list[int] = []
    pool = experts(other)[0].down_proj
    for layer in pool:
        layer.register_forward_pre_hook(lambda layer, args: counts.append(len(args[0])))
    with replaying_routes(other, routes):
        logits(other)
    assert counts == [int((routes[0][0] == expert).sum()) for expert in range(5) if (routes[0][0] == expert).any()]


def test_low_rank_experts_are_the_ordinary_class() -> None:
    assert isinstance(experts(mixed("mixtral"))[0].down_proj[0], LowRankLinear)


def shared(family: str) -> Any:
    """Return a model whose experts have one layer together that maps up."""
    return separate_experts(tiny_model(family), shared=True)


def compressed_together(family: str, layout: LayoutName, rank: int = 20) -> Any:
    """Return the model with that layer at a rank."""
    model = shared(family)
    for path in shared_layers_of_experts(model):
        layer = model.get_submodule(path)
        basis = torch.randn(layer.in_features, rank, generator=torch.Generator().manual_seed(1))
        a = torch.linalg.qr(basis).Q
        replace_linear(model, path, layout_named(layout).build(a.T, layer.weight.detach() @ a, layer.bias))
    return model


@pytest.mark.parametrize("family", [*MIXTURES, "llama4_text"])
def test_one_layer_of_all_experts(family: str) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    separate_experts(model, shared=True)
    found = {spec.name: spec for spec in find_linears(model) if spec.experts > 1}
    assert found.keys() == shared_layers_of_experts(model).keys()
    assert len(found) == len(experts(model))
    assert {(spec.experts, spec.m // spec.experts, spec.pool) for spec in found.values()} == {
        (5, experts(model)[0].down_proj[0].in_features * (2 if experts(model)[0].has_gate else 1), None)
    }
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    with every_expert_sees_all(model):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    fuse_experts(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
@pytest.mark.parametrize("family", [*MIXTURES, "llama4_text"])
def test_one_factor_for_all_experts(family: str, layout: LayoutName) -> None:
    model = compressed_together(family, layout)
    (path, *_) = shared_layers_of_experts(model)
    assert model.get_submodule(path).A.weight.shape[0] == 20
    expected = logits(densify(compressed_together(family, layout)))
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert (logits(tiny_model(family)) - expected).abs().max() > 1e-3
    assert isinstance(densify(model).get_submodule(path), SharedLinear)


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_rounded_factor_of_all_experts(layout: LayoutName) -> None:
    model = compressed_together("gpt_oss", layout)
    matrices = [
        f"{path}.{name}"
        for path in shared_layers_of_experts(model)
        for name, part in model.get_submodule(path).named_children()
        if isinstance(part, nn.Linear)
    ]
    for name in matrices:
        rounded = rounded_like(model.get_submodule(name), 4, 16, False)
        rounded.steps.random_(0, 256, generator=torch.Generator().manual_seed(0))
        rounded.scales.fill_(0.01)
        if rounded.bias is not None:
            rounded.bias.data.copy_(model.get_submodule(name).bias)
        replace_linear(model, name, rounded)
    found = logits(model)
    torch.testing.assert_close(found, logits(densify(dequantise(model))), atol=1e-4, rtol=1e-4)


def test_an_adapter_around_a_factor_of_all_experts_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    def doubled(layout: LayoutName, part: str) -> torch.Tensor:
        model = compressed_together("mixtral", layout)
        for path in shared_layers_of_experts(model):
            layer = model.get_submodule(path)
            factor = getattr(layer, part)
            around = Doubled(factor.in_features, factor.out_features, bias=False)
            around.weight = factor.weight
            setattr(layer, part, around)
        return logits(model)

    def with_double_weights(layout: LayoutName, part: str) -> torch.Tensor:
        model = compressed_together("mixtral", layout)
        for path in shared_layers_of_experts(model):
            getattr(model.get_submodule(path), part).weight.data.mul_(2)
        return logits(model)

    for layout, part in (("factors", "B"), ("pivoted", "C")):
        torch.testing.assert_close(doubled(layout, part), with_double_weights(layout, part), atol=1e-4, rtol=1e-4)


def test_a_token_without_experts() -> None:
    module = experts(shared("mixtral"))[0]
    x = torch.randn(3, module.gate_up_proj.in_features)
    # Expert 5 of 5 does not exist: no expert.
    index, weights = torch.tensor([[5, 5], [0, 5], [5, 5]]), torch.full((3, 2), 0.5)
    made = module(x, index, weights)
    assert torch.equal(made[[0, 2]], torch.zeros(2, made.shape[1]))
    torch.testing.assert_close(made[1], module.run_expert(0, x[1:2])[0] / 2)
    assert torch.equal(module(x, torch.full((3, 2), 5), weights), torch.zeros_like(made))


@pytest.mark.parametrize(("version", "value"), [(5, True), (6, "yes"), (6, 1)])
def test_config_that_shares_experts_wrongly(version: int, value: Any) -> None:
    with pytest.raises(ValueError, match="shared_experts must be true or false, and needs ARA format 6"):
        AraConfig({}, version, shared_experts=value)
    assert "shared_experts" not in AraConfig({}, 6).to_dict()
    assert AraConfig({}, 6, shared_experts=True).to_dict()["shared_experts"] is True
