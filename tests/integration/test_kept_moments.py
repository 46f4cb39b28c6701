"""Second moments that ``ara decompose`` keeps, and the commands that use them instead of reading text."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ara.artifacts.checkpoint import CHECKPOINT, CheckpointResults
from ara.artifacts.factors import FactorsResults, FactorsSettings, moment_name, moments_file, specs_of
from ara.calibration.kept_moments import KeptMoments
from ara.calibration.moments import collect_moments, from_triangle, packed_triangle, shared_inputs
from ara.config import DecomposeConfig
from ara.errors import DiskFullError, UsageError
from ara.layouts.grid import Grid
from ara.models.blocks import BlockRunner
from ara.models.checkpoint import load
from ara.models.weights import WeightRef
from ara.quantisation.calibrated import mixed_basis, round_calibrated, round_product
from ara.quantisation.sequential import matrices_of
from ara.quantisation.storing import numbers_of
from ara.stages import decompose as stage
from ara.stages.common import Run, model_of, window_reader
from ara.stages.decompose import decompose
from ara.stages.moments import kept_moments
from ara.workspace.store import Workspace
from tests.commands import ara, done, refused
from tests.integration.test_size import FEW, size
from tests.recorder import Recorder

FACTORS = "decompose/two-sided"


def kept(root: Path) -> KeptMoments:
    """Return the moments of the decomposition in a workspace."""
    found = kept_moments(Workspace.open(root).view(FACTORS), Run(root))
    assert found is not None
    return found


def test_a_triangle_is_the_matrix() -> None:
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    packed = packed_triangle(x.T @ x)
    assert packed.shape == (28,) and torch.equal(from_triangle(packed, 7).triu(), (x.T @ x).triu())
    assert torch.equal(from_triangle(packed, 7), from_triangle(packed, 7).T)


def test_kept_moments_are_those_of_the_windows_bit_for_bit(copied: Path) -> None:
    run, workspace = Run(copied), Workspace.open(copied)
    view = workspace.view(FACTORS)
    made, source, specs = FactorsSettings.read(view), model_of(view, run), specs_of(view)
    assert made.text is not None and view.manifest is not None
    windows = window_reader(made.text, source, made.seq_len, made.seed, workspace, run).first(made.samples).ids
    model = source.load_model(torch.float32, "cpu")
    owners = shared_inputs(model, specs, windows[:1])
    batch = view.manifest.config["batch_size"]
    found = collect_moments(BlockRunner(model, windows, batch), specs, owners)
    moments = kept(copied)
    assert set(moments) == {spec.name for spec in specs} and len(moments) == len(specs)
    for spec in specs:
        assert torch.equal(moments[spec.name], found[owners[spec.name]].second_moment), spec.name
    # One matrix per input: q, k and v share one, gate and up as well.
    leaders = FactorsResults.read(view).moments
    assert leaders is not None and len(set(leaders.values())) == len(set(owners.values())) < len(specs)


def without_moments(root: Path) -> None:
    """Make the decomposition again without moments."""
    made = Workspace.open(root).view(FACTORS).manifest
    assert made is not None
    config = {**made.config, "options": {}, "keep_moments": "no"}
    del config["text_sha256"]
    shutil.rmtree(root / "allocate")
    decompose(DecomposeConfig(**config), Run(root, force=True))


def test_allocate_and_compare_read_no_text_for_rounding(copied: Path) -> None:
    words = (*FEW, "--block", 16, "-w", copied)
    one = size(copied, 0.2)
    told = done("allocate", "--size", one, *words).stderr
    assert f"second moments of inputs: those of {FACTORS}" in told and "Reading inputs of blocks" not in told
    assert f"those of {FACTORS}" in done("compare", "--size", one, *words).stderr


def test_without_kept_moments_text_is_read_and_the_fact_is_told(copied: Path) -> None:
    one = size(copied, 0.2)
    kept_shares = done("allocate", "--size", one, *FEW, "--block", 16, "-w", copied, "--json").stdout
    without_moments(copied)
    assert not list((copied / FACTORS).glob("moments-*"))
    again = done("allocate", "--size", one, *FEW, "--block", 16, "-w", copied, "--json")
    assert f"{FACTORS} has kept no second moments: text is read for them" in again.stderr
    assert again.stdout != kept_shares


def test_keeping_moments_does_not_make_another_result(copied: Path) -> None:
    """An old decomposition, or one without moments, is not made again; its moments are a matter of space."""
    made = Workspace.open(copied).view(FACTORS).manifest
    assert made is not None
    config = {**made.config, "options": {}, "keep_moments": "no"}
    del config["text_sha256"]
    recorder = Recorder()
    decompose(DecomposeConfig(**config), Run(copied, report=recorder))
    assert any("is there already" in fact for fact in recorder.facts)


def test_moments_are_left_out_where_the_disk_is_small(
    tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    # Room for the factors of the tiny model, and for little more than its moments.
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    view = stage.decompose(DecomposeConfig(**tiny_settings), Run(tmp_path / "ws", report=recorder))
    assert FactorsResults.read(view).moments is None and not list(view.path.glob("moments-*"))
    warning = next(text for text in recorder.texts("warn") if "moments" in text)
    assert warning.startswith("second moments are not kept: they take 0 MiB, more than 25% of the")
    config = DecomposeConfig(**tiny_settings, keep_moments="yes")
    assert FactorsResults.read(stage.decompose(config, Run(tmp_path / "other"))).moments is not None
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**18))
    with pytest.raises(DiskFullError, match="the factors and second moments need"):
        stage.decompose(config, Run(tmp_path / "third"))


def test_a_killed_decomposition_resumes_with_its_moments(
    tiny_settings: dict[str, Any], copied: Path, killed: Any
) -> None:
    root = copied.parent / "other"
    words = ["decompose", tiny_settings["model"], "--text", tiny_settings["text"], "--samples", 16, "--seq-len", 48]
    words += ["--device", "cpu", "--dtype", "float32", "--moment-memory", 1e-6, "-w", root]
    # Between the moments of the second block and its factors.
    killed("ara.workspace.writer:StageWriter.tensors", 3, "after", *map(str, words))
    result = done(*words, "--keep-moments", "no")
    assert "second moments are kept, as in the interrupted run" in result.stderr
    for file in sorted((copied / FACTORS).glob("*.safetensors")):
        ours = load_file(root / FACTORS / file.name)
        assert all(torch.equal(tensor, ours[name]) for name, tensor in load_file(file).items()), file.name


@pytest.mark.parametrize("broken", ["tensor", "leader", "layer"])
def test_moments_that_do_not_fit_the_layers_are_refused(broken: str, copied: Path) -> None:
    manifest = Workspace.open(copied).view(FACTORS).manifest
    assert manifest is not None
    results = FactorsResults.read(manifest)
    assert results.moments is not None
    first, *_, last = results.modules
    moments, tensors = dict(results.moments), dict(manifest.tensors)
    if broken == "tensor":
        del tensors[moment_name(first.name)]
    elif broken == "leader":
        moments[first.name] = last.name
    else:
        del moments[first.name]
    forged = manifest.model_copy(update={"tensors": tensors, "results": {**manifest.results, "moments": moments}})
    assert "moment" in str(FactorsResults.problem(forged))
    assert FactorsResults.problem(manifest) is None and moments_file(0) in manifest.files


def test_a_method_that_reads_no_text_keeps_none(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**tiny_settings, "text": None, "method": "plain"}
    assert FactorsResults.read(decompose(DecomposeConfig(**settings), Run(tmp_path / "ws"))).moments is None
    with pytest.raises(UsageError, match="this method reads no text"):
        decompose(DecomposeConfig(**settings, keep_moments="yes"), Run(tmp_path / "other"))


ROUND = ("quantise", "--bits", 4, "--block", 16, *FEW, "--tolerance", 9)


def numbers(root: Path, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a rounded checkpoint."""
    (file,) = (root / "quantise" / name / CHECKPOINT).glob("*.safetensors")
    return load_file(file)


def test_a_checkpoint_is_rounded_on_kept_moments(copied: Path) -> None:
    told = done(*ROUND, "--inputs", "dense", "--name", "few", "-w", copied).stderr
    assert f"second moments of inputs: those of {FACTORS}" in told and "Reading inputs" not in told
    view = Workspace.open(copied).view("quantise/few")
    rounding = CheckpointResults.read(view).rounding
    assert rounding is not None and rounding.windows == 16
    assert view.manifest is not None and view.manifest.config["inputs"] == "dense"
    model = load(copied / "truncate" / "energy-0.70" / CHECKPOINT, "cpu", "float32").requires_grad_(False)
    moments, found, grid = kept(copied), numbers(copied, "few"), Grid(4, 16, True)
    for spec in specs_of(Workspace.open(copied).view(FACTORS)):
        a, *b = (WeightRef(path).read(model) for path in matrices_of(model, spec))
        moment = moments[spec.name]
        expected = (
            round_product(*mixed_basis(a, b[0], moment), moment, grid) if b else (round_calibrated(a, moment, grid),)
        )
        for path, one in zip(matrices_of(model, spec), expected, strict=True):
            assert torch.equal(found[f"{path}.steps"], numbers_of(one)["steps"]), path


def test_the_inputs_of_the_dense_model_are_those_that_were_kept(copied: Path) -> None:
    done(*ROUND, "--name", "own", "-w", copied)
    done(*ROUND, "--inputs", "dense", "--name", "dense", "-w", copied)
    own, dense = numbers(copied, "own"), numbers(copied, "dense")
    assert own.keys() == dense.keys() and any(not torch.equal(dense[name], own[name]) for name in own)
    manifest = Workspace.open(copied).view("quantise/own").manifest
    assert manifest is not None and "inputs" not in manifest.config
    without_moments(copied)
    done("allocate", "--keep", 0.7, "--method", "energy", "-w", copied)
    done("truncate", "-w", copied)
    told = refused(ara(*ROUND, "--inputs", "dense", "--name", "read", "-w", copied), 2, "has kept no second moments")
    assert "--keep-moments yes" in told and not (copied / "quantise" / "read").exists()


def test_rounding_on_kept_moments_resumes_and_rounds_the_head(copied: Path, killed: Any) -> None:
    words = [*map(str, ROUND), "--embedding-bits", "8", "--inputs", "dense", "-w", str(copied)]
    done(*words, "--name", "one")
    killed("ara.stages.rounding_parts:RoundingParts.finish_part", 2, "after", *words, "--name", "two")
    assert "resuming: 2 blocks are rounded already" in done(*words, "--name", "two").stderr
    one, two = numbers(copied, "one"), numbers(copied, "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert "lm_head.steps" in one
