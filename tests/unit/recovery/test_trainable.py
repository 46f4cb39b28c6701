"""The trainable form: balanced factors with the same product, and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ara.layouts import LAYOUTS, layout_named
from ara.recovery.trainable import balanced, block_tensors, from_trainable, load_tensors, set_factors, to_trainable

M, N, K = 23, 17, 5


def factors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 100 * torch.randn(K, N, generator=generator), torch.randn(M, K, generator=generator) / 100


@pytest.fixture(params=LAYOUTS.names())
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def model(layout: str, transposed: bool = False) -> nn.Module:
    """Return a model with one low-rank layer with a bias, and one dense layer."""
    layer = layout_named(layout).build(*factors(), torch.arange(float(M)), transposed)
    return nn.ModuleDict({"low": layer, "dense": nn.Linear(M, 3)})


def test_balanced_factors_have_the_same_product_and_the_same_scale() -> None:
    a, b = factors()
    down, up = balanced(a, b)
    torch.testing.assert_close(up @ down, b.double() @ a.double())
    torch.testing.assert_close(down @ down.T, up.T @ up)
    scales = (down @ down.T).diagonal()
    assert torch.equal(scales, scales.sort(descending=True).values)


@pytest.mark.parametrize("transposed", [False, True])
def test_every_layout_becomes_two_factors_and_comes_back(layout: str, transposed: bool) -> None:
    built = model(layout, transposed)
    x = torch.randn(4, N, generator=torch.Generator().manual_seed(1))
    before = built["low"](x)
    to_trainable(built, layout)
    low = built["low"]
    assert type(low).__name__ == "LowRankLinear" and low.rank == K and low.transposed == transposed
    torch.testing.assert_close(low(x), before)
    from_trainable(built, layout, torch.float32)
    assert type(built["low"]) is layout_named(layout).module and built["low"].transposed == transposed
    torch.testing.assert_close(built["low"](x), before)


def test_parameters_go_where_they_are_kept(layout: str) -> None:
    """Those of both forms; the numbers are the same, and every parameter is a copy."""
    expected, found = model(layout), model(layout)
    with torch.no_grad():
        found["dense"].load_state_dict(expected["dense"].state_dict())
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.clone())
        return kept[-1]

    def all_kept() -> bool:
        addresses = {tensor.data_ptr() for tensor in kept}
        return all(parameter.data_ptr() in addresses for parameter in found.parameters())

    def equal() -> bool:
        state = expected.state_dict()
        return all(torch.equal(state[name], tensor) for name, tensor in found.state_dict().items())

    for built, how in ((expected, None), (found, keep)):
        to_trainable(built, layout, how)
    assert all_kept() and equal() and len(kept) == len(list(found.parameters()))
    for built, how in ((expected, None), (found, keep)):
        from_trainable(built, layout, torch.float32, keep=how)
    assert all_kept() and equal()


def test_new_factors_are_balanced_and_the_bias_stays() -> None:
    built = model("factors")
    to_trainable(built, "factors")
    a, b = factors(1)
    set_factors(built, "low", a, b)
    low = built["low"]
    torch.testing.assert_close(low.product(torch.float32), b @ a, rtol=1e-4, atol=1e-4)
    assert torch.equal(low.bias, torch.arange(float(M)))


def test_tensors_of_a_block_are_stored_and_loaded_by_path() -> None:
    outer = nn.ModuleDict({"block": model("factors")})
    stored = {name: tensor.clone() for name, tensor in block_tensors(outer, "block").items()}
    assert "block.low.A.weight" in stored and "block.dense.bias" in stored
    with torch.no_grad():
        for parameter in outer.parameters():
            parameter.zero_()
    load_tensors(outer, stored)
    assert all(torch.equal(stored[name], tensor) for name, tensor in block_tensors(outer, "block").items())
    with pytest.raises(ValueError, match=r"block\.low\.A\.weight has the shape"):
        load_tensors(outer, {"block.low.A.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="nothing"):
        load_tensors(outer, {"other": torch.zeros(2, 2)})
