"""README, CONTRIBUTING and the pages of docs/ say what the code does, and their links lead somewhere."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from ara.pipeline import steps
from ara_cli.app import app

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *sorted(path.relative_to(REPOSITORY).as_posix() for path in DOCS.rglob("*.md")),
]
GROUP = typer.main.get_command(app)
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
# Tags by which a browser would load something from another server.
EXTERNAL = re.compile(r'<(?:script|img|iframe|link)[^>]*(?:src|href)="?(?:https?:)?//[^>]*>')


def read(name):
    return (REPOSITORY / name).read_text(encoding="utf-8")


def load(name):
    """Return a module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def block_commands(text):
    """Return the command lines of ``ara`` in code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if "ara " in line]
    return [line for line in lines if line[:1] == ["ara"]]


def inline_commands(text):
    """Return what inline code says of ``ara``; arguments may be left out there, and options may be in brackets."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(code) for code in re.findall(r"`(ara [^`]+)`", outside)]


def wrong_commands(text):
    """Return every command line that the command line would not read, with what is wrong."""
    wrong = []
    for line in [*block_commands(text), *inline_commands(text)]:
        name = line[1]
        if name.startswith("-"):
            continue
        command = GROUP.get_command(None, name)
        if command is None:
            wrong.append((name, "no such command"))
            continue
        known = {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
        ours = itertools.takewhile(lambda word: word != "--", line[2:])  # what follows is for another program
        wrong += [(name, word) for word in ours if word.startswith("-") and word.partition("=")[0] not in known]
    for line in block_commands(text):
        command = GROUP.get_command(None, line[1]) if not line[1].startswith("-") else None
        if command is not None:
            try:
                command.make_context(line[1], line[2:])
            except Exception as error:  # typer's usage errors are of a class of its own
                wrong.append((line[1], str(error)))
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_every_command_can_be_read(page):
    assert wrong_commands(read(page)) == []


def test_wrong_commands_are_found():
    text = "`ara shrink`, `ara eval --taks a`\n```\nara decompose  # no model\nara bench --rounds many\n```\n"
    assert [name for name, _ in wrong_commands(text)] == ["shrink", "eval", "decompose", "bench"]


def test_readme_is_short():
    assert len(read("README.md").splitlines()) <= 130


def test_readme_shows_the_stages_in_the_order_of_the_pipeline():
    readme = read("README.md")
    listed = re.search(r"^  stages/ +(.+)$", readme, re.MULTILINE)
    assert listed is not None
    modules = {"train-masks": "train_masks", "eval": "evaluate"}
    inside = [modules.get(stage.name, stage.name) for stage in steps() if stage.name != "export"]
    assert listed.group(1).split(" · ") == [*inside, "compare", "bench", "report"]
    for name in inside:
        assert (REPOSITORY / "ara" / "stages" / f"{name}.py").is_file()
    shown = [line[1] for line in block_commands(readme)]
    in_order = [stage.name for stage in steps()]
    assert [name for name in dict.fromkeys(shown) if name in in_order] == in_order
    assert {"run", "status", "report", "bench", "generate", "compare"} <= set(shown)


def test_readme_tree_names_what_is_there():
    tree = read("README.md").split("## Tree")[1]
    inside = re.findall(r"^  (\w+(?:/|\.py)) ", tree, re.MULTILINE)
    packages = {f"{path.parent.name}/" for path in (REPOSITORY / "ara").glob("*/__init__.py")}
    assert packages <= set(inside)
    assert [name for name in inside if not (REPOSITORY / "ara" / name).exists()] == []
    folders = re.findall(r"^(\w+)/ ", tree, re.MULTILINE)
    assert set(folders) == {"ara_cli", "export", "tests", "benchmarks", "docs"}
    assert all((REPOSITORY / name).is_dir() for name in folders)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_files_of_the_code_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:ara|ara_cli|export|tests|benchmarks|docs)/[\w./-]+)`", read(page))
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def anchors(page):
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower())).strip("-") for title in titles}


def dead_links(text, folder):
    """Return the links of a page in ``folder`` that lead to no file or to no heading."""
    dead = []
    for link in LINK.findall(text):
        name, _, anchor = link.partition("#")
        target = (folder / name).resolve() if name else None
        if target is not None and not target.exists():
            dead.append(link)
        elif anchor and (target is None or target.suffix == ".md"):
            titles = anchors(target) if target else set()
            dead += [link] if anchor not in titles else []
    return dead


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = read(page)
    assert dead_links(text, (REPOSITORY / page).parent) == []
    assert "TODO" not in text


def test_dead_links_are_found():
    text = "[a](docs/none.md) [b](docs/index.md#none) [c](docs/index.md#two-commands) [d](https://example.org)"
    assert dead_links(text, REPOSITORY) == ["docs/none.md", "docs/index.md#none"]


def test_pages_of_the_top_folder_have_working_links_in_the_site():
    hooks = load("hooks")
    for page, source in hooks.INCLUDED.items():
        assert (DOCS / page).is_file()
        assert dead_links(hooks.into_site(read(source)), DOCS) == []
    assert hooks.into_site("[a](docs/use.md#b), [`c`](ara/c.py), [d](CHANGELOG.md), [e](https://f.g)") == (
        "[a](use.md#b), `c`, [d](changelog.md), [e](https://f.g)"
    )


def test_navigation_names_every_page():
    sections = yaml.safe_load(read("mkdocs.yml"))["nav"]
    named = [page for section in sections for pages in section.values() for page in pages]
    assert sorted(named) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert len(sections) == 6 and named[0] == "index.md"


def test_reference_pages_are_what_the_script_writes():
    written = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "reference").iterdir()}
    assert written == load("reference").pages(), "make reference writes them anew"


def test_reference_has_every_option_with_its_range():
    page = read("docs/reference/commands.md")
    assert "| `--rounds` |" in page and "whole number at least 6 and at most 10,000" in page
    assert "`fp32`, `fp16`, `int8`" in page
    for name in GROUP.list_commands(None):
        section = page.split(f"\n## ara {name}\n")[1].split("\n## ")[0]
        for parameter in GROUP.get_command(None, name).params:
            assert parameter.opts[0] in section or parameter.opts[0].upper() in section, (name, parameter.name)


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    # Not --quiet: it would also keep --strict from seeing warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    built = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")]
    assert len(built) > 20
    assert [found for text in built for found in EXTERNAL.findall(text)] == []
    sheets = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.css")]
    assert sheets and not any(re.search(r"url\(['\"]?(?:https?:)?//", sheet) for sheet in sheets)
