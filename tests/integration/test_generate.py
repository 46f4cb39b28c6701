"""``ara generate`` and prompts of ``ara eval``: whatever is wrong is one line and a hint."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ara.errors import UsageError, WorkspaceError
from ara.workspace.store import Workspace
from ara_cli.streams import piped_input
from export.find import latest_export
from export.onnx.target import OnnxTarget
from tests.commands import ara, done, refused
from tests.tiny import VOCABULARY

NAME = "energy-0.70"
SHORT = ("--max-new-tokens", 3, "--device", "cpu", "-q")


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A checkpoint folder that may be changed."""
    return Path(shutil.copytree(finished / "truncate" / NAME / "checkpoint", tmp_path / "checkpoint"))


def test_a_chat_template_that_refuses_can_be_left_out(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('tools are required') }}")
    words = ("generate", "hi", "--source", folder, *SHORT)
    refused(ara(*words), 1, "the chat template refuses the prompt: tools are required", "--no-chat")
    assert ara(*words, "--no-chat").exit_code == 0


def test_an_empty_answer_is_said_to_be_one(folder: Path) -> None:
    words = ("generate", "hi", "--source", folder, *SHORT)
    spoken = ara(*words, "--json")
    assert json.loads(spoken.stdout)["empty"] is False and "empty" not in spoken.stderr
    config = json.loads((folder / "generation_config.json").read_text())
    every = list(range(VOCABULARY))
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": every}))
    silent = ara(*words)
    assert silent.exit_code == 0 and silent.stdout == "\n"
    warning = (
        "warning: the answer is empty: the model ended its turn with the first token; calibrate with conversations"
    )
    assert silent.stderr.startswith(warning) and len(silent.stderr.splitlines()) == 1
    document = json.loads(ara(*words, "--json").stdout)
    assert document == {"prompt": "hi", "answer": "", "empty": True, "backend": "torch", "seed": None}


def test_a_seed_gives_the_same_text_again(folder: Path) -> None:
    words = ("generate", "the river", "--source", folder, "--max-new-tokens", 20, "--device", "cpu", "--json")
    drawn = (*words, "--temperature", 1.5)

    def said(*more: Any) -> tuple[str, int | None]:
        document = json.loads(done(*more).stdout)
        return document["answer"], document["seed"]

    assert said(*drawn, "--seed", 3) == said(*drawn, "--seed", 3) != said(*drawn, "--seed", 4)
    assert said(*drawn, "--seed", 3)[1] == 3
    # Without a seed every text is another one, and its seed is shown.
    text, seed = said(*drawn)
    assert seed is not None and said(*drawn, "--seed", seed) == (text, seed) != said(*drawn)
    assert f"temperature 1.5, top-p 1, seed {seed}" in ara(*drawn, "--seed", seed).stderr
    # Greedy is the default, and what top-p leaves at the least.
    greedy, none = said(*words)
    assert none is None and said(*words, "--seed", 3) == (greedy, None)
    assert said(*drawn, "--top-p", 1e-9)[0] == greedy


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--temperature", -0.1), "temperature: input should be greater than or equal to 0, got -0.1"),
        (("--temperature", 1, "--top-p", 0), "top-p: input should be greater than 0, got 0"),
        (("--temperature", 1, "--top-p", 1.1), "top-p: input should be less than or equal to 1, got 1.1"),
        (("--top-p", 0.9), "top-p: without a temperature above 0 no token is drawn, got 0.9"),
        (("--seed", -1), "seed: input should be greater than or equal to 0, got -1"),
        (("--system", " "), "the system prompt is empty"),
        (("--system", "x", "--no-chat"), "chat: a system prompt needs the chat template, got False"),
    ],
)
def test_settings_of_an_answer_that_make_no_sense(tmp_path: Path, words: tuple[Any, ...], said: str) -> None:
    """Without a model: they are refused before one is looked for."""
    refused(ara("generate", "hi", *words, "-w", tmp_path / "none", *SHORT), 2, said, hint=False)


def test_a_system_prompt_goes_ahead_of_the_prompt(folder: Path) -> None:
    words = ("generate", "hi", "--source", folder, "--system", "Answer in verse.")
    template = folder / "chat_template.jinja"
    template.write_text("{{ raise_exception(messages | map(attribute='role') | join(', ')) }}")
    refused(ara(*words, *SHORT), 1, "the chat template refuses the prompt: system, user", "--system")
    template.write_text("{{ bos_token }}{% for message in messages %}{{ message.content }}|{% endfor %}")
    joined = json.loads(done(*words, *SHORT, "--json").stdout)["answer"]
    plain = ("generate", "Answer in verse.|hi|", "--source", folder, "--no-chat", *SHORT, "--json")
    assert joined == json.loads(done(*plain).stdout)["answer"]
    template.unlink()
    refused(ara(*words, *SHORT), 2, "the model has no chat template, which --system needs")


def test_several_chat_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for templates, words in (
        ([{"name": "rag", "template": "x"}], "the model has the chat templates rag, and no default"),
        ([{"name": "rag"}], f"the tokenizer of {folder} cannot be loaded"),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": templates}))
        refused(ara("generate", "hi", "--source", folder, *SHORT), 1, words)


def test_a_source_that_is_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "ara_export.json").write_text("{}")
    for source, backend, words, hint in (
        (tmp_path / "empty", "torch", "is not a checkpoint folder (no config.json)", "ara truncate"),
        (tmp_path / "empty", "onnx", "is not an export (ara_export.json is missing)", "ara export"),
        (tmp_path / "nowhere", "torch", f"{tmp_path / 'nowhere'} does not exist", "--source wants"),
        (folder / "config.json", "torch", "config.json is no folder", "--source wants"),
        (tmp_path / "export", "torch", "is an export, --backend torch runs checkpoints", "--backend onnx"),
        (folder, "onnx", "is a checkpoint, --backend onnx runs exports", f"ara export --onnx --source {folder}"),
    ):
        refused(ara("generate", "hi", "--source", source, "--backend", backend, *SHORT), 1, words, hint)
    nobody = ara("generate", "hi", "--source", "~nobody-here/x", *SHORT)
    assert nobody.exit_code == 2 and "'~nobody-here/x' cannot be used: there is no such user" in nobody.stderr


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(ara("generate", "hi", "--source", folder, *SHORT), 1, f"the tokenizer of {folder} cannot be loaded")


def test_prompts_that_are_none(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("-w", finished, *SHORT)
    for before, after in (
        (("generate",), words),
        (("eval", "--prompt"), words),
        (("run", "x", "--prompt"), ("-w", finished, "-q")),
    ):
        refused(ara(*before, " ", *after), 2, "the prompt is empty")
        empty = ara(*before, "", *after)
        assert empty.exit_code == 2 and "it is empty" in empty.stderr
    refused(ara("generate", "caf\udce9", *words), 2, "is not valid UTF-8")
    refused(ara("generate", "-", *words, piped=b"caf\xe9"), 2, "the prompt is not UTF-8")
    refused(ara("generate", "-", *words, piped=b"a\0b"), 2, "holds a NUL character")
    refused(ara("generate", "-", *words, piped=b""), 2, "the prompt is empty")
    assert ara("generate", "-", *words, piped=b"The baker").exit_code == 0
    for closed in (None, SimpleNamespace(closed=True)):
        monkeypatch.setattr(sys, "stdin", closed)
        with pytest.raises(UsageError, match="stdin, which is closed"):
            piped_input("echo")


def test_a_prompt_longer_than_the_model(finished: Path, copied: Path, tiny_text: str) -> None:
    words = "301 tokens of prompt and 3 new ones are more than the 256 positions of the model"
    refused(ara("generate", "x" * 300, "--no-chat", "-w", finished, *SHORT), 2, words, "shorten the prompt")
    options = ("--tasks", tiny_text, "--seq-len", 64, "--max-windows", 2, "--dtype", "float32", *SHORT)
    refused(ara("eval", "--prompt", "x" * 300, *options, "-w", copied), 2, words, "shorten the prompt")
    assert [path.name for path in (copied / "eval").iterdir() if path.name.startswith(".")] == []


def test_exports_that_cannot_be_run_are_named(copied: Path) -> None:
    """A workspace says which exports are there, and why none of them is the one."""
    words = ("generate", "hi", "--backend", "onnx", "-w", copied, *SHORT)
    make = f"ara export --onnx --checkpoint {NAME}"
    refused(ara(*words), 1, f"truncate/{NAME} was not exported", make)
    (copied / "export" / "cut").mkdir(parents=True)
    (copied / "export" / "cut" / "manifest.json").write_text("{")
    refused(ara(*words), 1, "export/cut/manifest.json", "run ara export again")
    refused(ara(*words, "--export", "none"), 1, "has no export/none: there is cut", "ara export")
    workspace = Workspace.open(copied)
    truncated = workspace.view(f"truncate/{NAME}")
    shutil.rmtree(copied / "export" / "cut")
    facts = {"config": {}, "model": truncated.manifest.model, "parents": ()}  # type: ignore[union-attr]
    with workspace.writer("export", "other", facts, command="ara export"):
        pass
    with pytest.raises(WorkspaceError, match=r"export/other/manifest\.json: results: precision: Field required"):
        latest_export(OnnxTarget(), workspace, truncated)
