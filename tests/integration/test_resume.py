"""Processes killed in the middle of a stage, for real, and what the next command makes of it."""

import json
import shutil
from pathlib import Path

import pytest

from ara.config import AllocateConfig, DecomposeConfig, EvalConfig, TruncateConfig
from ara.errors import WorkspaceError
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.evaluate import evaluate
from ara.stages.truncate import truncate
from ara.workspace.manifest import read_manifest, verify_files
from ara.workspace.store import Workspace
from tests.commands import ara, decompose_arguments, done
from tests.damage import contents, flip, listing, stamps
from tests.recorder import Recorder
from tests.tiny import save_tiny, story

REPOSITORY = Path(__file__).resolve().parents[2]
NAME = "energy-0.70"


def status(root):
    stages = json.loads(done("status", "-w", root, "--json").stdout)["stages"]
    return {f"{stage['stage']}/{stage['name']}": stage["state"] for stage in stages}


@pytest.fixture(scope="session")
def killed_root(tmp_path_factory, tiny_settings, killed):
    """A workspace whose decomposition was killed after two of three blocks; only to be read."""
    root = tmp_path_factory.mktemp("killed") / "ws"
    settings = {**tiny_settings, "moment_memory": 1e-6}  # one block per pass
    killed("ara.workspace.writer:StageWriter.tensors", 5, "before", *decompose_arguments(settings, root))
    return root


@pytest.fixture
def cut(killed_root, tmp_path):
    return Path(shutil.copytree(killed_root, tmp_path / "cut"))


def test_killed_decomposition_leaves_a_part_that_status_shows(cut):
    partial = cut / "decompose" / ".two-sided.partial"
    blocks = {f"{kind}-{layer:03d}.safetensors" for kind in ("layer", "moments") for layer in (0, 1)}
    assert listing(partial) == {*blocks, ".journal.json"}
    assert not (cut / "decompose" / "two-sided").exists()
    assert status(cut) == {"decompose/two-sided": "partial"}
    result = ara("allocate", "-w", str(cut))
    assert result.exit_code == 1
    assert "has no result of ara decompose yet" in result.stderr


def test_killed_decomposition_goes_on_and_gives_the_same_bytes(cut, finished, tiny_settings):
    partial = cut / "decompose" / ".two-sided.partial"
    before = {name: stamp for name, stamp in stamps(partial).items() if name.endswith(".safetensors")}
    heard = Recorder()
    config = DecomposeConfig(**{**tiny_settings, "moment_memory": 1e-6})
    view = decompose(config, Run(cut, report=heard))
    assert "resuming after an interruption: 2 blocks are done" in heard.facts
    assert heard.bars == [
        f"{what} blocks 3 to 3" for what in ("Reading inputs of", "Reading gradients of", "Factoring")
    ]
    after = stamps(view.path)
    assert {name: after[name] for name in before} == before  # not written again
    assert not partial.exists()
    assert contents(view.path, "*.safetensors") == contents(finished / "decompose" / "two-sided", "*.safetensors")
    manifest = read_manifest(view.path)
    verify_files(view.path, manifest)
    uninterrupted = read_manifest(finished / "decompose" / "two-sided")
    assert manifest.tensors == uninterrupted.tensors
    assert manifest.files == uninterrupted.files
    assert manifest.results == uninterrupted.results
    assert listing(cut) == {
        "workspace.json",
        ".lock",
        *(f"cache/{name}" for name in listing(cut / "cache")),
        *(f"decompose/two-sided/{name}" for name in (*manifest.files, "manifest.json")),
    }


@pytest.mark.parametrize("other", [{"seed": 5}, {"batch_size": 1}], ids=str)
def test_part_made_with_other_settings_is_not_gone_on_with(cut, tiny_settings, other):
    heard = Recorder()
    config = DecomposeConfig(**{**tiny_settings, "moment_memory": 1e-6, **other})
    view = decompose(config, Run(cut, report=heard))
    assert not any("going on" in fact for fact in heard.facts)
    assert "Factoring blocks 1 to 1" in heard.bars
    verify_files(view.path, view.manifest)


def test_part_with_a_damaged_file_is_not_gone_on_with(cut, finished, tiny_settings):
    flip(cut / "decompose" / ".two-sided.partial" / "layer-000.safetensors", -5)
    heard = Recorder()
    view = decompose(DecomposeConfig(**{**tiny_settings, "moment_memory": 1e-6}), Run(cut, report=heard))
    assert not any("going on" in fact for fact in heard.facts)
    assert contents(view.path, "*.safetensors") == contents(finished / "decompose" / "two-sided", "*.safetensors")


def test_part_belongs_to_its_model(cut, tiny_text, tmp_path):
    other = save_tiny(tmp_path / "other", "qwen3")
    before = contents(cut / "decompose")
    with pytest.raises(WorkspaceError, match="belongs to"):
        decompose(DecomposeConfig(model=str(other), text=tiny_text, samples=2, seq_len=40, device="cpu"), Run(cut))
    assert contents(cut / "decompose") == before


def test_killed_before_the_first_layer_starts_over(killed, tmp_path, tiny_settings, finished):
    root = tmp_path / "ws"
    killed("ara.stages.factoring:_factor", 4, "after", *decompose_arguments(tiny_settings, root))
    assert status(root) == {"decompose/two-sided": "partial"}
    view = decompose(DecomposeConfig(**tiny_settings), Run(root))
    assert contents(view.path, "*.safetensors") == contents(finished / "decompose" / "two-sided", "*.safetensors")
    assert status(root) == {"decompose/two-sided": "done"}


def test_killed_while_its_manifest_is_written_goes_on(killed, tmp_path, tiny_settings):
    """All layers are there: nothing is computed again."""
    root = tmp_path / "ws"
    killed("ara.workspace.manifest:Manifest.sealed", 1, "after", *decompose_arguments(tiny_settings, root))
    heard = Recorder()
    view = decompose(DecomposeConfig(**tiny_settings), Run(root, report=heard))
    assert "resuming after an interruption: 3 blocks are done" in heard.facts
    assert heard.bars == []
    assert listing(view.path) == {*view.manifest.files, "manifest.json"}


@pytest.mark.parametrize(
    ("stage", "place", "after"),
    [
        ("truncate", "ara.stages.truncate:model_card", "before"),
        ("eval", "ara.stages.measure:interleaved_perplexity", "after"),
    ],
)
def test_killed_truncate_and_eval_leave_a_part_that_the_next_run_replaces(
    killed, copied, tiny_text, stage, place, after
):
    result = NAME if stage == "truncate" else f"{NAME}-{story()}"
    first = {name: sha for name, sha in contents(copied / stage / result).items() if name.endswith(".safetensors")}
    shutil.rmtree(copied / stage / result)
    words = ["--seq-len", "64", "--max-windows", "2", "--tasks", tiny_text, "--device", "cpu", "--dtype", "float32"]
    killed(place, 1, after, stage, "-w", str(copied), *(words if stage == "eval" else ()))
    partial = copied / stage / f".{result}.partial"
    assert partial.is_dir()
    assert status(copied)[f"{stage}/{result}"] == "partial"
    assert status(copied)["decompose/two-sided"] == status(copied)[f"allocate/{NAME}"] == "done"
    (partial / "stray").write_text("of the killed process")
    if stage == "truncate":
        view = truncate(TruncateConfig(), Run(copied))
    else:
        config = EvalConfig(tasks=(tiny_text,), seq_len=64, max_windows=2, device="cpu", dtype="float32")
        view = evaluate(config, Run(copied))
    assert not partial.exists()
    card = {"checkpoint/README.md"} if stage == "truncate" else set()
    assert listing(view.path) == {*view.manifest.files, *card, "manifest.json"}
    assert "stray" not in view.manifest.files
    assert {name: sha for name, sha in contents(view.path).items() if name in first} == first
    assert Workspace.open(copied).require(view.kind).key == f"{stage}/{result}"


def test_killed_between_the_renames_keeps_the_older_result(killed, copied):
    before = contents(copied / "allocate" / NAME)
    # --force: the first rename moves the older result away, the second would bring the new one.
    killed("os:replace", 2, "before", "allocate", "--keep", "0.7", "--method", "energy", "--force", "-w", str(copied))
    assert status(copied)[f"allocate/{NAME}"] == "partial"
    allocate(AllocateConfig(keep=0.5, method="energy"), Run(copied))  # any command that writes puts things right
    assert contents(copied / "allocate" / NAME) == before
    assert not list((copied / "allocate").glob(".*.old"))
    assert Workspace.open(copied).require("ranks", NAME).state == "done"
