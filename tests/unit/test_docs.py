"""README, CONTRIBUTING and docs say what the code does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from ara.pipeline import steps
from ara_cli.app import app

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]
GROUP = typer.main.get_command(app)


def read(name):
    return (REPOSITORY / name).read_text(encoding="utf-8")


def commands(text):
    """Return the command lines of ``ara`` in code blocks and in inline code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(ara [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [line for line in lines if line.startswith("ara ")]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_exists(page):
    for line in commands(read(page)):
        _, name, *words = shlex.split(line)
        if name.startswith("-"):
            continue
        command = GROUP.get_command(None, name)
        assert command is not None, line
        known = {flag for parameter in command.params for flag in parameter.opts} | {"--help"}
        used = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert used <= known, line


def test_readme_shows_commands():
    assert {line.split()[1] for line in commands(read("README.md"))} >= {
        "decompose", "allocate", "truncate", "eval", "status", "run"
    }  # fmt: skip


def test_readme_has_the_stages_in_the_order_of_the_pipeline():
    readme = read("README.md")
    listed = re.search(r"^  stages/ +(.+)$", readme, re.MULTILINE)
    assert listed is not None
    modules = {"train-masks": "train_masks", "eval": "evaluate"}
    inside = [modules.get(stage.name, stage.name) for stage in steps() if stage.name != "export"]
    assert listed.group(1).split(" · ") == [*inside, "compare", "bench", "report"]
    for name in inside:
        assert (REPOSITORY / "ara" / "stages" / f"{name}.py").is_file()
    shown = [line.split()[1] for line in commands(readme) if line.split()[1] in [stage.name for stage in steps()]]
    first_uses = list(dict.fromkeys(shown))[:5]
    assert first_uses == [stage.name for stage in steps() if stage.name != "export"]


def test_readme_tree_names_what_is_there():
    tree = read("README.md").split("## Tree")[1]
    for name in re.findall(r"^  (\w+(?:/|\.py)) ", tree, re.MULTILINE):
        assert (REPOSITORY / "ara" / name.rstrip("/")).exists(), name
    for name in re.findall(r"^(\w+)/ ", tree, re.MULTILINE):
        assert (REPOSITORY / name).is_dir(), name


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_and_no_dead_link(page):
    text = read(page)
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (REPOSITORY / page).parent.joinpath(target).exists(), target
