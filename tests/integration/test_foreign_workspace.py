"""A workspace that somebody else made or edited: one line for whatever is in it, nothing touched outside of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ara.errors import CorruptedError
from ara.workspace.index import write_index
from ara.workspace.manifest import MANIFEST, FileRecord, Manifest, Parent, file_sha256, read_manifest
from ara.workspace.store import Workspace
from ara.workspace.writer import JOURNAL
from tests.commands import ara, done, refused
from tests.damage import contents
from tests.tiny import story

NAME = "energy-0.70"
FACTORS, RANKS, CHECKPOINT = "decompose/two-sided", f"allocate/{NAME}", f"truncate/{NAME}"
EVALUATION = f"eval/{NAME}-{story()}"
# The command that builds on a stage's result.
USERS = {"decompose": ("allocate", "--keep", "0.5"), "allocate": ("truncate", "--name", "x"), "truncate": ("eval",)}
DEEP = "[" * 100_000


def forge(root: Path, key: str, **changes: Any) -> Manifest:
    """Change a manifest as somebody would who makes its checksums fit."""
    made = read_manifest(root / key).model_copy(update=changes).sealed()
    (root / key / MANIFEST).write_text(made.model_dump_json(), encoding="utf-8")
    return made


def results(root: Path, key: str, **changes: Any) -> dict[str, Any]:
    return {**read_manifest(root / key).results, **changes}


def config(root: Path, key: str, **changes: Any) -> dict[str, Any]:
    return {**read_manifest(root / key).config, **changes}


def wide(root: Path) -> list[dict[str, Any]]:
    first, *rest = read_manifest(root / FACTORS).results["modules"]
    return [{**first, "m": 10**12, "n": 10**12}, *rest]


@pytest.mark.parametrize(
    ("key", "change", "word"),
    [
        (FACTORS, lambda r: {"results": {}}, "results: modules"),
        (FACTORS, lambda r: {"results": results(r, FACTORS, modules=[{"name": "x"}])}, "modules.0.layer"),
        (FACTORS, lambda r: {"results": results(r, FACTORS, modules=wide(r))}, "needs a tensor A of shape"),
        (FACTORS, lambda r: {"config": {}}, "config: method"),
        (FACTORS, lambda r: {"config": config(r, FACTORS, samples="many")}, "config: samples"),
        (FACTORS, lambda r: {"name": "other"}, "renamed or copied"),
        (FACTORS, lambda r: {"parents": (Parent(key=FACTORS, id="x"),)}, "made from 'decompose/two-sided'"),
        (FACTORS, lambda r: {"parents": (Parent(key="secrets/x", id="x"),)}, "made from 'secrets/x'"),
        (RANKS, lambda r: {"results": {"linear_keep": None}}, "results: "),
        (RANKS, lambda r: {"config": config(r, RANKS, exclude=3)}, "config: exclude"),
        (RANKS, lambda r: {"parents": (Parent(key=RANKS, id="x"),)}, "which no result of ara allocate is"),
        (RANKS, lambda r: {"parents": ()}, "names no result of ara decompose"),
        (CHECKPOINT, lambda r: {"results": results(r, CHECKPOINT, disk_bytes="x")}, "results: disk_bytes"),
        (CHECKPOINT, lambda r: {"config": {"dtype": "int3"}}, "config: dtype"),
    ],
)
def test_claims_that_cannot_be_are_one_line(copied: Path, key: str, change: Any, word: str) -> None:
    forge(copied, key, **change(copied))
    assert ara("status", "-w", copied, "-q").exit_code == 0
    refused(ara(*USERS[key.partition("/")[0]], "-w", copied, "-q"), 1, word)
    refused(ara("report", "-w", copied, "-q"), 1)


def test_tensors_are_held_to_the_table_that_was_believed(copied: Path) -> None:
    made = read_manifest(copied / FACTORS)
    modules = wide(copied)
    m = modules[0]["m"]
    shapes = {"A": (m, m), "B": (m, m), "spectrum": (m,)}
    tensors = {
        name: record.model_copy(update={"shape": shapes[name.rpartition(".")[2]]})
        if name.rpartition(".")[0] == modules[0]["name"] and name.rpartition(".")[2] in shapes
        else record
        for name, record in made.tensors.items()
    }
    forge(copied, FACTORS, tensors=tensors, results=results(copied, FACTORS, modules=modules, moments=None))
    assert Workspace.open(copied).view(FACTORS).state == "done"
    refused(ara("allocate", "--keep", "0.5", "-w", copied, "-q"), 1, "is not what manifest.json says of it")


def test_a_report_ignores_another_checkpoint_that_names_no_factors(copied: Path) -> None:
    shutil.copytree(copied / CHECKPOINT, copied / "truncate" / "other")
    forge(copied, "truncate/other", name="other", parents=())
    document = json.loads(done("report", "--checkpoint", NAME, "-w", copied, "--json").stdout)
    assert "truncate/other" not in [parent["key"] for parent in document["parents"]]


def test_parents_of_each_other_end(copied: Path) -> None:
    """Before, each asked for the other without an end."""
    forge(copied, RANKS, parents=(Parent(key=CHECKPOINT, id="x"),))
    forge(copied, CHECKPOINT, parents=(Parent(key=RANKS, id="x"),))
    assert ara("status", "-w", copied).exit_code == 0
    refused(
        ara("eval", "-w", copied, "-q"), 1, "is stale: allocate/energy-0.70 is damaged", "make it again: ara allocate"
    )


@pytest.mark.parametrize(
    "text", [DEEP, "", "null", "[]", '{"format_version": "1"}', '{"format_version": ' + "9" * 5000 + "}", "\udcff"]
)
def test_manifests_that_are_none(copied: Path, text: str) -> None:
    for key in (FACTORS, EVALUATION):
        (copied / key / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert ara("status", "-w", copied).exit_code == 0
    refused(ara("allocate", "-w", copied, "-q"), 1, FACTORS)
    refused(ara("report", "-w", copied, "-q"), 1, "is damaged", f"delete {copied / FACTORS}")


def test_an_index_that_is_none(copied: Path) -> None:
    for text in (DEEP, '{"format_version": 1, "model": {"fingerprint": "a", "requested": 7}}'):
        (copied / "workspace.json").write_text(text)
        refused(ara("status", "-w", copied), 1, "workspace.json cannot be read")


def test_pipes_and_folders_in_the_place_of_manifests(copied: Path) -> None:
    for key, make in ((FACTORS, os.mkfifo), (RANKS, os.mkdir)):
        (copied / key / MANIFEST).unlink()
        make(copied / key / MANIFEST)
    assert "expected a regular file" in ara("status", "-w", copied).stdout
    refused(ara("allocate", "-w", copied, "-q"), 1, "expected a regular file")


def test_figures_of_another_form_do_not_end_a_table(copied: Path, tiny_text: str) -> None:
    forge(copied, EVALUATION, results={"tasks": 3, "chosen": None})
    assert "written in another form" in ara("status", "-w", copied).stdout
    words = ("--tasks", tiny_text, "--seq-len", 64, "--max-windows", 4, "--device", "cpu", "--dtype", "float32")
    refused(ara("eval", *words, "-w", copied, "-q"), 1, f"{EVALUATION} was written in another form", "--force")
    result = ara("report", "-w", copied)
    assert result.exit_code == 0 and f"{EVALUATION} was written in another form" in result.stderr


def test_damaged_measurements_are_named_in_the_report(copied: Path) -> None:
    assert ara("report", "-w", copied).exit_code == 0
    (copied / EVALUATION / MANIFEST).write_text("{")
    for _ in range(2):  # also when that report is there already
        result = ara("report", "-w", copied, "--json")
        missing = {item["what"]: item["command"] for item in json.loads(result.stdout)["results"]["missing"]}
        name = EVALUATION.partition("/")[2]
        assert missing[f"{EVALUATION} is damaged and left out"] == f"ara eval --name {name} -w {copied}"


def test_the_damaged_factors_are_named_first(copied: Path) -> None:
    (copied / FACTORS / MANIFEST).write_text("{}")
    for command in ("truncate", "eval", "report"):
        refused(ara(command, "-w", copied, "-q"), 1, "decompose/two-sided is damaged", f"delete {copied / FACTORS}")
    status = json.loads(ara("status", "-w", copied, "--json").stdout)["stages"]
    assert {row["remedy"] for row in status} == {f"delete {copied / FACTORS} and run ara decompose again"}


# -- journals of unfinished work ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../../secret", "/etc/hostname", "link", "sub/x"])
def test_a_journal_names_nothing_outside(copied: Path, tmp_path: Path, name: str) -> None:
    from ara.workspace.manifest import file_record

    secret = tmp_path / "secret"
    secret.write_text("mine")
    writer = Workspace.open(copied).writer("compare", "x", _facts(copied), command="ara", resumable=True)
    writer.folder.mkdir(parents=True)
    (writer.folder / "link").symlink_to(secret)
    (writer.folder / "sub").symlink_to(tmp_path)
    journal = {
        "fingerprint": writer._fingerprint,
        "seconds": 1.0,
        "files": {name: file_record(secret).model_dump()},
        "tensors": {},
        "results": {},
    }
    (writer.folder / JOURNAL).write_text(json.dumps(journal))
    with writer as stage:
        assert stage.finished == []
    assert secret.read_text() == "mine"
    assert set(os.listdir(writer.final)) == {MANIFEST}


@pytest.mark.parametrize(
    "change", [{"results": {"methods": 5}}, {"results": 3}, {"seconds": "x"}, {"files": []}, {"tensors": {"a": 1}}]
)
def test_a_journal_of_other_types_is_none(copied: Path, change: dict[str, Any]) -> None:
    writer = Workspace.open(copied).writer("compare", "x", _facts(copied), command="ara", resumable=True)
    writer.folder.mkdir(parents=True)
    journal = {"fingerprint": writer._fingerprint, "seconds": 1.0, "files": {}, "tensors": {}, "results": {}}
    (writer.folder / JOURNAL).write_text(json.dumps({**journal, **change}))
    with writer as stage:
        assert stage.results == {}


def _facts(root: Path) -> dict[str, Any]:
    return {"config": {}, "model": Workspace.open(root).model, "parents": ()}


# -- links ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Any:
    """A folder of somebody's own that must stay as it is."""
    folder = tmp_path / "elsewhere"
    (folder / ".x.old").mkdir(parents=True)
    (folder / ".x.old" / "mine").write_text("mine")
    (folder / "file").write_text("mine")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


@pytest.mark.parametrize("place", ["allocate", "cache/tokens", "cache/tables", ".lock", "workspace.json"])
def test_links_in_the_place_of_ours_are_refused(copied: Path, elsewhere: Path, place: str) -> None:
    path = copied / place
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    path.symlink_to(elsewhere / "file" if "." in place else elsewhere)
    refused(ara("allocate", "--keep", "0.5", "--method", "energy", "-w", copied, "-q"), 1, "is a link")


def test_a_result_that_is_a_link_is_no_result(copied: Path, elsewhere: Path, tmp_path: Path) -> None:
    (copied / RANKS).rename(tmp_path / "ranks")
    (copied / RANKS).symlink_to(tmp_path / "ranks")
    refused(ara("truncate", "-w", copied, "-q"), 1, "is a link")
    (copied / RANKS).unlink()
    (copied / RANKS).symlink_to(elsewhere)
    done("allocate", "--keep", "0.7", "--method", "energy", "-w", copied, "-q")
    assert not (copied / RANKS).is_symlink()
    assert not list((copied / "allocate").glob(".*"))


def test_links_in_the_place_of_passing_files_are_removed(copied: Path, elsewhere: Path) -> None:
    for place in (".lock-owner.json", ".workspace.json.partial"):
        (copied / place).symlink_to(elsewhere / "file")
    for place in (".energy-0.50.partial", ".energy-0.50.old", ".gone.copy"):
        (copied / "allocate" / place).symlink_to(elsewhere)
    done("allocate", "--keep", "0.5", "--method", "energy", "-w", copied, "-q")
    write_index(copied, Workspace.open(copied).model)
    assert not [path for path in copied.rglob("*") if path.is_symlink()]


def test_the_model_card_goes_through_no_link(copied: Path, elsewhere: Path, tmp_path: Path) -> None:
    card = copied / CHECKPOINT / "checkpoint" / "README.md"
    card.unlink()
    card.symlink_to(elsewhere / "file")
    output = tmp_path / "page.html"
    output.symlink_to(elsewhere / "file")
    assert ara("report", "-w", copied, "--output", output, "--force").exit_code == 0
    assert not card.is_symlink() and not output.is_symlink()
    card.parent.rename(tmp_path / "moved")
    card.parent.symlink_to(elsewhere)
    refused(ara("report", "-w", copied, "-q"), 1, "is a link")


def test_the_workspace_itself_and_its_cache_may_be_links(copied: Path, tmp_path: Path) -> None:
    (copied / "cache").rename(tmp_path / "cache")
    (copied / "cache").symlink_to(tmp_path / "cache")
    (tmp_path / "linked").symlink_to(copied)
    words = ("--method", "strs", "--samples", 2, "--held-out", 2, "--device", "cpu", "--dtype", "float32")
    done("allocate", "--keep", "0.5", *words, "-w", tmp_path / "linked", "-q")
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_no_files_are_read_through_links(copied: Path, tmp_path: Path) -> None:
    layer = copied / FACTORS / "layer-000.safetensors"
    layer.rename(tmp_path / "layer")
    layer.symlink_to(tmp_path / "layer")
    refused(ara("allocate", "-w", copied, "-q"), 1, "is missing or not a plain file")
    checkpoint = copied / CHECKPOINT / "checkpoint"
    checkpoint.rename(tmp_path / "checkpoint")
    checkpoint.symlink_to(tmp_path / "checkpoint")
    with pytest.raises(CorruptedError, match="not a plain file"):
        Workspace.open(copied).require("checkpoint")


def test_a_tensor_file_that_safetensors_itself_refuses(copied: Path) -> None:
    """Checksums fit, and yet it cannot be read: said before a stage opens it."""
    path = copied / FACTORS / "layer-000.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    record = FileRecord(bytes=path.stat().st_size, sha256=file_sha256(path))
    made = read_manifest(copied / FACTORS)
    forge(copied, FACTORS, files={**made.files, path.name: record})
    refused(
        ara("allocate", "--keep", "0.5", "--method", "energy", "-w", copied), 1, str(path), "is no safetensors file"
    )


def test_a_rewritten_graph_is_no_link_to_itself(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "loop.onnx").symlink_to("loop.onnx")
    result = ara("export", "--rewrite", tmp_path / "loop.onnx", "-w", copied)
    assert result.exit_code == 2 and "Traceback" not in result.output
