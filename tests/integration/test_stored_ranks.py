"""``ara decompose --max-keep``: only the lower ranks are stored, and what later commands do with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ara.artifacts.factors import FactorsResults, specs_of
from ara.config import AllocateConfig, DecomposeConfig
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.run import run_pipeline
from ara.workspace.store import Workspace
from tests.commands import ara, done, refused
from tests.recorder import Recorder
from tests.training import TUNING

FACTORS = "decompose/two-sided"
TUNED = [word for key, value in TUNING.items() for word in (f"--{key.replace('_', '-')}", value)]


@pytest.fixture(scope="session")
def lower_base(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, Any]) -> Path:
    """Return a workspace whose factors end where two factors cost as much as the dense weight; only to be read."""
    root = tmp_path_factory.mktemp("lower") / "ws"
    decompose(DecomposeConfig(**tiny_settings, max_keep=1), Run(root))
    return root


@pytest.fixture
def lower(lower_base: Path, tmp_path: Path) -> Path:
    """Return a copy of that workspace, to be changed at will."""
    return Path(shutil.copytree(lower_base, tmp_path / "lower"))


def factors(root: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of the factors in a workspace."""
    return {
        name: tensor
        for file in sorted((root / FACTORS).glob("layer-*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def ranks(root: Path, key: str) -> dict[str, Any]:
    """Return the ranks of an allocation."""
    found: dict[str, Any] = json.loads((root / "allocate" / key / "ranks.json").read_text())["ranks"]
    return found


def test_what_is_stored_is_the_beginning_of_the_full_factors(lower_base: Path, finished: Path) -> None:
    ours, full = factors(lower_base), factors(finished)
    layers = FactorsResults.read(Workspace.open(lower_base).view(FACTORS)).modules
    for layer in layers:
        k = layer.stored
        assert k is not None and k * (layer.m + layer.n) < layer.m * layer.n <= (k + 1) * (layer.m + layer.n)
        assert torch.equal(ours[f"{layer.name}.A"], full[f"{layer.name}.A"][:k])
        assert torch.equal(ours[f"{layer.name}.B"], full[f"{layer.name}.B"][:, :k])
        assert torch.equal(ours[f"{layer.name}.spectrum"], full[f"{layer.name}.spectrum"])
    assert all(spec.top_rank == spec.stored for spec in specs_of(Workspace.open(lower_base).view(FACTORS)))


@pytest.mark.parametrize("method", ["energy", "dp-kl", "sensitivity"])
def test_factors_lose_no_rank_that_costs_less_than_dense(method: str, lower: Path, copied: Path) -> None:
    tuned = TUNED if method in ("dp-kl", "sensitivity") else []
    for root in (lower, copied):
        done("allocate", "--keep", 0.8, "-m", method, "--name", "x", *tuned, "-w", root)
    assert ranks(lower, "x") == ranks(copied, "x")


def test_the_checkpoint_is_the_same(lower: Path, copied: Path) -> None:
    for root in (lower, copied):
        done("allocate", "--keep", 0.7, "-m", "uniform", "--name", "x", "-w", root)
        done("truncate", "-w", root)
    one, other = (root / "truncate" / "x" / "checkpoint" / "model.safetensors" for root in (lower, copied))
    assert one.read_bytes() == other.read_bytes()


def test_masks_are_trained_without_the_upper_ranks(lower: Path) -> None:
    done("train-masks", "--keep", 0.7, "--steps", 2, "--batch", 3, *TUNED, "-w", lower)
    done("allocate", "--keep", 0.7, "-m", "ara", "--name", "x", "-w", lower)
    stored = {layer.name: layer.stored for layer in FactorsResults.read(Workspace.open(lower).view(FACTORS)).modules}
    assert all(rank == "dense" or rank <= stored[name] for name, rank in ranks(lower, "x").items())


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("allocate", "--keep", 0.7, "-m", "gumbel"), "--method gumbel"),
        (("allocate", "--keep", 0.7, "-m", "tanh"), "--method tanh"),
        (("allocate", "--size", "90KB"), "--size 90KB"),
        (("compare", "--size", "90KB"), "--size 90KB"),
        (("compare", "--keep", 0.7, "--methods", "uniform,tanh"), "--method tanh"),
        (("train-masks", "--keep", 0.7, "--objective", "paper"), "--objective paper"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_needs_all_ranks_says_so(words: tuple[Any, ...], what: str, lower_base: Path) -> None:
    told = refused(
        ara(*words, "-w", lower_base, "-q"), 2, f"{what} needs the factors of all ranks, and {FACTORS} stores"
    )
    assert "ranks up to --max-keep 1" in told and "without --max-keep" in told


def test_the_level_closed_needs_all_ranks_and_the_next_one_leaves_it_out(lower: Path, tiny_text: str) -> None:
    done("allocate", "--keep", 0.7, "-m", "uniform", "-w", lower)
    done("truncate", "-w", lower)
    told = refused(ara("recover", "-w", lower, "-q"), 2, "the level closed needs the factors of all ranks")
    assert "use --level block or --level distill" in told
    words = ("--samples", 4, "--held-out", 2, "--device", "cpu", "--dtype", "float32")
    result = done("recover", "--level", "block", "--block-epochs", 1, *words, "-w", lower)
    assert "closed is left out: it needs the factors of all ranks" in result.stderr


def test_budgets_above_the_stored_ranks_are_refused(
    tiny_settings: dict[str, Any], tmp_path: Path, lower_base: Path
) -> None:
    root = tmp_path / "ws"
    decompose(DecomposeConfig(**tiny_settings, max_keep=0.6), Run(root))
    for command in (("allocate", "-m", "energy"), ("train-masks",), ("compare", "--methods", "energy")):
        told = refused(ara(*command, "--keep", 0.9, "-w", root, "-q"), 2, f"keep 0.9 needs higher ranks than {FACTORS}")
        assert "ranks up to --max-keep 0.6" in told and "use --keep 0.5" in told
    result = done("allocate", "-m", "energy", "--keep", 0.5, "-w", root)
    assert "higher ranks are not offered" in result.stderr
    done("allocate", "-m", "energy", "--keep", 0.6, "-w", root)
    # Pivoted layers of the ranks below break-even need fewer parameters.
    refused(
        ara("allocate", "-m", "uniform", "--keep", 0.9, "--layout", "pivoted", "-w", lower_base, "-q"), 2, "pivoted"
    )


@pytest.mark.parametrize(
    ("words", "told", "hint"),
    [
        (
            ("--keep", 0.5),
            "the level closed needs the factors of all ranks",
            "use --recover block or --recover distill",
        ),
        (
            ("--keep", 0.9, "--recover", "none"),
            "keep 0.9 needs higher ranks than decompose/two-sided",
            "use --keep 0.5",
        ),
        (("--keep", 0.5, "-m", "tanh", "--recover", "none"), "--method tanh needs the factors", "use another method"),
    ],
)
def test_the_pipeline_refuses_what_needs_more_ranks_before_it_starts(
    words: tuple[Any, ...], told: str, hint: str, tiny_llama: Path, tmp_path: Path
) -> None:
    said = refused(ara("run", tiny_llama, "--max-keep", 0.6, *words, "-w", tmp_path / "ws", "-q"), 2, told)
    assert "ranks up to --max-keep 0.6" in said and hint in said and "leave out --max-keep" in said
    assert not (tmp_path / "ws").exists()


def test_the_pipeline_works_without_the_upper_ranks(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    config = DecomposeConfig(**tiny_settings, max_keep=0.6)
    views = run_pipeline(config, [AllocateConfig(keep=0.5, method="energy")], {}, Run(tmp_path / "ws"))
    assert [view.stage for view in views] == ["decompose", "allocate"]
    assert all(layer.stored is not None for layer in FactorsResults.read(views[0]).modules)


def test_a_file_with_a_higher_rank_is_refused(lower: Path) -> None:
    done("allocate", "--keep", 0.7, "-m", "uniform", "--layout", "pivoted", "--name", "x", "-w", lower)
    path = lower / "mine.json"
    document = json.loads((lower / "allocate" / "x" / "ranks.json").read_text())
    layer = FactorsResults.read(Workspace.open(lower).view(FACTORS)).modules[0]
    assert layer.stored is not None
    document["ranks"][layer.name] = layer.stored + 1
    path.write_text(json.dumps(document))
    words = f"{layer.name}: rank {layer.stored + 1} is above {layer.stored}, the largest one that is stored"
    refused(ara("allocate", "--ranks", path, "-w", lower, "-q"), 2, words, hint=False)


def test_the_option_makes_another_result_and_its_default_the_old_one(
    copied: Path, tiny_settings: dict[str, Any]
) -> None:
    made = Workspace.open(copied).view(FACTORS).manifest
    assert made is not None and "max_keep" not in made.config
    assert all("stored" not in layer for layer in made.results["modules"])
    recorder = Recorder()
    decompose(DecomposeConfig(**tiny_settings, max_keep=0.8), Run(copied, report=recorder))
    assert any("made with other settings (max_keep)" in text for text in recorder.texts("warn"))


def test_a_manifest_with_more_ranks_than_a_layer_has_is_refused(lower: Path) -> None:
    manifest = Workspace.open(lower).view(FACTORS).manifest
    assert manifest is not None
    results = json.loads(json.dumps(manifest.results))
    layer = results["modules"][0]
    layer["stored"] = min(layer["m"], layer["n"]) + 1
    problem = FactorsResults.problem(manifest.model_copy(update={"results": results}))
    assert problem is not None and "more than its full rank" in problem
    layer["stored"] -= 2
    problem = FactorsResults.problem(manifest.model_copy(update={"results": results}))
    assert problem is not None and "needs a tensor A of shape" in problem
