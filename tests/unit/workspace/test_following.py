"""The command that comes next belongs to the result just made, over all stages and two budgets."""

from __future__ import annotations

import inspect
import shlex

import pytest

from ara.artifacts.base import Results
from ara.pipeline import KINDS, kind_named, makers, stages
from ara.workspace.following import next_command
from tests.stored import FIGURES, store


def following(workspace, key=None):
    words = shlex.split(next_command(workspace, workspace.view(key) if key else None))
    assert words[0] == "ara" and words[-2:] == ["-w", str(workspace.root)]
    return " ".join(words[1:-2])


def test_the_table_of_stages_fits_together():
    """Every kind has stages that make it, one argument that names it, and a class for its results."""
    kinds = [kind.name for kind in KINDS]
    assert len(set(kinds)) == len(kinds) == len({kind.argument for kind in KINDS})
    for stage in stages():
        assert stage.produces in kinds and set(stage.consumes) <= set(kinds), stage
        function = inspect.signature(stage.load())
        if stage.consumes and stage.name != "report":
            assert kind_named(stage.consumes[0]).argument in function.parameters, stage
        assert issubclass(kind_named(stage.produces).load(), Results)
    assert all(makers(kind) for kind in kinds)
    assert [stage.name for stage in stages() if stage.produces in stage.consumes] == ["recover", "quantise"]
    assert {stage.name for stage in stages()} == set(FIGURES)


def test_two_budgets_step_by_step(workspace):
    assert following(workspace) == "decompose demo"
    store(workspace, "decompose/plain")
    assert following(workspace, "decompose/plain") == "allocate --keep 0.8"
    for budget in ("0.80", "0.60"):
        store(workspace, f"allocate/{budget}", parents=["decompose/plain"], seed=int(budget[2]))
        assert following(workspace, f"allocate/{budget}") == following(workspace) == "truncate"
        store(workspace, f"truncate/{budget}", parents=[f"allocate/{budget}", "decompose/plain"])
        assert following(workspace, f"truncate/{budget}") == following(workspace) == "recover"
        store(workspace, f"recover/{budget}", parents=[f"truncate/{budget}", "decompose/plain"])
        assert following(workspace, f"recover/{budget}") == following(workspace) == "eval --tasks wikitext2"
        store(workspace, f"eval/{budget}", parents=[f"recover/{budget}", "decompose/plain"])
        assert following(workspace, f"eval/{budget}") == "allocate --keep 0.6"


def test_an_older_result_is_named(workspace):
    """As when the same command is given again, and its result is there already."""
    store(workspace, "decompose/plain")
    store(workspace, "decompose/whitened")
    assert following(workspace, "decompose/plain") == "allocate --keep 0.8 --factors plain"
    assert following(workspace, "decompose/whitened") == "allocate --keep 0.8"
    for budget in ("0.80", "0.60"):
        store(workspace, f"allocate/{budget}", parents=["decompose/plain"], seed=int(budget[2]))
    assert following(workspace, "allocate/0.80") == "truncate --allocation 0.80"
    assert following(workspace, "allocate/0.60") == following(workspace) == "truncate"
    for budget in ("0.80", "0.60"):
        store(workspace, f"truncate/{budget}", parents=[f"allocate/{budget}", "decompose/plain"])
    assert following(workspace, "truncate/0.80") == "recover --checkpoint 0.80"
    # What is there already is passed over.
    assert following(workspace, "allocate/0.80") == "recover --checkpoint 0.80"
    store(workspace, "recover/0.80-closed", parents=["truncate/0.80", "decompose/plain"])
    assert following(workspace, "allocate/0.80") == "eval --tasks wikitext2"
    store(workspace, "eval/0.80", parents=["recover/0.80-closed", "decompose/plain"])
    assert following(workspace, "allocate/0.80") == "allocate --keep 0.6 --factors plain"
    assert following(workspace, "allocate/0.60") == "recover --checkpoint 0.60"


@pytest.mark.parametrize("budget", [{"size": "90MB"}, {"bits_per_parameter": 3.5}, {"budget_bytes": 9}])
def test_ranks_with_bits_are_rounded_after_the_repair(workspace, budget):
    store(workspace, "decompose/plain")
    store(workspace, "allocate/a", parents=["decompose/plain"], **budget)
    store(workspace, "truncate/a", parents=["allocate/a", "decompose/plain"])
    assert following(workspace, "truncate/a") == "recover"
    store(workspace, "recover/a", parents=["truncate/a", "decompose/plain"])
    assert following(workspace, "recover/a") == following(workspace) == "quantise"
    store(workspace, "quantise/a", parents=["recover/a", "decompose/plain"])
    assert following(workspace, "quantise/a") == following(workspace, "recover/a") == "eval --tasks wikitext2"


def test_a_comparison_of_sizes_leads_to_its_first_size(workspace):
    store(workspace, "decompose/plain")
    store(workspace, "decompose/whitened")
    store(workspace, "compare/x", parents=["decompose/plain"], size=["90MB", "60MB"], embedding_bits=8)
    assert following(workspace, "compare/x") == "allocate --size 90MB --embedding-bits 8 --factors plain"
    store(workspace, "compare/y", parents=["decompose/whitened"], size=["60MB"], layout="factors", embedding_bits=16)
    assert following(workspace, "compare/y") == "allocate --size 60MB"
    assert following(workspace) == "allocate --keep 0.8"


def test_a_densified_checkpoint_is_not_repaired(workspace):
    store(workspace, "decompose/plain")
    store(workspace, "truncate/a", parents=["decompose/plain"], densify=True)
    assert following(workspace, "truncate/a") == "eval --tasks wikitext2"


def test_a_damaged_one_beside_it_makes_the_name_needed(workspace):
    store(workspace, "decompose/plain")
    store(workspace, "allocate/a", parents=["decompose/plain"])
    (workspace.root / "allocate" / "b").mkdir()
    assert following(workspace, "allocate/a") == "truncate --allocation a"


@pytest.mark.parametrize("stage", ["export", "bench", "compare"])
def test_what_leads_nowhere_leaves_the_latest_step(workspace, stage):
    store(workspace, "decompose/plain")
    store(workspace, "allocate/a", parents=["decompose/plain"])
    store(workspace, f"{stage}/x")
    assert following(workspace, f"{stage}/x") == "truncate"


def test_trainings_lead_to_their_budget(workspace):
    store(workspace, "decompose/plain")
    store(workspace, "train-masks/a", parents=["decompose/plain"])
    assert following(workspace, "decompose/plain") == "allocate --keep 0.8"
    store(workspace, "train-masks/b", parents=["decompose/plain"], seed=1)
    assert following(workspace, "train-masks/a") == "allocate --keep 0.8 --masks a"
    assert following(workspace, "train-masks/b") == "allocate --keep 0.8"
