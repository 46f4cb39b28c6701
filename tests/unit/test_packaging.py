"""The distribution's promises: what is packaged, which version, which pins, who may import whom."""

import ast
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ara

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = ["ara", "ara_cli", "export"]
# Who may not import whom: ara_cli -> export -> ara.
FORBIDDEN = {"ara": {"ara_cli", "export"}, "export": {"ara_cli"}, "ara_cli": set()}


def requirements():
    """Return all requirements but those of the extra ``vllm``: it wants an older transformers than the pinned one."""
    project = PROJECT["project"]
    extras = [line for name, extra in project["optional-dependencies"].items() if name != "vllm" for line in extra]
    return [Requirement(line) for line in [*project["dependencies"], *extras]]


def pins():
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert canonicalize_name(name) not in found, f"{name} is pinned twice"
            found[canonicalize_name(name)] = Version(version)
    return found


def imported_modules(path):
    """Return every absolute module name that a file imports, also inside functions and TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_exactly_the_three_packages_are_built():
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == PACKAGES


def test_the_source_distribution_holds_what_its_own_files_point_to():
    included = set(PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
    assert included >= {
        f"/{name}" for name in (*PACKAGES, "tests", "benchmarks", "docs", "mkdocs.yml", "Makefile", "constraints.txt")
    }
    assert sorted(name for name in included if not (ROOT / name[1:]).exists()) == []


def test_classifiers_promise_what_is_true():
    classifiers = PROJECT["project"]["classifiers"]
    assert "Typing :: Typed" in classifiers
    assert (ROOT / "ara" / "py.typed").read_bytes() == b""
    systems = {line for line in classifiers if line.startswith("Operating System")}
    assert systems == {"Operating System :: POSIX :: Linux", "Operating System :: MacOS"}


def test_what_the_commands_write_by_default_is_not_committed():
    ignored = set((ROOT / ".gitignore").read_text(encoding="utf-8").splitlines())
    assert ignored >= {"/ara-workspace/", "/ara-demo/", "/bench-quality/", "/site/"}


def test_files_are_hashed_in_one_place():
    hashing = [
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if "hashlib.file_digest(" in path.read_text(encoding="utf-8")
    ]
    assert hashing == ["ara/workspace/manifest.py"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_with_code_is_a_package(package):
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert folders, f"{package} has no code"
    assert sorted(str(folder) for folder in folders if not (folder / "__init__.py").is_file()) == []


@pytest.mark.parametrize("script", ["ara", "ara-svd"])
def test_console_scripts_name_a_function(script):
    module, _, function = PROJECT["project"]["scripts"][script].partition(":")
    source = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_module_can_be_run():
    assert (ROOT / "ara_cli" / "__main__.py").is_file()


def test_version_has_one_source():
    assert "version" in PROJECT["project"]["dynamic"]
    assert ROOT / PROJECT["tool"]["hatch"]["version"]["path"] == Path(ara.__file__).parent / "version.py"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{ara.__version__}]" in changelog


def test_readme_and_licence_are_there():
    assert (ROOT / PROJECT["project"]["readme"]).is_file()
    for name in PROJECT["project"]["license-files"]:
        assert "Apache License" in (ROOT / name).read_text(encoding="utf-8")


def test_every_direct_dependency_is_pinned_within_its_range():
    pinned = pins()
    wrong = [
        str(requirement)
        for requirement in requirements()
        if (name := canonicalize_name(requirement.name)) not in pinned or pinned[name] not in requirement.specifier
    ]
    assert wrong == []


def test_the_tests_of_vllm_run_a_version_of_its_extra():
    (vllm,) = map(Requirement, PROJECT["project"]["optional-dependencies"]["vllm"])
    tested = re.search(r"^VLLM_VERSION := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert vllm.name == "vllm"
    assert Version(tested[1]) in vllm.specifier


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_lowest_environment_has_the_oldest_transformers_of_the_range(tmp_path):
    (bounds,) = [requirement.specifier for requirement in requirements() if requirement.name == "transformers"]
    (lowest,) = [bound.version for bound in bounds if bound.operator == ">="]
    steps = subprocess.run(
        ["make", "--dry-run", f"LOWEST_VENV={tmp_path}", "test-lowest"], cwd=ROOT, capture_output=True, text=True
    )
    assert f"'s/^transformers==.*/transformers=={lowest}/' constraints.txt" in steps.stdout, steps.stderr
    assert pins()["transformers"] > Version(lowest)


def test_pins_carry_no_local_build():
    assert [name for name, version in pins().items() if version.local] == []


@pytest.mark.parametrize(
    ("platform", "machine", "expected"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("win32", "ARM64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
    ],
)
def test_exactly_one_onnxruntime_per_platform(platform, machine, expected):
    environment = default_environment() | {"sys_platform": platform, "platform_machine": machine}
    chosen = [
        requirement.name
        for requirement in requirements()
        if requirement.name.startswith("onnxruntime") and requirement.marker.evaluate(environment)
    ]
    assert chosen == [expected]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for module in imported_modules(path)
        if module.split(".")[0] in FORBIDDEN[package]
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["ara", "export"])
def test_libraries_do_not_print(package):
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_makefile_describes_its_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    described = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    assert described >= {
        "help",
        "setup",
        "demo",
        "test",
        "test-lowest",
        "check",
        "format",
        "bench-decompose",
        "bench-quality",
        "bench-ablation",
        "clean",
    }
