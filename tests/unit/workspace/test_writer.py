import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from ara.config import AllocateConfig
from ara.environment import peak_memory_bytes
from ara.errors import AraError, CorruptedError, DiskFullError, NumericalError, UsageError
from ara.workspace.manifest import MANIFEST, Manifest, Parent, digest, read_manifest, verify_files
from ara.workspace.store import Workspace
from ara.workspace.writer import PARTIAL, StageWriter, plain
from tests.damage import contents, flip, listing
from tests.stored import FIGURES, SETTINGS

FACTS = {"config": SETTINGS["decompose"], "model": {"fingerprint": "f"}, "parents": (), "seed": 3, "command": "ara x"}
CHANGED = {"config": {**SETTINGS["decompose"], "method": "whitened"}}
W = {"w": torch.arange(15.0).view(3, 5)}


class Boom(Exception):
    pass


class Writer(StageWriter):
    """Has at its end what every decomposition must have, where a test does not say otherwise."""

    def __exit__(self, *what):
        self.results = {**FIGURES["decompose"], **self.results}
        super().__exit__(*what)


def writer(root, resumable=True, name="plain", **changes):
    return Writer(root / "decompose", "decompose", name, resumable, {**FACTS, **changes})


def interrupted(root, *files, error=Boom, **changes):
    """Write ``files`` and stop by an exception."""
    with pytest.raises(error), writer(root, **changes) as stage:
        for name in files:
            stage.tensors(name, {name.partition(".")[0]: W["w"]}, {name: "noted"})
        raise error("stop")


def partial(root, name="plain"):
    return root / "decompose" / f".{name}{PARTIAL}"


def test_finished_folder_holds_files_and_manifest_and_nothing_else(tmp_path):
    with writer(tmp_path) as stage:
        stage.tensors("a.safetensors", W, {"a": 1})
        (stage.folder / "sub").mkdir()
        (stage.folder / "sub" / "notes.txt").write_text("hello")
        stage.results["b"] = 2
        assert not stage.final.exists()
    assert listing(tmp_path) == {f"decompose/plain/{name}" for name in ("a.safetensors", "sub/notes.txt", MANIFEST)}
    manifest = read_manifest(tmp_path / "decompose" / "plain")
    verify_files(tmp_path / "decompose" / "plain", manifest)
    assert set(manifest.files) == {"a.safetensors", "sub/notes.txt"}
    assert set(manifest.tensors) == {"w"}
    assert manifest.results == {**FIGURES["decompose"], "a": 1, "b": 2}
    assert (manifest.stage, manifest.name, manifest.seed, manifest.command) == ("decompose", "plain", 3, "ara x")
    assert manifest.config == FACTS["config"]
    assert manifest.seconds >= 0
    assert manifest.peak_memory_bytes > 10 << 20
    assert set(manifest.versions) >= {"ara", "python", "torch", "transformers"}


@pytest.mark.parametrize("resumable", [True, False])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_no_manifest_can_hold_never_gets_a_final_name(tmp_path, resumable, number):
    with writer(tmp_path, resumable) as stage:
        stage.tensors("a.safetensors", W)
    before = contents(tmp_path)
    with (
        pytest.raises(NumericalError, match=rf"manifest: losses.1.kl \({number}\) is not a finite"),
        writer(tmp_path, resumable, **CHANGED) as stage,
    ):
        stage.tensors("b.safetensors", W)
        stage.results["losses"] = [{"kl": 1.0}, {"kl": number}]
    assert contents(tmp_path) == before


def test_a_loose_file_is_there_and_may_change(tmp_path):
    ids = []
    for text in ("first", "second"):
        with writer(tmp_path) as stage:
            stage.tensors("a.safetensors", W, {})
            (stage.folder / "notes.txt").write_text(text)
            stage.loose("notes.txt")
        manifest = read_manifest(stage.final)
        assert set(manifest.files) == {"a.safetensors"}
        ids.append(manifest.id)
    assert len(set(ids)) == 1
    (stage.final / "notes.txt").write_text("third, and longer")
    verify_files(stage.final, manifest)


@pytest.mark.parametrize("resumable", [False, True])
def test_exception_before_the_first_file_leaves_nothing(tmp_path, resumable):
    with pytest.raises(Boom), writer(tmp_path, resumable) as stage:
        (stage.folder / "half").write_text("x")
        raise Boom
    assert listing(tmp_path) == set()
    assert list((tmp_path / "decompose").iterdir()) == []


def test_exception_in_a_stage_that_cannot_resume_leaves_nothing(tmp_path):
    interrupted(tmp_path, "a.safetensors", resumable=False)
    assert list((tmp_path / "decompose").iterdir()) == []


def test_exception_keeps_an_older_result(tmp_path):
    with writer(tmp_path) as stage:
        stage.tensors("a.safetensors", W)
    before = contents(tmp_path)
    interrupted(tmp_path, resumable=False)
    assert contents(tmp_path) == before


def test_resumed_stage_keeps_finished_files_and_their_results(tmp_path):
    interrupted(tmp_path, "a.safetensors", "b.safetensors", error=KeyboardInterrupt)
    (partial(tmp_path) / ".c.safetensors.partial").write_bytes(b"half")
    (partial(tmp_path) / "d.safetensors").write_bytes(b"written, but not yet noted")
    inode = (partial(tmp_path) / "a.safetensors").stat().st_ino
    with writer(tmp_path) as stage:
        assert stage.finished == ["a.safetensors", "b.safetensors"]
        stage.tensors("c.safetensors", {"c": W["w"]})
    folder = tmp_path / "decompose" / "plain"
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    assert listing(folder) == {"a.safetensors", "b.safetensors", "c.safetensors", MANIFEST}
    assert set(manifest.tensors) == {"a", "b", "c"}
    assert manifest.results == {**FIGURES["decompose"], "a.safetensors": "noted", "b.safetensors": "noted"}
    assert (folder / "a.safetensors").stat().st_ino == inode
    assert not partial(tmp_path).exists()


def test_resumed_stage_is_the_same_content_as_an_uninterrupted_one(tmp_path):
    interrupted(tmp_path, "a.safetensors")
    ids = []
    for name in ("plain", "other"):
        with writer(tmp_path, name=name) as stage:
            for file in ("a.safetensors", "b.safetensors"):
                if file not in stage.finished:
                    stage.tensors(file, {file.partition(".")[0]: W["w"]})
        ids.append(read_manifest(tmp_path / "decompose" / name).id)
    assert ids[0] == ids[1]


def test_seconds_of_the_interrupted_run_count(tmp_path):
    interrupted(tmp_path, "a.safetensors")
    journal = partial(tmp_path) / ".journal.json"
    document = {**json.loads(journal.read_text()), "seconds": 1000.0}
    del document["digest"]
    journal.write_text(json.dumps({**document, "digest": digest(document)}))
    with writer(tmp_path):
        pass
    assert 1000 <= read_manifest(tmp_path / "decompose" / "plain").seconds < 1100


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"method": "asvd"}},
        {"model": {"fingerprint": "other"}},
        {"parents": (Parent(key="a/b", id="c"),)},
    ],
)
def test_other_facts_discard_what_was_finished(tmp_path, changes):
    interrupted(tmp_path, "a.safetensors")
    with writer(tmp_path, **changes) as stage:
        assert stage.finished == []
        assert list(stage.folder.iterdir()) == []


def test_another_command_line_still_goes_on(tmp_path):
    interrupted(tmp_path, "a.safetensors")
    with writer(tmp_path, command="ara run x") as stage:
        assert stage.finished == ["a.safetensors"]


@pytest.mark.parametrize("position", [0, 20, -1])
def test_damaged_finished_file_discards_all(tmp_path, position):
    interrupted(tmp_path, "a.safetensors", "b.safetensors")
    flip(partial(tmp_path) / "b.safetensors", position)
    with writer(tmp_path) as stage:
        assert stage.finished == []
        assert list(stage.folder.iterdir()) == []


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"fingerprint": 1}'])
def test_journal_that_cannot_be_trusted_discards_all(tmp_path, text):
    interrupted(tmp_path, "a.safetensors")
    journal = partial(tmp_path) / ".journal.json"
    if text is None:
        journal.unlink()
    else:
        journal.write_text(text)
    with writer(tmp_path) as stage:
        assert stage.finished == []
        assert list(stage.folder.iterdir()) == []


def test_a_journal_with_one_other_figure_is_not_believed(tmp_path):
    """What it holds would go into the manifest, checksummed."""
    with pytest.raises(Boom), writer(tmp_path) as stage:
        stage.tensors("a.safetensors", W, {"perplexity": 11.25})
        raise Boom
    journal = partial(tmp_path) / ".journal.json"
    journal.write_text(journal.read_text().replace("11.25", "10.25"))
    with writer(tmp_path) as stage:
        assert stage.finished == [] and stage.results == {}


def rewrite_journal(root, change):
    """Change a journal and make its checksum right again."""
    path = partial(root) / ".journal.json"
    journal = json.loads(path.read_text())
    del journal["digest"]
    change(journal)
    path.write_text(json.dumps({**journal, "digest": digest(journal)}))


def test_the_table_of_tensors_is_that_of_the_files_whatever_a_journal_says(tmp_path):
    interrupted(tmp_path, "a.safetensors")
    rewrite_journal(tmp_path, lambda journal: journal["tensors"]["a"].update(file="\n", shape=[1]))
    with writer(tmp_path) as stage:
        assert stage.finished == ["a.safetensors"]
        stage.results.update(FIGURES["decompose"])
    record = read_manifest(stage.final).tensors["a"]
    assert (record.file, record.shape) == ("a.safetensors", (3, 5))


def test_what_was_left_and_makes_no_result_is_removed_and_reported(tmp_path):
    def change(journal):
        journal["results"]["modules"] = [{"name": "x", "layer": 0, "kind": "k", "m": 3, "n": 5}]

    interrupted(tmp_path, "a.safetensors")
    rewrite_journal(tmp_path, change)
    with pytest.raises(CorruptedError, match="make no valid result") as caught, writer(tmp_path) as stage:
        stage.results.update(linear_parameters=0, model_parameters=7)
    assert "again" in caught.value.hint and list((tmp_path / "decompose").iterdir()) == []


def test_nan_is_not_taken_up_again(tmp_path):
    """The same work would end in the same NaN."""
    interrupted(tmp_path, "a.safetensors", error=NumericalError)
    assert list((tmp_path / "decompose").iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: ... (os error 28)")]
)
def test_full_disk_inside_the_block_is_told(tmp_path, error):
    with pytest.raises(DiskFullError, match="the disk is full") as caught, writer(tmp_path, resumable=False):
        raise error
    assert caught.value.__cause__ is error
    assert list((tmp_path / "decompose").iterdir()) == []


def test_other_errors_pass_through_unchanged(tmp_path):
    error = AraError("mine")
    with pytest.raises(AraError) as caught, writer(tmp_path):
        raise error
    assert caught.value is error


def test_full_disk_at_the_manifest_loses_no_finished_file(tmp_path, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "sealed", full)
        with pytest.raises(DiskFullError), writer(tmp_path) as stage:
            stage.tensors("a.safetensors", W)
    with writer(tmp_path) as stage:
        assert stage.finished == ["a.safetensors"]
    assert listing(tmp_path / "decompose" / "plain") == {"a.safetensors", MANIFEST}


def test_replacement_killed_between_its_renames_keeps_the_older_result(tmp_path, monkeypatch):
    with writer(tmp_path) as stage:
        stage.tensors("a.safetensors", W, FIGURES["decompose"])
    before = contents(tmp_path)
    rename = os.replace

    def killed_at_the_second_rename(source, target):
        if str(target).endswith("/plain"):
            raise SystemExit("killed")
        rename(source, target)

    workspace = Workspace.open(tmp_path / "ws", create=True)
    (tmp_path / "decompose").rename(workspace.root / "decompose")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_at_the_second_rename)
        with pytest.raises(SystemExit), writer(workspace.root, command="ara again") as stage:
            stage.tensors("a.safetensors", {"w": W["w"] + 1})
    assert not (workspace.root / "decompose" / "plain").exists()
    with workspace.lock("ara y"):
        assert workspace.view("decompose/plain").state == "done"
    now = {name: sha for name, sha in contents(workspace.root).items() if name.startswith("decompose/plain/")}
    assert now == before


def test_replaced_result_is_gone_altogether(tmp_path):
    for files in (("a.safetensors", "old.safetensors"), ("a.safetensors",)):
        with writer(tmp_path, resumable=False) as stage:
            for file in files:
                stage.tensors(file, {file.partition(".")[0]: W["w"]})
    assert listing(tmp_path) == {"decompose/plain/a.safetensors", f"decompose/plain/{MANIFEST}"}


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../x", "a\\b", "c:", "x.partial", "x.old", "a\0b"])
def test_name_that_is_no_folder_name_is_refused(tmp_path, name):
    workspace = Workspace.open(tmp_path / "ws", create=True)
    with pytest.raises(UsageError, match="cannot be the name of a result") as caught:
        workspace.writer("allocate", name, FACTS, command="x")
    assert "--name" in caught.value.hint
    assert not (workspace.root / "allocate").exists()


def test_plain_makes_json_of_configs_and_tuples():
    assert plain({"c": AllocateConfig(keep=0.5), "t": (1, 2)})["c"]["keep"] == 0.5
    assert plain((1, (2,))) == [1, [2]]


def test_peak_memory_is_in_bytes():
    """A Python with torch holds more than 50 MiB and this machine's tests less than 64 GiB."""
    assert 50 << 20 < peak_memory_bytes() < 64 << 30


@pytest.mark.parametrize("to_go_on", [False, True])
def test_what_ctrl_c_has_left_aside_is_no_part_of_the_result(tmp_path, monkeypatch, to_go_on):
    """A stage that makes the best so far its result goes on after Ctrl+C, also when that came just before a rename."""
    rename = os.replace

    def interrupted(source, target):
        monkeypatch.setattr(os, "replace", rename)
        raise KeyboardInterrupt

    with writer(tmp_path) as stage:
        stage.tensors("a.safetensors", W)
        for write in (lambda: stage.save_checkpoint(W, {"step": 1}), lambda: stage.text("b.csv", "1,2")):
            monkeypatch.setattr(os, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write()
        assert [path.name for path in stage.folder.glob(f".*{PARTIAL}")]
        stage.to_go_on = to_go_on
    folder = tmp_path / "decompose" / "plain"
    made = read_manifest(folder)
    verify_files(folder, made)
    assert set(made.files) == {"a.safetensors", "b.csv"}
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_work_is_there_after_an_interruption_and_not_in_the_result(tmp_path):
    with pytest.raises(Boom), writer(tmp_path) as stage:
        stage.finish_work("one:a", W, {"seconds": 2})
        stage.finish_work("one:b", {"w": W["w"] + 1}, {"seconds": 3})
        stage.finish_work("two", W, {})
        raise Boom
    with writer(tmp_path) as stage:
        assert stage.all_work() == {"one:a": {"seconds": 2}, "one:b": {"seconds": 3}, "two": {}}
        path, values = stage.work("one:b")
        assert values == {"seconds": 3} and torch.equal(load_file(path)["w"], W["w"] + 1)
        assert stage.work("three") is None
        stage.drop_work("one:")
        assert list(stage.all_work()) == ["two"] and not path.exists()
        stage.tensors("a.safetensors", {"w": W["w"] * 2})
    folder = tmp_path / "decompose" / "plain"
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    assert listing(folder) == {"a.safetensors", MANIFEST} == {*manifest.files, MANIFEST}
    assert manifest.tensors["w"].file == "a.safetensors"


def test_damaged_work_discards_all(tmp_path):
    with pytest.raises(Boom), writer(tmp_path) as stage:
        stage.finish_work("one", W, {})
        raise Boom
    flip(partial(tmp_path) / ".work-one.safetensors", -1)
    with writer(tmp_path) as stage:
        assert stage.all_work() == {} and stage.finished == []


def test_work_stays_beside_a_result_that_goes_on(tmp_path):
    for last in (False, True):
        with writer(tmp_path) as stage:
            assert list(stage.all_work()) == ([] if not last else ["one"])
            stage.finish_work("one", W, {})
            (stage.folder / "sub").mkdir()
            (stage.folder / "sub" / "notes.txt").write_text(f"last: {last}")
            stage.to_go_on = not last
        folder = tmp_path / "decompose" / "plain"
        verify_files(folder, read_manifest(folder))
        assert listing(folder) == {"sub/notes.txt", MANIFEST}
        assert (partial(tmp_path) / ".work-one.safetensors").exists() != last
