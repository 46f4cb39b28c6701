"""Imports point down: every package imports only what its row of the table in docs/architecture.md names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TOP = ("ara_cli", "export", "ara")
# `import ara` registers checkpoints with transformers; it belongs to no layer.
FACADE = REPOSITORY / "ara" / "__init__.py"


def test_the_table_of_the_architecture_page_names_every_import() -> None:
    assert imports() == {package: set(named) for package, named in table().items()}


def test_imports_point_down() -> None:
    order = list(table())
    for package, named in table().items():
        above = [other for other in named if order.index(other) <= order.index(package)]
        assert not above, f"{package} imports {', '.join(above)}, which stands above it"


def test_the_table_has_every_package() -> None:
    folders = [path.parent for top in TOP for path in (REPOSITORY / top).rglob("__init__.py")]
    assert set(table()) == {_package(folder / "__init__.py") for folder in folders}


def test_an_import_inside_a_function_is_seen(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("def f():\n    from ara.stages import common\n    import export.stage\n")
    assert list(_imported(module)) == ["ara.stages.common", "export.stage"]


def table() -> dict[str, list[str]]:
    """Return package → packages that it may import, from the top down, as docs/architecture.md has them."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.split("## Layers")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w/]+)` \|[^|]*\|([^|]*)\|$", section, re.MULTILINE)
    return {package: re.findall(r"`([\w/]+)`", named) for package, named in rows}


def imports() -> dict[str, set[str]]:
    """Return package → packages of this repository that its modules import, wherever the import stands."""
    found: dict[str, set[str]] = {}
    for path in (path for top in TOP for path in (REPOSITORY / top).rglob("*.py")):
        package = _package(path)
        found.setdefault(package, set())
        if path != FACADE:
            found[package] |= {_package(_file(name)) for name in _imported(path)} - {package}
    return found


def _imported(path: Path) -> Iterator[str]:
    """Yield the full names of what a module imports from this repository."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name for name in names if name.split(".")[0] in TOP)


def _file(name: str) -> Path:
    """Return the file that a dotted name leads to: the longest part of it that is a module or package."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = REPOSITORY.joinpath(*parts[:count])
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if path.is_dir():
            return path / "__init__.py"
    raise AssertionError(f"{name} is no module")


def _package(path: Path) -> str:
    """Return the package of a file as the table names it; the command line is one."""
    folder = path.parent.relative_to(REPOSITORY)
    return "ara_cli" if folder.parts[0] == "ara_cli" else folder.as_posix()
