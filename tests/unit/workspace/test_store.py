import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ara.errors import CorruptedError, LockedError, WorkspaceError
from ara.workspace.following import next_command
from ara.workspace.index import INDEX
from ara.workspace.manifest import FORMAT_VERSION, MANIFEST
from ara.workspace.store import Workspace
from ara.workspace.view import parent_of
from tests.damage import contents, flip, listing
from tests.stored import MODEL, SETTINGS, store

OTHER = {"requested": "other", "fingerprint": "b" * 64}
REPOSITORY = Path(__file__).resolve().parents[3]


def family(workspace):
    """Store a grandparent, two children and a grandchild."""
    store(workspace, "decompose/plain")
    store(workspace, "allocate/energy-0.80", parents=["decompose/plain"])
    store(workspace, "allocate/energy-0.60", "other ranks", parents=["decompose/plain"])
    store(workspace, "truncate/energy-0.80", parents=["allocate/energy-0.80", "decompose/plain"])


def states(workspace):
    return {view.key: view.state for view in workspace.views()}


def test_new_workspace_has_an_index_and_no_model(tmp_path):
    workspace = Workspace.open(tmp_path / "a" / "ws", create=True)
    assert workspace.model is None
    assert json.loads((workspace.root / INDEX).read_text()) == {"format_version": FORMAT_VERSION, "model": None}
    assert listing(workspace.root) == {INDEX}
    assert workspace.views() == []
    assert Workspace.open(workspace.root).model is None


def test_missing_workspace_says_how_to_start(tmp_path):
    with pytest.raises(WorkspaceError, match="there is no workspace at") as caught:
        Workspace.open(tmp_path / "ws")
    assert "ara decompose MODEL" in caught.value.hint
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize("create", [False, True])
def test_folder_of_something_else_is_left_alone(tmp_path, create):
    (tmp_path / "photo.jpg").write_text("x")
    with pytest.raises(WorkspaceError, match=r"exists and is not an ara workspace \(no workspace\.json\)"):
        Workspace.open(tmp_path, create)
    with pytest.raises(WorkspaceError, match="is not an ara workspace"):
        Workspace.open(tmp_path / "photo.jpg", create)
    assert listing(tmp_path) == {"photo.jpg"}


def test_folder_with_only_hidden_files_may_become_one(tmp_path):
    (tmp_path / ".gitignore").write_text("*")
    assert Workspace.open(tmp_path, create=True).model is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", "{}", '{"format_version": 1}', '{"format_version": 1, "model": "x"}']
)
def test_damaged_index_is_told(tmp_path, workspace, text):
    (workspace.root / INDEX).write_text(text)
    for act in (lambda: Workspace.open(workspace.root), lambda: workspace.model, lambda: workspace.bind(MODEL)):
        with pytest.raises(WorkspaceError, match=r"workspace\.json cannot be read"):
            act()


def test_index_that_is_no_text_is_told(workspace):
    (workspace.root / INDEX).write_bytes(b"\xff\xfe")
    with pytest.raises(WorkspaceError, match=r"workspace\.json cannot be read"):
        Workspace.open(workspace.root)


@pytest.mark.parametrize("document", [{"format_version": 2}, {"format_version": 9, "model": None}])
def test_newer_workspace_asks_for_an_update(workspace, document):
    (workspace.root / INDEX).write_text(json.dumps(document))
    with pytest.raises(WorkspaceError, match=f"has format {document['format_version']}; .* up to 1") as caught:
        Workspace.open(workspace.root, create=True)
    assert "update" in caught.value.hint


def test_workspace_belongs_to_one_model(workspace):
    store(workspace, "decompose/plain")
    workspace.bind(MODEL)
    workspace.bind({**MODEL, "requested": "./demo"})
    before = contents(workspace.root)
    with pytest.raises(WorkspaceError, match=r"belongs to demo \(a{12}\), not to other \(b{12}\)") as caught:
        workspace.bind(OTHER)
    assert "-w" in caught.value.hint
    assert contents(workspace.root) == before


def test_partial_result_keeps_the_model(workspace):
    (workspace.root / "decompose" / ".plain.partial").mkdir(parents=True)
    with pytest.raises(WorkspaceError, match="belongs to demo"):
        workspace.bind(OTHER)


def test_workspace_without_any_result_may_change_its_model(workspace):
    workspace.bind(OTHER)
    assert workspace.model == OTHER


@pytest.mark.parametrize("before", [False, True])
def test_new_workspace_goes_away_with_a_failure_before_its_first_result(tmp_path, before):
    root = tmp_path / "ws"
    if before:
        root.mkdir()
        (root / ".gitignore").write_text("*")
    workspace = Workspace.open(root, create=True)
    with pytest.raises(RuntimeError, match="boom"), workspace.lock("x"):
        workspace.bind(MODEL)
        workspace.cache.mkdir()
        raise RuntimeError("boom")
    assert listing(tmp_path) == ({"ws/.gitignore"} if before else set())
    assert root.exists() == before


def test_failure_keeps_a_workspace_with_a_result_or_of_an_earlier_command(tmp_path, workspace):
    with pytest.raises(RuntimeError, match="boom"), Workspace.open(workspace.root).lock("x"):
        raise RuntimeError("boom")
    assert (workspace.root / INDEX).is_file()
    fresh = Workspace.open(tmp_path / "fresh", create=True)
    with pytest.raises(RuntimeError, match="boom"), fresh.lock("x"):
        (fresh.root / "decompose" / ".plain.partial").mkdir(parents=True)
        raise RuntimeError("boom")
    assert states(fresh) == {"decompose/plain": "partial"}


def test_stored_results_are_done_and_sorted_by_age(workspace):
    family(workspace)
    assert states(workspace) == dict.fromkeys(
        ["allocate/energy-0.80", "allocate/energy-0.60", "decompose/plain", "truncate/energy-0.80"], "done"
    )
    assert [view.name for view in workspace.views("ranks")] == ["energy-0.80", "energy-0.60"]
    assert workspace.require("ranks").name == "energy-0.60"
    assert workspace.require("ranks", "energy-0.80").key == "allocate/energy-0.80"
    assert (workspace.view("decompose/plain").stage, workspace.view("decompose/plain").name) == ("decompose", "plain")


def test_changed_parent_makes_children_and_grandchildren_stale(workspace):
    family(workspace)
    store(workspace, "decompose/plain", "changed")
    assert states(workspace) == {
        "decompose/plain": "done",
        "allocate/energy-0.80": "stale",
        "allocate/energy-0.60": "stale",
        "truncate/energy-0.80": "stale",
    }
    assert workspace.view("allocate/energy-0.80").why == "decompose/plain has changed since"
    with pytest.raises(WorkspaceError, match=r"truncate/energy-0\.80 is stale") as caught:
        workspace.require("checkpoint")
    assert caught.value.hint == "make it again: ara test"


def test_grandchild_of_one_line_only_is_stale(workspace):
    """The checkpoint names the ranks and not what they were made from."""
    store(workspace, "decompose/plain")
    store(workspace, "allocate/a", parents=["decompose/plain"])
    store(workspace, "truncate/a", parents=["allocate/a"])
    store(workspace, "eval/a", parents=["truncate/a"])
    store(workspace, "decompose/plain", "changed")
    assert workspace.view("eval/a").state == "stale"
    # The first cause, and what mends it: the ranks come before checkpoint and evaluation.
    assert workspace.view("eval/a").why == "decompose/plain has changed since"
    assert workspace.view("eval/a").remedy == "make it again: ara test"


def test_same_work_done_again_leaves_children_valid(workspace):
    family(workspace)
    first = workspace.view("decompose/plain").manifest
    time.sleep(0.002)
    second = store(workspace, "decompose/plain").manifest
    assert second.created > first.created
    assert second.id == first.id
    assert set(states(workspace).values()) == {"done"}


def test_other_facts_with_the_same_files_make_children_stale(workspace):
    family(workspace)
    store(workspace, "decompose/plain", seed=1)
    assert workspace.view("truncate/energy-0.80").state == "stale"


@pytest.mark.parametrize("how", ["removed", "damaged"])
def test_lost_parent_makes_children_stale(workspace, how):
    family(workspace)
    manifest = workspace.root / "allocate" / "energy-0.80" / MANIFEST
    manifest.unlink() if how == "removed" else flip(manifest, 40)
    view = workspace.view("truncate/energy-0.80")
    assert (view.state, view.why) == ("stale", "allocate/energy-0.80 is damaged")
    assert view.remedy == workspace.view("allocate/energy-0.80").remedy
    assert workspace.view("allocate/energy-0.80").state == "damaged"
    assert MANIFEST in workspace.view("allocate/energy-0.80").why


def test_finished_is_the_same_work_only(workspace):
    view = store(workspace, "decompose/plain")
    facts = {"config": {**SETTINGS["decompose"], "seed": 0}, "model": MODEL, "parents": ()}
    assert workspace.finished("decompose", "plain", facts).manifest == view.manifest
    assert workspace.finished("decompose", "plain", {**facts, "config": {"seed": 1}}) is None
    assert workspace.finished("decompose", "plain", {**facts, "model": OTHER}) is None
    assert workspace.finished("decompose", "other", facts) is None
    store(workspace, "allocate/a", parents=["decompose/plain"])
    child = {"config": {**SETTINGS["allocate"], "seed": 0}, "model": MODEL, "parents": (parent_of(view),)}
    assert workspace.finished("allocate", "a", child) is not None
    store(workspace, "decompose/plain", "changed")
    assert workspace.finished("allocate", "a", child) is None


def test_require_names_what_is_there(workspace):
    with pytest.raises(WorkspaceError, match="has no result of ara allocate yet") as caught:
        workspace.require("ranks")
    assert caught.value.hint == "run ara allocate first"
    family(workspace)
    with pytest.raises(WorkspaceError, match=r"has no allocate/energy-0\.8: did you mean energy-0\.80") as caught:
        workspace.require("ranks", "energy-0.8")


def test_require_reads_the_files(workspace):
    family(workspace)
    flip(workspace.root / "decompose" / "plain" / "x.txt", 0)
    with pytest.raises(CorruptedError, match=r"decompose/plain/x\.txt"):
        workspace.require("factors")
    assert workspace.require("factors", verify=False).state == "done"
    flip(workspace.root / "decompose" / "plain" / MANIFEST, 60)
    with pytest.raises(CorruptedError, match=r"manifest\.json"):
        workspace.require("factors", "plain")


def test_damaged_result_is_not_passed_over_in_silence(workspace):
    """It may be the latest one: an older one must not take its place unasked."""
    family(workspace)
    flip(workspace.root / "allocate" / "energy-0.60" / MANIFEST, 60)
    with pytest.raises(CorruptedError, match=r"energy-0\.60/manifest\.json"):
        workspace.require("ranks")
    assert workspace.require("ranks", "energy-0.80").state == "done"


def test_partial_and_replaced_folders_in_the_list(workspace):
    family(workspace)
    (workspace.root / "truncate" / ".energy-0.60.partial").mkdir()
    (workspace.root / "truncate" / ".energy-0.80.old").mkdir()
    (workspace.root / "cache" / "tokens").mkdir(parents=True)
    views = workspace.views("checkpoint")
    assert [(view.name, view.state) for view in views] == [("energy-0.80", "done"), ("energy-0.60", "partial")]
    assert views[1].manifest is None
    assert not any(view.stage == "cache" for view in workspace.views())
    with pytest.raises(WorkspaceError, match=r"has no truncate/energy-0\.60"):
        workspace.require("checkpoint", "energy-0.60")


def test_replacement_killed_between_two_renames_is_undone_or_finished(workspace):
    family(workspace)
    final = workspace.root / "decompose" / "plain"
    old = final.with_name(".plain.old")
    clean = contents(final)
    # Killed after the old result was moved away and before the new one came.
    final.rename(old)
    assert workspace.view("allocate/energy-0.80").state == "stale"
    with workspace.lock("ara x"):
        assert contents(final) == clean
        assert not old.exists()
    assert set(states(workspace).values()) == {"done"}
    # Killed after the new one came and before the old one was removed.
    old.mkdir()
    (old / "x.txt").write_text("older")
    with workspace.lock("ara x"):
        assert not old.exists()
    assert contents(final) == clean


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_kill_has_left_in_the_cache_goes_unless_others_may_be_writing_it(workspace, tmp_path, shared):
    cache = tmp_path / "shared" if shared else workspace.cache
    (cache / "tokens").mkdir(parents=True)
    if shared:
        workspace.cache.symlink_to(cache)
    for name in (".tmpRjx8Ib", f".x.safetensors.{'0' * 32}", "x.safetensors"):
        (cache / "tokens" / name).touch()
    with workspace.lock("ara x"):
        assert len(listing(cache)) == (3 if shared else 1)


def test_next_command_follows_the_pipeline(workspace):
    steps = [next_command(workspace)]
    for key in ("decompose/plain", "allocate/a", "truncate/a", "eval/a"):
        store(workspace, key)
        steps.append(next_command(workspace))
    assert [step.split(" ")[1] for step in steps] == ["decompose", "allocate", "truncate", "recover", "allocate"]
    assert steps[0] == f"ara decompose demo -w {workspace.root}"
    assert all(shlex.split(step)[-2:] == ["-w", str(workspace.root)] for step in steps)


HOLDER = """
import sys, time
from pathlib import Path
from ara.workspace.store import Workspace
with Workspace.open(Path(sys.argv[1])).lock("ara decompose demo --samples 8"):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(workspace):
    """Another process that holds the lock of ``workspace``."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(workspace.root)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_second_writer_is_told_who_holds_the_lock(workspace, holder):
    expected = f"process {holder.pid} (ara decompose demo --samples 8, since "
    with pytest.raises(LockedError, match=re.escape(expected)) as caught, workspace.lock("ara y"):
        pytest.fail("two writers")
    assert "wait for it" in caught.value.hint
    assert holder.poll() is None
    assert workspace.views() == []  # reading needs no lock


def test_lock_of_a_killed_process_is_free(workspace, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(10)
    assert (workspace.root / ".lock-owner.json").exists()  # it had no time to clean up
    with workspace.lock("ara y"):
        assert json.loads((workspace.root / ".lock-owner.json").read_text())["pid"] == os.getpid()
    assert not (workspace.root / ".lock-owner.json").exists()


def test_lock_is_free_after_an_exception_and_not_before(workspace):
    with pytest.raises(RuntimeError), workspace.lock("ara x"):
        with pytest.raises(LockedError, match=f"process {os.getpid()} "), Workspace(workspace.root).lock("ara y"):
            pytest.fail("two writers")
        raise RuntimeError
    with workspace.lock("ara z"):
        pass


def test_lock_without_a_readable_owner_still_holds(workspace, holder):
    (workspace.root / ".lock-owner.json").write_text("{")
    with pytest.raises(LockedError, match="another process"), workspace.lock("ara y"):
        pytest.fail("two writers")
