"""A model that can be cut anywhere: against checkpoints with low-rank layers, and the table against direct removal."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ara.artifacts.factors import layer_file
from ara.errors import NumericalError
from ara.masks.model import MaskedModel
from ara.masks.sensitivity_table import sensitivity_tables
from ara.models.low_rank import apply_factors
from ara.models.weights import find_linears
from tests.tiny import tiny_model
from tests.toy import ToyModel, toy_problem

SHAPES = [(20, 14), (9, 20), (16, 16), (20, 14)]


@pytest.fixture
def toy(tmp_path):
    return toy_problem(tmp_path, SHAPES)


def _ranks(specs):
    return {spec.name: None if i % 3 == 0 else 2 + i for i, spec in enumerate(specs)}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_cut_is_what_a_checkpoint_computes(family, tmp_path):
    from ara.decomposition.subspace import weighted_factors

    model = tiny_model(family)
    specs = find_linears(model)
    files = {spec.name: tmp_path / layer_file(spec.layer) for spec in specs}
    for path in set(files.values()):
        tensors = {}
        for spec in (spec for spec in specs if files[spec.name] == path):
            factors = weighted_factors(spec.weight.read(model).double(), None)
            tensors[f"{spec.name}.A"] = factors.a.float().contiguous()
            tensors[f"{spec.name}.B"] = factors.b.float().contiguous()
        save_file(tensors, path)
    ids = torch.randint(4, 200, (2, 13), generator=torch.Generator().manual_seed(1))
    ranks = _ranks(specs)
    low_rank = tiny_model(family)
    apply_factors(low_rank, {name: rank for name, rank in ranks.items() if rank is not None}, files)
    masked = MaskedModel(model, specs, files)
    with torch.no_grad():
        dense = masked.scores(ids).logits
        torch.testing.assert_close(dense, tiny_model(family)(input_ids=ids).logits)
        masked.use(ranks)
        torch.testing.assert_close(masked.scores(ids).logits, low_rank(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
        masked.use_dense()
        torch.testing.assert_close(masked.scores(ids).logits, dense, rtol=0, atol=0)


def test_soft_masks_of_ones_and_zeros_are_a_cut(toy):
    _, context = toy
    model, windows = context.model, context.train
    ranks = {spec.name: 5 for spec in model.specs}
    model.use(ranks)
    hard = model.nll(windows)
    model.use_soft({spec.name: (torch.arange(spec.full_rank) < 5).float() for spec in model.specs})
    torch.testing.assert_close(model.nll(windows), hard, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_gradients_are_those_of_the_soft_masks_by_differences(toy, loss):
    """At soft masks nothing is straight-through: the gradient can be checked by finite differences."""
    model, windows = toy[1].model, toy[1].train
    model.model.double()
    for layer in model.layers.values():
        layer.a, layer.b, layer.weight = layer.a.double(), layer.b.double(), layer.weight.double()
        layer.bias = layer.bias.double()
    masks = {spec.name: torch.linspace(1, 0.3, spec.full_rank) for spec in model.specs}
    model.use_soft(masks)
    found = model.gradients(windows, loss, batch_size=4)
    model.use_dense()
    teacher = model.scores(windows)

    def value(masks):
        model.use_soft(masks)
        return float(model.nll(windows).mean() if loss == "ce" else model.kl(windows, teacher).mean())

    assert found.loss == pytest.approx(value(masks), rel=1e-5)
    step = 1e-2
    for name in masks:
        for j in (0, len(masks[name]) // 2):
            up, down = ({k: v.clone() for k, v in masks.items()} for _ in range(2))
            up[name][j] += step
            down[name][j] -= step
            slope = (value(up) - value(down)) / (2 * step)
            assert float(found.masks[name][j]) == pytest.approx(slope, rel=2e-2, abs=2e-6)


def test_the_teacher_is_dense_and_the_cut_comes_back(toy):
    model, windows = toy[1].model, toy[1].train
    assert model.gradients(windows, "kl").loss == pytest.approx(0, abs=1e-6)
    ranks = {spec.name: 3 for spec in model.specs}
    model.use(ranks)
    assert model.gradients(windows, "kl").loss > 1e-3
    assert {name: layer.rank for name, layer in model.layers.items()} == ranks
    assert all(layer.mask is None and layer.observer is None for layer in model.layers.values())


def test_every_window_of_a_backward_pass_is_counted(toy):
    model = toy[1].model
    model.gradients(toy[1].train, "ce", batch_size=4)
    assert model.backward_passes == 6
    sensitivity_tables(model, toy[1].train[:3])
    assert model.backward_passes == 9


def test_nan_is_refused_with_advice(toy):
    model = toy[1].model
    next(iter(model.layers.values())).weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match=r"loss is nan"):
        model.gradients(toy[1].train)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_what_is_differentiated_does_not_get_smaller_with_the_text(toy, loss, monkeypatch):
    # In float16 the gradients of a mean over thousands of tokens would vanish below 6e-8.
    _, context = toy
    masked, score, felt = context.model, context.model._head.scores, []

    def listened(ids):
        scores = score(ids)
        if scores.logits.requires_grad:
            scores.logits.register_hook(lambda gradient: felt.append(gradient.clone()))
        return scores

    monkeypatch.setattr(masked._head, "scores", listened)
    masked.use({spec.name: 3 for spec in masked.specs})
    masked.gradients(context.train[:1], loss, 1)
    masked.gradients(context.train, loss, 1)
    assert len(felt) == 7 and float(felt[0].abs().max()) > 0.01
    torch.testing.assert_close(felt[1], felt[0])


def test_batches_do_not_change_the_result(toy):
    model, windows = toy[1].model, toy[1].train
    model.use({spec.name: 4 for spec in model.specs})
    one, two = model.gradients(windows, "kl", 1), model.gradients(windows, "kl", 6)
    for name in one.masks:
        torch.testing.assert_close(one.masks[name], two.masks[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("per_window", [False, True])
def test_the_table_is_its_formula(toy, per_window):
    """T(k) from the effects themselves, one token after the other."""
    model, windows = toy[1].model, toy[1].train
    tables = sensitivity_tables(model, windows, loss="ce", per_window=per_window, batch_size=2)
    name = model.specs[1].name
    effects = []
    with model.listening({name: effects.append}), torch.enable_grad():
        from ara.models.losses import token_losses

        for window in windows:
            token_losses(model.model(window[None]).logits, window[None]).sum().backward()
    expected = torch.zeros(model.specs[1].full_rank + 1, dtype=torch.float64)
    for effect in effects:
        for k in range(effect.shape[1]):
            tails = effect[:, k:].sum(1)
            expected[k] += float(tails.sum() ** 2 if per_window else tails.square().sum())
    expected /= 2 * windows.shape[0] * (windows.shape[1] - 1)
    torch.testing.assert_close(tables[name], expected, rtol=1e-4, atol=1e-9)
    assert tables[name][-1] == 0


def test_the_table_foretells_the_loss_of_a_small_removal(toy):
    """Against the divergence that removing the last components really causes, layer by layer, in order and in size."""
    model, windows = toy[1].model, torch.cat([toy[1].train, toy[1].held_out])
    tables = sensitivity_tables(model, windows.repeat(40, 1), batch_size=40)
    teacher = model.scores(windows)
    for spec in model.specs:
        model.use({spec.name: spec.full_rank - 2})
        real = float(model.kl(windows, teacher).mean())
        model.use_dense()
        assert 0.2 < float(tables[spec.name][spec.full_rank - 2]) / real < 5


def test_the_factors_are_views_of_the_mapped_file(tmp_path):
    """Pages of the file, not copies, so that processes share them and unused ones are not read."""
    context = toy_problem(tmp_path, SHAPES)[1]
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        pytest.skip("needs /proc/self/maps")
    assert str(tmp_path) in maps
    pointer = next(iter(context.model.layers.values())).a.data_ptr()
    ranges = [line.split() for line in maps.splitlines() if str(tmp_path) in line]
    spans = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in ranges]
    assert any(start <= pointer < stop for start, stop in spans)


@pytest.fixture
def lower(tmp_path, toy):
    """Return the toy again, of whose factors only the lower half of the ranks is stored."""
    specs = [replace(module.spec, stored=module.spec.full_rank // 2) for module in toy[0]]
    files = {spec.name: tmp_path / f"lower-{layer_file(spec.layer)}" for spec in specs}
    for path in set(files.values()):
        full, tensors = load_file(tmp_path / path.name.removeprefix("lower-")), {}
        for spec in (spec for spec in specs if files[spec.name] == path):
            tensors[f"{spec.name}.A"] = full[f"{spec.name}.A"][: spec.stored].contiguous()
            tensors[f"{spec.name}.B"] = full[f"{spec.name}.B"][:, : spec.stored].contiguous()
        save_file(tensors, path)
    return MaskedModel(ToyModel(SHAPES, seed=0).eval(), specs, files)


def test_without_the_upper_ranks_the_table_is_the_same_and_ends_at_the_stored_ones(toy, lower):
    full = sensitivity_tables(toy[1].model, toy[1].train)
    found = sensitivity_tables(lower, toy[1].train)
    for spec in lower.specs:
        table, expected = found[spec.name], full[spec.name]
        assert table.shape == expected.shape and float(expected[spec.stored]) > 0
        torch.testing.assert_close(table[: spec.stored + 1], expected[: spec.stored + 1], rtol=1e-3, atol=1e-9)
        # A rank that is not stored counts as the largest one that is; dense loses nothing.
        torch.testing.assert_close(table[spec.stored : -1], table[spec.stored].expand(spec.full_rank - spec.stored))
        assert table[-1] == 0


@pytest.mark.parametrize("cut", ["dense", "some"])
def test_without_the_upper_ranks_sums_of_gradients_are_the_same(toy, lower, cut):
    ranks = {spec.name: None if cut == "dense" or i % 2 else spec.stored - 1 for i, spec in enumerate(lower.specs)}
    for model in (toy[1].model, lower):
        model.use(ranks)
    full = toy[1].model.gradients(toy[1].train, "ce")
    found = lower.gradients(toy[1].train, "ce")
    assert found.loss == pytest.approx(full.loss, abs=1e-6)
    for spec in lower.specs:
        one, other = found.masks[spec.name], full.masks[spec.name]
        torch.testing.assert_close(one[: spec.stored], other[: spec.stored], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(one.sum(), other.sum(), rtol=1e-3, atol=2e-6)
        assert bool((one[spec.stored : -1] == 0).all()) and bool(other[spec.stored : -1].any())
