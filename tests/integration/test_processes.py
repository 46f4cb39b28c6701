"""Commands in several real processes, as torchrun starts them: results, failures, resuming."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ara.allocation.energy import Energy
from ara.artifacts.checkpoint import CheckpointResults
from ara.artifacts.training import TrainingResults
from ara.config import AllocateConfig, DecomposeConfig, EvalConfig
from ara.distributed.group import Group
from ara.distributed.launch import Launch
from ara.errors import UsageError
from ara.solver.problem import Budget
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.evaluate import evaluate
from ara.stages.modules import load_modules
from ara.stages.recover import DETAILS
from ara.workspace.manifest import read_manifest
from ara.workspace.store import Workspace
from tests.commands import decompose_arguments
from tests.damage import contents, listing
from tests.forks import REPOSITORY, free_port, killed_at, raising_at, with_value
from tests.tiny import save_tiny
from tests.training import NAME, train_words

FACTOR = "ara.stages.factoring:_factor"
# A rank that dies must end the others within this time.
SECONDS = 30


def spoken(processes):
    """Return the errors and hints that all processes have printed."""
    lines = "".join(ended.output for ended in processes).splitlines()
    return [line for line in lines if line.startswith(("error: ", "hint: ", "Traceback"))]


def only_error(processes):
    """Return the one error that all processes have printed."""
    found = [line for line in spoken(processes) if not line.startswith("hint: ")]
    assert len(found) == 1, "\n".join(ended.output for ended in processes)
    return found[0]


def succeeded(processes):
    for ended in processes:
        assert ended.code == 0, ended.output
    assert [ended.output for ended in processes[1:]] == [""] * (len(processes) - 1)
    return processes[0].output


def spectra(folder):
    return {
        name: tensor
        for path in sorted(folder.glob("layer-*.safetensors"))
        for name, tensor in load_file(path).items()
        if name.endswith(".spectrum")
    }


def assert_same_factors(one, other):
    """Sums of float32 numbers in another order differ in their last bits."""
    first, second = spectra(one.path), spectra(other.path)
    assert first.keys() == second.keys()
    for name, spectrum in first.items():
        torch.testing.assert_close(second[name], spectrum, rtol=1e-5, atol=1e-5 * float(spectrum[0]))
    ranks = []
    for view in (one, other):
        modules = load_modules(view, "factors")
        budget = Budget.for_keep([module.spec for module in modules], 0.7)
        ranks.append(dict(Energy().allocate(modules, budget).ranks))
    assert ranks[0] == ranks[1]


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory, forks, tiny_settings):
    """A workspace whose decomposition was made by two processes, one block at a time; only to be read."""
    root = tmp_path_factory.mktemp("shared") / "ws"
    output = succeeded(forks.run(decompose_arguments({**tiny_settings, "moment_memory": 1e-6}, root), size=2))
    assert output.count("Decomposing") == 1
    return root


@pytest.fixture(scope="module")
def killed_helper(tmp_path_factory, forks, tiny_settings):
    """A workspace whose decomposition ended when process 1 was killed in the second of three blocks."""
    root = tmp_path_factory.mktemp("killed") / "ws"
    arguments = decompose_arguments({**tiny_settings, "moment_memory": 1e-6}, root)
    factored = 7 // 2 + 1
    return root, forks.run(arguments, size=2, faults=[killed_at(FACTOR, factored + 1, rank=1)])


def test_two_processes_give_the_factors_of_one(shared_root, finished):
    view, alone = (Workspace.open(root).require("factors") for root in (shared_root, finished))
    assert_same_factors(alone, view)
    made, expected = view.manifest, alone.manifest
    assert made.config == {**expected.config, "moment_memory": 1e-6}
    assert made.results == expected.results
    assert made.files.keys() == expected.files.keys()
    assert {name: record.shape for name, record in made.tensors.items()} == {
        name: record.shape for name, record in expected.tensors.items()
    }
    for path in view.path.glob("moments-*.safetensors"):
        for name, moment in load_file(path).items():
            torch.testing.assert_close(moment, load_file(alone.path / path.name)[name], rtol=1e-5, atol=1e-6)


def test_experts_that_share_a_factor(forks, tiny_settings, tmp_path):
    settings = {**tiny_settings, "model": str(save_tiny(tmp_path / "model", "mixtral"))}
    succeeded(forks.run([*decompose_arguments(settings, tmp_path / "two"), "--share-experts"], size=2))
    view = decompose(DecomposeConfig(**settings, share_experts=True), Run(tmp_path / "one"))
    assert_same_factors(view, Workspace.open(tmp_path / "two").require("factors"))


def test_a_method_without_text_gives_the_same_bytes(forks, tiny_settings, tmp_path):
    settings = {"model": tiny_settings["model"], "method": "plain", "device": "cpu", "dtype": "float32"}
    succeeded(forks.run(decompose_arguments(settings, tmp_path / "two"), size=2))
    view = decompose(DecomposeConfig(**settings), Run(tmp_path / "one"))
    two = tmp_path / "two" / "decompose" / "plain"
    assert contents(two, "*.safetensors") == contents(view.path, "*.safetensors")
    assert read_manifest(two).id == view.manifest.id


def test_more_processes_than_windows(forks, tiny_settings, tmp_path):
    settings = {**tiny_settings, "samples": 2, "method": "whitened"}
    succeeded(forks.run(decompose_arguments(settings, tmp_path / "three"), size=3))
    view = decompose(DecomposeConfig(**settings), Run(tmp_path / "one"))
    assert_same_factors(view, Workspace.open(tmp_path / "three").require("factors"))


def test_a_second_run_finds_the_result_whatever_the_number_of_processes(forks, shared_root, tiny_settings, tmp_path):
    root = Path(shutil.copytree(shared_root, tmp_path / "ws"))
    before = contents(root)
    arguments = decompose_arguments({**tiny_settings, "moment_memory": 1e-6}, root)
    for size in (1, 2):
        assert "is there already" in succeeded(forks.run(arguments, size=size))
    assert contents(root) == before


def test_three_processes_exchange_tensors_and_objects(forks):
    for ended in forks.call("tests.group_checks:check_exchange", size=3):
        assert (ended.code, ended.output) == (0, "")


# -- failures ----------------------------------------------------------------------------------------------------


def test_a_killed_helper_ends_the_run_with_one_line(killed_helper):
    _, (writer, helper) = killed_helper
    assert helper.code == -signal.SIGKILL
    assert writer.code == 1
    assert writer.seconds < helper.seconds + SECONDS
    assert only_error([writer, helper]) == "error: another process of this run has ended"


@pytest.mark.parametrize("size", [1, 2])
def test_a_rerun_resumes(killed_helper, forks, shared_root, tiny_settings, tmp_path, size):
    root = Path(shutil.copytree(killed_helper[0], tmp_path / "ws"))
    arguments = decompose_arguments({**tiny_settings, "moment_memory": 1e-6}, root)
    output = succeeded(forks.run(arguments, size=size))
    assert "resuming after an interruption: 1 blocks are done" in output
    found, expected = root / "decompose" / "two-sided", shared_root / "decompose" / "two-sided"
    assert listing(found) == listing(expected)
    if size == 2:
        assert contents(found, "*.safetensors") == contents(expected, "*.safetensors")
    else:
        assert_same_factors(*(Workspace.open(folder).require("factors") for folder in (root, shared_root)))


def test_a_killed_writer_ends_the_run_with_one_line(forks, tiny_settings, tmp_path):
    arguments = decompose_arguments(tiny_settings, tmp_path / "ws")
    writer, helper = forks.run(arguments, size=2, faults=[killed_at(FACTOR, 2)])
    assert writer.code == -signal.SIGKILL
    assert helper.code == 1
    assert helper.seconds < writer.seconds + SECONDS
    assert only_error([writer, helper]).startswith("error: another process of this run has ended")


def test_the_error_of_a_helper_is_the_only_message(forks, tiny_settings, tmp_path):
    arguments = decompose_arguments(tiny_settings, tmp_path / "ws")
    processes = forks.run(arguments, size=2, faults=[raising_at(FACTOR, "broken weight", rank=1)])
    assert [ended.code for ended in processes] == [1, 1]
    assert only_error(processes) == "error: broken weight"
    assert processes[1].output == "error: broken weight\nhint: no hint\n"


def test_an_error_of_all_processes_is_reported_once(forks, tiny_settings, tmp_path):
    arguments = decompose_arguments({**tiny_settings, "model": str(tmp_path / "missing")}, tmp_path / "ws")
    processes = forks.run(arguments, size=2)
    assert [ended.code for ended in processes] == [1, 1]
    assert "missing" in only_error(processes)
    assert not (tmp_path / "ws").exists()


def test_a_late_process_knows_that_the_error_is_reported(forks):
    assert [ended.code for ended in forks.call("tests.group_checks:check_late_process", 2)] == [0, 0]


def test_unequal_versions_are_refused(forks, tiny_settings, tmp_path):
    faults = [with_value("ara.version:__version__", "9.9", rank=1)]
    processes = forks.run(decompose_arguments(tiny_settings, tmp_path / "ws"), size=2, faults=faults)
    assert [ended.code for ended in processes] == [1, 1]
    error = only_error(processes)
    assert error.startswith("error: the version of ara is not the same in all processes: ")
    assert error.endswith("9.9 in process 1")


def test_usage_errors_are_printed_once(forks, tmp_path):
    processes = forks.run(["decompose", "x", "--samples", "many", "-w", tmp_path / "ws"], size=2)
    assert [ended.code for ended in processes] == [2, 2]
    assert processes[1].output == ""
    assert "--samples" in processes[0].output


def test_a_locked_workspace_ends_all(forks, finished, tiny_settings, tmp_path):
    root = Path(shutil.copytree(finished, tmp_path / "ws"))
    with Workspace.open(root).lock("ara test"):
        processes = forks.run(decompose_arguments({**tiny_settings, "seed": 3}, root), size=2)
    assert [ended.code for ended in processes] == [1, 1]
    assert "is being written by process" in only_error(processes)


# -- masks and ranks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, forks, finished):
    """Workspaces with masks trained and ranks allocated by one and by two processes; only to be read."""
    roots = []
    for size in (1, 2):
        root = Path(shutil.copytree(finished, tmp_path_factory.mktemp("trained") / "ws"))
        output = succeeded(forks.run(train_words(root), size=size))
        assert "step 4 of 4" in output
        words = ["--samples", 8, "--held-out", 4, "--device", "cpu", "--dtype", "float32", "-w", root]
        succeeded(forks.run(["allocate", "--method", "sensitivity", "--keep", 0.6, *words], size=size))
        roots.append(root)
    return roots


def test_tables_of_two_processes_are_those_of_one(trained):
    one, two = (load_file(root / "train-masks" / NAME / "sensitivity.safetensors") for root in trained)
    assert one.keys() == two.keys()
    for name, table in one.items():
        torch.testing.assert_close(two[name], table, rtol=1e-5, atol=1e-9)


def test_a_training_in_two_processes_is_that_of_one(trained):
    one, two = (TrainingResults.read(Workspace.open(root).require("training")) for root in trained)
    assert one.budgets.keys() == two.budgets.keys()
    for keep, budget in one.budgets.items():
        other = two.budgets[keep]
        assert other.ranks == budget.ranks
        assert other.start_held_out == pytest.approx(budget.start_held_out, rel=1e-6)
        assert other.held_out == pytest.approx(budget.held_out, rel=1e-6)
        assert other.backward_passes == budget.backward_passes
    for keep, rows in one.log.items():
        assert [row.loss for row in rows[1:]] == pytest.approx([row.loss for row in two.log[keep][1:]], rel=1e-6)


def test_ranks_of_two_processes_are_those_of_one(trained):
    one, two = (contents(root / "allocate" / "sensitivity-0.60", "ranks.json") for root in trained)
    assert one == two


def test_a_training_resumes_in_two_processes(trained, forks, finished, tmp_path):
    root = Path(shutil.copytree(finished, tmp_path / "ws"))
    fault = killed_at("ara.masks.model:MaskedModel.gradients", 3, rank=1)
    processes = forks.run(train_words(root), size=2, faults=[fault])
    assert only_error(processes) == "error: another process of this run has ended"
    assert "resuming after step 2 of 4" in succeeded(forks.run(train_words(root), size=2))
    found, expected = (folder / "train-masks" / NAME for folder in (root, trained[1]))
    assert contents(found, "*.safetensors") == contents(expected, "*.safetensors")


@pytest.fixture(scope="module")
def asked(tmp_path_factory, tiny_text):
    """Words of an evaluation on a text, on conversations of which one has no answer, and on a task."""
    folder = tmp_path_factory.mktemp("asked")
    said = (("Who bakes?", "The baker."), ("Where is the river?", None), ("How many?", "Twelve, and one more."))
    rows = []
    for question, answer in said:
        answers = [] if answer is None else [{"role": "assistant", "content": answer}]
        rows.append({"messages": [{"role": "user", "content": question}, *answers]})
    (folder / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = "".join(json.dumps({"goal": f"goal {n}", "label": n % 2}) + "\n" for n in range(5))
    (folder / "questions.jsonl").write_text(questions)
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": str(folder / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Is it {{goal}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / "mine.yaml").write_text(json.dumps(task))
    names = f"{tiny_text},chat:{folder / 'said.jsonl'},mine"
    settings = ["--seq-len", 64, "--max-windows", 5, "--batch-size", 2, "--max-new-tokens", 4, "--name", "all"]
    return ["eval", "--tasks", names, "--include-path", folder / "tasks", *settings, "--device", "cpu", "-q"]


def pieces(root):
    """Return the finished pieces of an evaluation without speeds, by file."""
    found = {path.name: json.loads(path.read_text()) for path in sorted((root / "eval" / "all").glob("*.*-*.json"))}
    for piece in found.values():
        piece.pop("tokens_per_second", None)
    return found


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, forks, finished, asked):
    """Two workspaces with one evaluation, made by one process and by two."""
    roots = [Path(shutil.copytree(finished, tmp_path_factory.mktemp("evaluated") / "ws")) for _ in range(2)]
    for number, root in enumerate(roots, start=1):
        succeeded(forks.run([*asked, "-w", root], size=number))
    return roots


def test_an_evaluation_in_two_processes_is_that_of_one(evaluated):
    one, two = map(pieces, evaluated)
    assert len(one) == 3 * 5 and one.keys() == two.keys()
    for name, piece in one.items():
        found, expected = flat(two[name]), flat(piece)
        assert [type(value) for value in found] == [type(value) for value in expected], name
        numbers = [[value for value in values if isinstance(value, float)] for values in (found, expected)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-6, abs=1e-9), name
        assert all(a == b for a, b in zip(found, expected, strict=True) if not isinstance(b, float)), name
    results = [Workspace.open(root).require("evaluation").manifest.results for root in evaluated]
    assert results[0]["variants"] == results[1]["variants"]
    assert [list(found["tasks"]) for found in results] == [list(results[0]["tasks"])] * 2


def flat(data):
    """Return all numbers and words of JSON data, in order."""
    if isinstance(data, dict):
        data = list(data.values())
    return [part for item in data for part in flat(item)] if isinstance(data, list) else [data]


def test_an_evaluation_resumes_in_two_processes(evaluated, forks, finished, asked, tmp_path):
    root = Path(shutil.copytree(finished, tmp_path / "ws"))
    fault = killed_at("ara.stages.chats:is_silent", 2, rank=1)
    processes = forks.run([*asked, "-w", root], size=2, faults=[fault])
    assert only_error(processes) == "error: another process of this run has ended"
    begun = {path.name for path in root.glob("eval/.all.partial/*.*-*.json")}
    assert begun and begun < pieces(evaluated[1]).keys()
    succeeded(forks.run([*asked, "-w", root], size=2))
    assert pieces(root) == pieces(evaluated[1])


def test_more_processes_than_questions(forks, finished, asked, evaluated, tmp_path):
    root = Path(shutil.copytree(finished, tmp_path / "ws"))
    succeeded(forks.run([*asked, "--limit", 1, "--max-windows", 1, "-w", root], size=2))
    few = Workspace.open(root).require("evaluation").manifest.results["tasks"]
    assert few["mine"]["examples"] == 1
    many = pieces(evaluated[0])
    for name, piece in pieces(root).items():
        if "window_nlls" in piece:
            assert piece["window_nlls"] == pytest.approx(many[name]["window_nlls"][:1], rel=1e-6)


def test_an_export_is_evaluated_in_one_process(finished):
    with pytest.raises(UsageError, match="--backend onnx is given, and there are 2 processes"):
        evaluate(EvalConfig(backend="onnx"), Run(finished, group=Two()), find_export=lambda *_: None)


class Two(Group):
    """The first of two processes, without the second one."""

    launch = Launch(0, 2, 0, 2)


@pytest.mark.parametrize("given", [{"size": "1MB"}, {"keep": 0.7, "objective": "latency"}], ids=str)
def test_what_is_measured_in_one_process_is_refused(finished, given):
    with pytest.raises(UsageError, match="is given, and there are 2 processes"):
        allocate(AllocateConfig(**given), Run(finished, group=Two()))


# -- repair --------------------------------------------------------------------------------------------------------

REPAIR = (
    *("recover", "--level", "distill", "--device", "cpu", "--dtype", "float32"),
    *("--samples", 7, "--held-out", 4, "--batch-size", 3, "--block-epochs", 1, "--block-rate", 1e-4),
    *("--steps", 3, "--batch", 4, "--check-every", 1, "--save-every", 1),
)
REPAIRED = "energy-0.70-distill"
# What is chosen for a layer.
PARTS = ("beta", "damping", "gamma")


@pytest.fixture(scope="module")
def repaired(tmp_path_factory, forks, finished):
    """Two workspaces with a checkpoint repaired at all levels, by one process and by two; only to be read."""
    roots = [Path(shutil.copytree(finished, tmp_path_factory.mktemp("repaired") / "ws")) for _ in range(2)]
    for number, root in enumerate(roots, start=1):
        assert "Level distill" in succeeded(forks.run([*REPAIR, "-w", root], size=number))
    return roots


def assert_same_repair(one, other):
    """Compare all figures with those of one process; the tolerances are those of docs/processes.md."""
    views = [Workspace.open(root).require("checkpoint", f"recover/{REPAIRED}") for root in (one, other)]
    assert views[0].manifest.config == views[1].manifest.config
    assert views[0].manifest.tensors.keys() == views[1].manifest.tensors.keys()
    alone, found = (json.loads((view.path / DETAILS).read_text()) for view in views)
    assert alone["closed"]["layers"].keys() == found["closed"]["layers"].keys()
    for name, choice in alone["closed"]["layers"].items():
        same = found["closed"]["layers"][name]
        assert [same[key] for key in PARTS] == [choice[key] for key in PARTS], name
        assert [same["before"], same["after"]] == pytest.approx([choice["before"], choice["after"]], rel=1e-5), name
    for block, same in zip(alone["block"]["blocks"], found["block"]["blocks"], strict=True):
        assert same == pytest.approx(block, rel=1e-3)
    assert found["distill"]["held_out_kl"] == pytest.approx(alone["distill"]["held_out_kl"], rel=1e-3)
    levels = [CheckpointResults.read(view).recovery.levels for view in views]
    for level, same in zip(*levels, strict=True):
        assert (same.level, same.tokens, same.kept) == (level.level, level.tokens, level.kept)
        assert [same.before, same.after] == pytest.approx([level.before, level.after], rel=1e-3)


def test_a_repair_in_two_processes_is_that_of_one(repaired):
    assert_same_repair(*repaired)
    changed = CheckpointResults.read(Workspace.open(repaired[0]).require("checkpoint", f"recover/{REPAIRED}")).recovery
    assert any(level.kept for level in changed.levels)


def test_a_repaired_checkpoint_is_found_whatever_the_number_of_processes(repaired, forks):
    before = contents(repaired[1])
    assert "is there already" in succeeded(forks.run([*REPAIR, "-w", repaired[1]], size=3))
    assert contents(repaired[1]) == before


@pytest.mark.parametrize(
    ("place", "size"),
    [
        ("ara.recovery.closed:_Correction._block", 1),
        ("ara.recovery.block:_Training._train", 2),
        ("ara.recovery.distill:_Training._step", 2),
    ],
)
def test_a_repair_resumes(repaired, forks, finished, tmp_path, place, size):
    root = Path(shutil.copytree(finished, tmp_path / "ws"))
    processes = forks.run([*REPAIR, "-w", root], size=2, faults=[killed_at(place, 3, rank=1)])
    assert processes[1].code == -signal.SIGKILL
    assert only_error(processes) == "error: another process of this run has ended"
    done = {path.name for path in root.glob(f"recover/.{REPAIRED}.partial/.*")}
    output = succeeded(forks.run([*REPAIR, "-w", root], size=size))
    if place.startswith("ara.recovery.distill"):
        assert "resuming after step 2 of 3" in output
    else:
        assert {name.rpartition(":")[2] for name in done} >= {"block-000.safetensors", "block-001.safetensors"}
    found, expected = (folder / "recover" / REPAIRED for folder in (root, repaired[1]))
    assert listing(found) == listing(expected)
    if size == 2:
        assert contents(found, "checkpoint/*.safetensors") == contents(expected, "checkpoint/*.safetensors")
    else:
        assert_same_repair(repaired[0], root)


@pytest.mark.parametrize("what", ["levels", "experts"])
def test_all_processes_have_the_same_model_after_a_repair(forks, what):
    for ended in forks.call(f"tests.repair_checks:check_{what}", size=3):
        assert (ended.code, ended.output) == (0, "")


def test_more_processes_than_windows_of_a_repair(forks, finished, tmp_path):
    root = Path(shutil.copytree(finished, tmp_path / "ws"))
    processes = forks.run(["recover", "--samples", 6, "--held-out", 2, "-w", root], size=3)
    assert [ended.code for ended in processes] == [2, 2, 2]
    assert only_error(processes) == "error: there are 3 processes, and 2 windows to choose by"
    assert not list((root / "recover").glob("*"))


# -- torchrun ------------------------------------------------------------------------------------------------------


def torchrun(script, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_torchrun_ends_the_others_while_they_compute(tiny_settings, tmp_path):
    """Process 1 is killed; process 0 waits for nobody, and would go on for two minutes."""
    script = tmp_path / "script.py"
    arguments = decompose_arguments(tiny_settings, tmp_path / "ws")
    script.write_text(
        "import os, signal, sys, time\n"
        "import ara.stages.factoring as factoring\n"
        "from ara_cli.app import main\n"
        "def stuck(*args):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        time.sleep(1)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    for _ in range(1200):\n"
        "        time.sleep(0.1)\n"
        "factoring._factor = stuck\n"
        f"sys.argv = ['ara', *{arguments!r}]\n"
        "main()\n"
    )
    done = torchrun(script, "--master-port", str(free_port()))
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == ["error: another process of this run has failed, or the job was cancelled (SIGTERM)"], done.stderr
    assert done.stdout == ""
