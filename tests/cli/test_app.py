"""The commands as people type them: help, streams, exit codes, JSON."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from ara.models.sources import ModelSource
from ara.pipeline import steps
from ara.version import __version__
from ara_cli.app import app
from tests.commands import ara, done
from tests.damage import contents, stamps
from tests.tiny import story

REPOSITORY = Path(__file__).resolve().parents[2]
GROUP = typer.main.get_command(app)
COMMANDS = {name: GROUP.get_command(None, name) for name in GROUP.list_commands(None)}
NAME = "energy-0.70"


@pytest.fixture
def words(tiny_llama, tiny_text):
    """Return the model and settings of the finished workspace, as `ara run` takes them."""
    settings = ["--text", tiny_text, "--samples", 16, "--seq-len", 48, "--device", "cpu", "--dtype", "float32"]
    measured = ["--tasks", tiny_text, "--eval-seq-len", 64, "--max-windows", 4, "--method", "energy"]
    return [tiny_llama, *settings, *measured]


@pytest.fixture
def each(words, tiny_text, tmp_path):
    """Return one full command line per command that does something."""
    place = ["-w", tmp_path / "ws"]
    return [
        ["decompose", *words[:-8], *place],
        ["allocate", "--keep", 0.7, "--method", "energy", *place],
        ["truncate", *place],
        ["eval", "--tasks", tiny_text, "--seq-len", 64, "--max-windows", 2, "--device", "cpu", *place],
        ["run", *words, "--keep", 0.6, *place],
        ["generate", "the river", "--max-new-tokens", 5, "--device", "cpu", *place],
        ["report", *place],
        ["status", *place],
        ["plan", words[0], "--no-probe", *words[3:9], *place],
        ["models"],
        ["methods"],
    ]


def test_help_lists_the_commands_in_the_order_of_the_pipeline():
    text = done("--help").stdout
    listed = re.findall(r"^  ([a-z-]+) ", text[text.index("Commands:") :], re.MULTILINE)
    others = ["compare", "bench", "report", "generate", "chat", "serve", "status", "models", "methods"]
    assert listed == ["plan", "run", *(stage.name for stage in steps()), *others]
    assert listed == list(COMMANDS)
    for stage in steps():
        assert f"  {stage.name} " in text
        assert stage.title in text


def test_help_without_words_and_in_short():
    assert done("-h").stdout == done("--help").stdout
    assert "Commands:" in ara().output


def test_help_of_the_program_imports_next_to_nothing():
    script = """
import sys
from typer.testing import CliRunner
from ara_cli.app import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
heavy = sorted(set(sys.modules) & {"torch", "transformers", "numpy", "pydantic", "safetensors", "ara.config"})
heavy += [name for name in sys.modules if name.startswith("ara_cli.commands")]
assert not heavy, heavy
print("checked")
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.stdout == "checked\n", result.stderr


def test_no_help_imports_torch_or_transformers():
    script = f"""
import sys
from typer.testing import CliRunner
from ara_cli.app import app
for command in {[[], *([name] for name in COMMANDS)]}:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0 and "Usage:" in result.stdout, command
    heavy = sorted(set(sys.modules) & {{"torch", "transformers", "datasets", "numpy", "onnxruntime", "lm_eval"}})
    assert not heavy, (command, heavy)
print("checked")
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert result.stdout == "checked\n", result.stderr


def test_version():
    assert done("--version").stdout == f"ara {__version__}\n"


def test_entry_points():
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"ara": "ara_cli.app:main", "ara-svd": "ara_cli.app:main"}
    assert (REPOSITORY / "ara_cli" / "__main__.py").is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_speaks_json_and_can_be_quiet(name):
    flags = {flag for parameter in COMMANDS[name].params for flag in parameter.opts}
    assert {"--json", "--quiet", "-q"} <= flags
    if name not in ("models", "methods"):
        assert {"--workspace", "-w"} <= flags


def test_json_is_exactly_one_document_for_every_command(each):
    keys = {
        "decompose": "results",
        "allocate": "results",
        "truncate": "results",
        "eval": "results",
        "run": "stages",
        "generate": "answer",
        "report": "results",
        "status": "next",
        "plan": "stages",
        "models": "models",
        "methods": "decompositions",
    }
    for command in each:
        result = done(*command, "--json")
        assert keys[command[0]] in json.loads(result.stdout), command
        assert "\x1b" not in result.output
    assert len(each) == len(keys)


def test_quiet_says_nothing_on_stderr_and_the_results_on_stdout(each):
    for command in each:
        result = done(*command, "-q")
        assert _without_chat_warning(result.stderr) == [], command
        assert result.stdout.strip(), command
        result = done(*command, "-q", "--json")
        assert _without_chat_warning(result.stderr) == [], command
        json.loads(result.stdout)


def _without_chat_warning(stderr):
    """Return the lines but one: the tiny model has a chat template, and its calibration text no conversation."""
    return [line for line in stderr.splitlines() if "the model has a chat template" not in line]


def test_words_tell_what_was_done_and_what_comes_next(each, tmp_path):
    following = {"decompose": "allocate", "allocate": "truncate", "truncate": "recover", "eval": "allocate"}
    for command in each[:4]:
        result = done(*command)
        assert f"Saved in {tmp_path}" in result.stderr
        assert f"Next: ara {following[command[0]]}" in result.stderr
        for output in (result.stdout, result.stderr):
            assert "\x1b" not in output
            assert "\r" not in output


def test_output_of_a_real_process_has_no_escape_codes(finished):
    """A pipe is no terminal, whatever FORCE_COLOR and TERM say of others."""
    env = {**os.environ, "NO_COLOR": "1", "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "ara_cli", "status", "-w", str(finished)]
    result = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    assert "decompose" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr


def test_status_shows_every_stage_and_state(copied):
    (copied / "truncate" / ".energy-0.50.partial").mkdir()
    manifest = copied / "eval" / f"{NAME}-{story()}" / "manifest.json"
    manifest.write_text("{")
    document = json.loads(done("status", "-w", copied, "--json").stdout)
    states = {(stage["stage"], stage["name"]): stage["state"] for stage in document["stages"]}
    assert states == {
        ("decompose", "two-sided"): "done",
        ("allocate", NAME): "done",
        ("truncate", NAME): "done",
        ("truncate", "energy-0.50"): "partial",
        ("eval", f"{NAME}-{story()}"): "damaged",
    }
    assert document["missing"] == ["train-masks", "recover", "quantise", "export"]
    assert document["next"] == f"ara recover -w {copied}"
    text = done("status", "-w", copied).stdout
    stages = [stage.name for stage in steps()]
    rows = [line.split()[0] for line in text.splitlines() if line.strip() and line.split()[0] in stages]
    assert list(dict.fromkeys(rows)) == stages


def test_status_changes_nothing(copied):
    before = stamps(copied)
    done("status", "-w", copied)
    assert stamps(copied) == before


def test_workspace_from_the_environment(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ara("status").exit_code == 1
    document = json.loads(done("status", "--json", env={"ARA_WORKSPACE": str(finished)}).stdout)
    assert document["workspace"] == str(finished)
    other = ara("status", "-w", tmp_path / "other", env={"ARA_WORKSPACE": str(finished)})
    assert str(tmp_path / "other") in other.stderr  # -w goes first


def test_default_workspace_is_in_the_current_folder(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARA_WORKSPACE", raising=False)
    done("decompose", *words[:-8], "-q")
    assert (tmp_path / "ara-workspace" / "workspace.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["ara-workspace"]


def test_error_with_json_is_the_one_document(tmp_path):
    result = ara("truncate", "-w", tmp_path / "none", "--json")
    assert result.exit_code == 1
    assert "there is no workspace" in json.loads(result.stdout)["error"]


def test_run_again_computes_nothing(copied, words, monkeypatch):
    """The finished workspace was made by the library with the same settings."""
    words = [*words, "--recover", "none"]
    done("run", *words, "--keep", "0.7", "-w", copied, "-q")
    before = {name: stamp for name, stamp in stamps(copied).items() if "/" in name}

    def load_model(self, *args):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(ModelSource, "load_model", load_model)
    result = done("run", *words, "--keep", "0.7", "-w", copied)
    assert {name: stamp for name, stamp in stamps(copied).items() if "/" in name} == before
    assert result.stderr.count("is there already") == 4
    assert "perplexity" in result.stdout  # the figures are shown again


def test_run_with_several_budgets(copied, words):
    before = stamps(copied / "decompose")
    document = json.loads(done("run", *words, "--keep", 0.8, "--keep", 0.6, "-w", copied, "--json").stdout)
    assert [(Path(stage["path"]).parent.name, stage["name"]) for stage in document["stages"]] == [
        ("decompose", "two-sided"),
        ("allocate", "energy-0.80"),
        ("truncate", "energy-0.80"),
        ("recover", "energy-0.80-closed"),
        ("eval", f"energy-0.80-closed-{story()}"),
        ("allocate", "energy-0.60"),
        ("truncate", "energy-0.60"),
        ("recover", "energy-0.60-closed"),
        ("eval", f"energy-0.60-closed-{story()}"),
    ]
    assert stamps(copied / "decompose") == before
    sizes = [stage["results"]["disk_bytes"] for stage in document["stages"] if stage["path"].count("/truncate/")]
    assert sizes[0] > sizes[1]


def test_run_with_remove_and_without_eval(copied, words):
    document = json.loads(done("run", *words, "--remove", 0.45, "--no-eval", "-w", copied, "--json").stdout)
    assert [stage["name"] for stage in document["stages"]] == [
        "two-sided",
        "energy-0.55",
        "energy-0.55",
        "energy-0.55-closed",
    ]
    assert document["stages"][1]["config"]["keep"] == 0.55


def test_run_learns_ranks_from_as_many_windows_as_asked_for(copied, words):
    asked = ("-m", "sensitivity", "--rank-samples", 3, "--held-out", 1)
    document = json.loads(done("run", *words, *asked, "--no-eval", "-w", copied, "--json").stdout)
    made = document["stages"][1]["config"]
    assert (made["samples"], made["held_out"]) == (3, 1)


def test_allocate_takes_remove_ranks_and_factors(copied):
    assert (
        json.loads(done("allocate", "--remove", 0.2, "-m", "energy", "-w", copied, "--json").stdout)["name"]
        == "energy-0.80"
    )
    file = copied / "allocate" / "energy-0.80" / "ranks.json"
    document = json.loads(file.read_text())
    document["ranks"]["model.layers.0.mlp.up_proj"] = 2
    (copied.parent / "mine.json").write_text(json.dumps(document))
    words = ("--ranks", copied.parent / "mine.json", "--factors", "two-sided", "--name", "edited")
    result = json.loads(done("allocate", *words, "-w", copied, "--json").stdout)
    assert result["name"] == "edited"
    assert result["config"]["keep"] is None
    assert json.loads((copied / "allocate" / "edited" / "ranks.json").read_text())["ranks"] == document["ranks"]


def test_manifest_keeps_the_words_that_were_typed(copied, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ara", "allocate", "--keep", "0.5", "--name", "it's"])
    done("allocate", "--keep", "0.5", "--name", "it's", "-w", copied)
    manifest = json.loads((copied / "allocate" / "it's" / "manifest.json").read_text())
    assert shlex.split(manifest["command"]) == ["ara", "allocate", "--keep", "0.5", "--name", "it's"]


def test_ctrl_c_is_no_traceback(copied, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ara.stages.allocate.load_modules", interrupted)
    before = contents(copied / "allocate")
    result = ara("allocate", "--keep", "0.5", "-w", copied)
    assert result.exit_code == 130
    assert "warning: interrupted" in result.stderr
    assert "Traceback" not in result.output
    assert contents(copied / "allocate") == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "nonsense"), "error: unknown allocator 'nonsense'"),
        (("--method", "tanh", "--layout", "pivoted"), "error: "),
        (("--tasks", "file:/none.txt"), "error: "),
        (("--remove", "0.9999999999999999"), "keep: input should be greater than 0"),
    ],
)
def test_run_refuses_what_a_later_stage_cannot_use_before_the_first(tiny_llama, tiny_text, tmp_path, words, said):
    result = ara("run", tiny_llama, "--text", tiny_text, "--tasks", tiny_text, *words, "-w", tmp_path / "ws")
    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert "Decomposing" not in result.stderr
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_an_empty_value_is_no_default(name):
    """`--name "$NAME"` with an unset variable must not give the default name."""
    texts = {"--name", "--checkpoint", "--export", "--factors", "--masks", "--revision", "--methods", "-w"}
    model = {"plan": ["m"], "decompose": ["m"], "run": ["m"], "generate": ["hi"]}.get(name, [])
    for parameter in COMMANDS[name].params:
        for flag in texts & set(parameter.opts):
            result = ara(name, *model, flag, "")
            assert result.exit_code == 2, (flag, result.output)
            assert "it is empty" in result.stderr
