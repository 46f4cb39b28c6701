"""Every option of every command with values that nobody means: one line, a known exit code, never a traceback."""

import shutil

import pytest

from ara.errors import AraError
from ara.models.sources import ModelSource
from ara_cli.app import app
from tests.commands import ara
from tests.odd import NOT_UTF8, commands, odd_lines

COMMANDS = commands()
# A valid command line each, apart from the workspace; MODEL and TEXT are put in.
VALID = {
    "plan": ["MODEL", "--seq-len", "48"],
    "run": ["MODEL", "--text", "TEXT", "--samples", "4", "--seq-len", "48", "--tasks", "TEXT"],
    "decompose": ["MODEL", "--text", "TEXT", "--samples", "4", "--seq-len", "48"],
    "train-masks": [],
    "allocate": ["--method", "gumbel"],
    "truncate": [],
    "recover": [],
    "quantise": ["--bits", "8"],
    "eval": ["--tasks", "TEXT"],
    "export": [],
    "compare": ["--tasks", "TEXT"],
    "bench": ["--prefill", "16", "--decode", "16"],
    "report": [],
    "generate": ["hello"],
    "chat": [],
    "serve": [],
    "status": [],
    "models": [],
    "methods": [],
}


class CutShort(AraError):
    """Everything was valid, and the work would begin."""


@pytest.fixture
def no_work(monkeypatch, tmp_path):
    """End where real work begins: every setting has been read by then."""

    def cut_short(*args, **kwargs):
        raise CutShort("cut short")

    for place in (
        "export.torch_decoder.load",  # first, so that its module is not imported while what it imports is patched
        "ara.planning.plan.read_shape",
        "ara.stages.recover.load_rounded",
        "ara.stages.quantise.load",
        "ara.models.checkpoint.load",
        "ara.stages.bench._measure",
        "ara.stages.report.gather",
        "export.onnx.writing.write_onnx",
        "export.onnx.runner.OnnxDecoder",
        "export.serve.check_complete",
    ):
        monkeypatch.setattr(place, cut_short)
    monkeypatch.setattr(ModelSource, "load_model", cut_short)
    monkeypatch.setattr("export.serve.find_spec", lambda name: name)
    # lm-eval's index takes seconds to read.
    monkeypatch.setattr("ara.evaluation.tasks.check_task", cut_short)
    monkeypatch.setattr("ara.stages.evaluate.check_task", cut_short)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def one_parser():
    """Build each command once, not once per command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.info.cls, "get_command", lambda self, ctx, name: COMMANDS.get(name))
        yield


def test_every_command_has_a_valid_line():
    assert list(VALID) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_odd_values(name, no_work, one_parser, finished, tiny_llama, tiny_text, tmp_path):
    workspace = shutil.copytree(finished, tmp_path / "ws")
    base = [{"MODEL": str(tiny_llama), "TEXT": tiny_text}.get(word, word) for word in VALID[name]]
    if name not in ("models", "methods"):
        base += ["-w", str(workspace)]
    for what, words in odd_lines(COMMANDS[name]):
        line = [name, *base[1:], *words] if words[0] == "--" else [name, *base, *words]
        result = ara(*line)
        said = f"ara {name} {what}: exit code {result.exit_code}, {result.exception!r}\n{result.output}"
        assert result.exit_code in (0, 1, 2), said
        assert result.exception is None or isinstance(result.exception, SystemExit), said
        assert "Traceback" not in result.output and "\x1b" not in result.output, said
        errors = [line for line in result.stderr.splitlines() if line.lower().startswith("error: ")]
        assert len(errors) == (0 if result.exit_code == 0 else 1), said
        beside = [line for line in result.stderr.splitlines() if line.startswith("  - ")]
        assert len(beside) <= 1 and "this is a bug" not in result.stderr, said
        if words[-1] in ("", NOT_UTF8):
            assert result.exit_code == (1 if words[0] in ("--prefill", "--decode") else 2), said
