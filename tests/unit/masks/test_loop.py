"""The training loop: it learns, keeps the best, goes on bit by bit, and stops where it must."""

import json

import pytest
import torch

from ara.config import MaskTrainingOptions
from ara.errors import NumericalError
from ara.masks.ara_family import ara_family, needs_table
from ara.masks.loop import train
from ara.masks.sensitivity_table import sensitivity_table
from ara.masks.state import TrainingSettings, TrainingState
from ara.solver.problem import Budget
from tests.toy import toy_problem

SHAPES = [(20, 14), (9, 20), (16, 16), (20, 14)]
FORMS = {
    "newton": {"optimiser": "newton"},
    "adam": {"optimiser": "adam", "atoms": 8, "average": 0.5, "learning_rate": 0.5},
    "paper": {"objective": "paper", "atoms": 8, "average": 0.5, "learning_rate": 0.1},
    "newton from uniform": {"optimiser": "newton", "start": "uniform", "loss": "ce"},
}


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture
def toy(tmp_path):
    return toy_problem(tmp_path, SHAPES)


def _run(toy, form, steps=6, state=None, save=None, keep_on_interrupt=False, **changes):
    modules, context = toy
    options = MaskTrainingOptions(steps=steps, batch=3, check_every=2, **{**FORMS[form], **changes})
    budget = Budget.for_keep([module.spec for module in modules], 0.6)
    table = sensitivity_table(context).values if needs_table(options) else None
    family = ara_family(options, modules, budget, table)
    settings = TrainingSettings.of(options, 2, seed=5)
    more = {"state": state, "save": save, "keep_on_interrupt": keep_on_interrupt}
    found = train(family, context.model, context.train, context.held_out, settings, **more)
    return found, family, budget


def test_the_best_is_within_budget_and_never_worse_than_the_start(toy, form):
    state, _, budget = _run(toy, form)
    specs = toy[1].model.specs
    spent = sum(s.dense_cost if state.best[s.name] is None else s.cost(state.best[s.name]) for s in specs)
    assert spent <= budget.limit
    assert state.best_held_out <= state.log[0].held_out
    assert [row.step for row in state.log] == list(range(7))
    assert [row.step for row in state.log if row.held_out is not None] == [0, 2, 4, 6]
    assert all(row.keep <= 0.6 + 1e-9 for row in state.log)
    context = toy[1]
    context.model.use(state.best)
    assert float(context.model.nll(context.held_out).mean()) == pytest.approx(state.best_held_out)


def test_the_model_is_dense_again(toy, form):
    _run(toy, form, steps=1)
    assert all(layer.rank is None and not layer.soft for layer in toy[1].model.layers.values())


def _equal(one, other):
    assert one.best == other.best and one.best_held_out == other.best_held_out
    for name, value in one.all_tensors().items():
        assert torch.equal(value, other.all_tensors()[name]), name
    for mine, theirs in zip(one.log, other.log, strict=True):
        assert {**vars(mine), "seconds": 0} == {**vars(theirs), "seconds": 0}


@pytest.mark.parametrize("stopped", [1, 3])
def test_going_on_is_bit_for_bit_the_same(toy, form, stopped):
    whole, _, _ = _run(toy, form)
    kept = {}

    def save(state):
        if state.step == stopped:
            # Through JSON and copies, as a checkpoint does it.
            kept["plain"] = json.dumps(state.plain())
            kept["tensors"] = {name: value.clone() for name, value in state.all_tensors().items()}

    _run(toy, form, save=save)
    again, _, _ = _run(toy, form, state=TrainingState.from_plain(json.loads(kept["plain"]), kept["tensors"]))
    _equal(whole, again)


def test_the_same_seed_gives_the_same_training(toy, form):
    first, _, _ = _run(toy, form)
    torch.manual_seed(77)
    second, _, _ = _run(toy, form)
    _equal(first, second)


def test_parameters_move(toy, form):
    state, family, _ = _run(toy, form, steps=2)
    _, start, _ = _run(toy, form, steps=0)
    assert any(not torch.equal(family.parameters[name], start.parameters[name]) for name in start.parameters)
    assert state.backward_passes >= 6


def test_ctrl_c_passes_through_or_keeps_the_best_so_far(toy, form):
    def save(state):
        if state.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(toy, form, save=save)
    assert all(layer.rank is None for layer in toy[1].model.layers.values())
    state, _, _ = _run(toy, form, save=save, keep_on_interrupt=True)
    assert state.interrupted and state.step == 3 and len(state.best) == len(SHAPES)
    assert state.best_held_out <= state.log[0].held_out


def test_the_model_is_dense_again_when_a_step_fails(toy, monkeypatch):
    def broken(self, *args, **kwargs):
        raise NumericalError("the loss is nan", "try --dtype float32")

    monkeypatch.setattr(type(toy[1].model), "gradients", broken)
    with pytest.raises(NumericalError, match="nan"):
        _run(toy, "adam")
    assert all(layer.rank is None for layer in toy[1].model.layers.values())


def _checks_give(monkeypatch, values):
    """Let the checks on held-out text give these losses, and every check look at another allocation."""
    from ara.masks.model import MaskedModel
    from ara.masks.priced import PricedStaircase
    from ara.solver.problem import Allocation

    given, real, count = iter(values), PricedStaircase.allocation, iter(range(1000))

    def another(self):
        ranks = real(self).ranks
        return Allocation.of_ranks(self.specs, {**ranks, next(iter(ranks)): 1 + next(count)})

    monkeypatch.setattr(PricedStaircase, "allocation", another)
    monkeypatch.setattr(MaskedModel, "nll", lambda self, *args, **kwargs: torch.tensor([next(given)]))


def test_divergence_stops_with_advice(toy, monkeypatch):
    _checks_give(monkeypatch, [1.0, 3.5, 1.1, 3.2, 3.4, 0.0])
    with pytest.raises(NumericalError, match=r"diverges.*by 2\.2 nats") as caught:
        _run(toy, "adam", steps=60)
    assert "--rate" in caught.value.hint


def test_a_start_of_nan_is_refused(toy, monkeypatch):
    _checks_give(monkeypatch, [float("nan")])
    with pytest.raises(NumericalError, match="the starting allocation gives a held-out loss of nan"):
        _run(toy, "adam", steps=4)


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("newton", {"rate": 0.5, "trust": 0.3}),
        ("adam", {"steps": 24, "learning_rate": 0.5}),
        ("paper", {"steps": 24, "learning_rate": 0.3, "atoms": 64}),
    ],
)
def test_each_form_beats_the_uniform_start_it_set_out_from(tmp_path, form, changes):
    """On a toy whose layers differ by construction, learning from uniform ranks must win."""
    toy = toy_problem(tmp_path, SHAPES * 2, seed=3)
    state, _, _ = _run(toy, form, **{"steps": 12, "start": "uniform", **changes})
    assert state.best_step > 0
    assert state.best_held_out < state.log[0].held_out - 1e-4
