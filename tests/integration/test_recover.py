"""``ara recover``: its place in the pipeline, its guard, interruptions, and input that it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ara import recovery
from ara.artifacts.checkpoint import CheckpointResults
from ara.config import RecoverConfig
from ara.errors import MemoryShortError, NumericalError, UsageError
from ara.recovery.base import Level, LevelOutcome, Recovery
from ara.registry import Entry, Registry
from ara.stages.common import Run
from ara.stages.recover import DETAILS, recover
from ara.workspace.store import Workspace
from ara.workspace.view import StageView
from tests.commands import ara, done, refused
from tests.damage import listing
from tests.recorder import Recorder
from tests.tiny import save_tiny

CPU = ("--device", "cpu", "--dtype", "float32")
FEW = (*CPU, "--samples", 16, "--held-out", 8)
CONFIG = RecoverConfig(level="worse", device="cpu", dtype="float32", samples=16, held_out=8)


class Worse(Level):
    """Spoils every norm of the blocks."""

    def repair(self, recovery: Recovery) -> LevelOutcome:
        with torch.no_grad():
            for name, parameter in recovery.model.named_parameters():
                if "layernorm" in name:
                    parameter.mul_(-3)
        return LevelOutcome(tokens=7)


class Broken(Level):
    """Gives NaN."""

    def repair(self, recovery: Recovery) -> LevelOutcome:
        raise NumericalError("the loss is nan", "lower the rate")


class Stopped(Level):
    """Is interrupted the first time, and finishes after a resume."""

    def repair(self, recovery: Recovery) -> LevelOutcome:
        if recovery.saved.part("first") is None:
            recovery.saved.finish_part("first", {"x": torch.ones(2)}, {"tokens": 3})
            return LevelOutcome(tokens=3, interrupted="interrupted after part 1 of 2")
        return LevelOutcome(tokens=recovery.saved.values("first")["tokens"] + 4)


class Short(Level):
    """Runs out of memory."""

    less_memory = "less of it"

    def repair(self, recovery: Recovery) -> LevelOutcome:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes")


class Interrupted(Level):
    """Is interrupted before it has anything to keep."""

    def repair(self, recovery: Recovery) -> LevelOutcome:
        raise KeyboardInterrupt


READ: dict[str, torch.Tensor] = {}


class First(Level):
    """Changes nothing, and remembers its text."""

    def repair(self, recovery: Recovery) -> LevelOutcome:
        READ[type(self).__name__] = recovery.train.ids
        READ["held out"], READ["unseen"] = recovery.held_out.ids, recovery.unseen.ids
        for what, text in ((type(self).__name__, recovery.train), ("held out", recovery.held_out)):
            if text.counted is not None:
                READ[f"{what} counted"] = text.counted
        return LevelOutcome(tokens=0)


class Second(First):
    """As many windows as a setting of its own says."""

    def windows(self, config: RecoverConfig) -> int:
        return config.steps


def register(monkeypatch: pytest.MonkeyPatch, *kinds: type[Level]) -> None:
    """Register toy levels instead of the real ones."""
    entries = [Entry(kind.__name__.lower(), "a toy", f"{__name__}:{kind.__name__}") for kind in kinds]
    table = Registry("recovery level", entries)
    monkeypatch.setattr(recovery, "LEVELS", table)
    for module in ("recover", "recovery_levels", "recovery_text"):
        monkeypatch.setattr(f"ara.stages.{module}.LEVELS", table)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the levels above."""
    register(monkeypatch, First, Second, Worse, Broken, Stopped)


def repaired(root: Path) -> list[StageView]:
    return [
        view for view in Workspace.open(root).views("checkpoint") if view.stage == "recover" and view.state == "done"
    ]


def figures(view: Any) -> Any:
    found = CheckpointResults.read(view).recovery
    assert found is not None
    return found


def test_it_writes_a_checkpoint_that_every_later_command_takes(copied: Path, tiny_text: str) -> None:
    document = json.loads(done("recover", *FEW, "-w", copied, "--json").stdout)
    name = document["name"]
    assert document["stage"] == "recover" and name == "energy-0.70-closed"
    assert {path.name for path in (copied / "recover" / name).iterdir()} == {"checkpoint", "manifest.json", DETAILS}
    found = document["results"]["recovery"]
    assert found["after"] < found["before"] and found["stopped"] is None
    assert [level["level"] for level in found["levels"]] == ["closed"]
    layers = json.loads((copied / "recover" / name / DETAILS).read_text())["closed"]["layers"]
    assert set(layers) == {layer["name"] for layer in _modules(copied)}
    evaluated = json.loads(
        done("eval", "--tasks", tiny_text, "--seq-len", 48, "--max-windows", 2, *CPU, "-w", copied, "--json").stdout
    )
    assert evaluated["parents"][0]["key"] == f"recover/{name}"
    done("report", "-w", copied)
    page = json.loads((copied / "report" / name / "report.json").read_text())
    assert page["checkpoint"]["recovery"]["levels"][0]["level"] == "closed"
    card = (copied / "recover" / name / "checkpoint" / "README.md").read_text()
    assert "repaired at the level closed" in card and "No weight was trained" not in card
    assert "repaired at the level closed" in (copied / "report" / name / "report.html").read_text()


def _modules(root: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((root / "decompose" / "two-sided" / "manifest.json").read_text())[
        "results"
    ]["modules"]
    return found


def test_a_repaired_checkpoint_can_be_repaired_again(copied: Path) -> None:
    done("recover", *FEW, "-w", copied)
    again = json.loads(done("recover", *FEW, "--from", "recover/energy-0.70-closed", "-w", copied, "--json").stdout)
    assert again["name"] == "energy-0.70-closed-closed"
    assert again["parents"][0]["key"] == "recover/energy-0.70-closed"
    assert again["results"]["recovery"]["after"] <= again["results"]["recovery"]["before"]


def test_the_same_command_is_done_and_another_text_is_not(copied: Path, tmp_path: Path) -> None:
    first = done("recover", *FEW, "-w", copied)
    assert "is there already" not in first.stderr
    # Settings of levels that do not run do not matter.
    assert "is there already" in done("recover", *FEW, "--steps", 3, "--block-epochs", 1, "-w", copied).stderr
    text = tmp_path / "other.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"the number {i} and the number {i + 1} " * 20}) + "\n" for i in range(60))
    )
    assert "is there already" not in done("recover", *FEW, "--text", f"file:{text}", "-w", copied).stderr


def test_every_level_has_windows_of_its_own(toy: None, copied: Path) -> None:
    few = CONFIG.model_copy(update={"samples": 5, "held_out": 3, "steps": 7})
    view = recover(few.model_copy(update={"level": "second"}), Run(copied))
    assert [len(READ[name]) for name in ("First", "Second", "held out", "unseen")] == [5, 7, 3, 3]
    assert (figures(view).windows, figures(view).held_out) == (12, 3)
    ids, second = torch.cat(list(READ.values())), READ["Second"]
    assert len(ids.unique(dim=0)) == 18
    tokens = max((load_file(path)["ids"] for path in (copied / "cache" / "tokens").iterdir()), key=len)
    used = json.loads((copied / "decompose" / "two-sided" / "manifest.json").read_text())["config"]["samples"]
    assert torch.equal(tokens[used : used + 12], torch.cat([READ["First"], second]))
    # Alone it reads the same ones.
    recover(few.model_copy(update={"level": "second", "only": True}), Run(copied))
    assert torch.equal(READ["Second"], second)


def test_a_later_repair_is_judged_on_text_that_no_earlier_one_has_read(toy: None, copied: Path) -> None:
    few = CONFIG.model_copy(update={"samples": 5, "held_out": 3, "steps": 7})
    first = recover(few.model_copy(update={"level": "second"}), Run(copied))
    read = torch.cat([READ["First"], READ["Second"]])
    recover(few.model_copy(update={"level": "first"}), Run(copied), checkpoint=first.key)
    held_out = torch.cat([READ["held out"], READ["unseen"]])
    assert len(torch.cat([read, held_out]).unique(dim=0)) == len(read) + len(held_out)


def test_a_level_that_makes_it_worse_is_taken_back(toy: None, copied: Path) -> None:
    heard = Recorder()
    view = recover(CONFIG.model_copy(update={"only": True}), Run(copied, report=heard))
    found = figures(view)
    (row,) = found.levels
    assert not row.kept and row.after > row.before and found.after == found.before
    assert any("level worse is taken back" in text for text in heard.warnings)
    torch.testing.assert_close(_logits(view.path), _logits(copied / "truncate" / "energy-0.70"))


def _logits(folder: Path) -> torch.Tensor:
    from ara.models.checkpoint import load

    model = load(folder / "checkpoint", "cpu", "float32")
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.arange(3, 23)[None]).logits
    return logits


def test_nan_ends_the_stage_and_leaves_nothing(toy: None, copied: Path) -> None:
    before = listing(copied / "truncate")
    with pytest.raises(NumericalError, match="the loss is nan"):
        recover(CONFIG.model_copy(update={"level": "broken", "only": True}), Run(copied))
    assert not any((copied / "recover").iterdir()) and listing(copied / "truncate") == before


def test_what_ctrl_c_has_stopped_is_stored_and_resumes(toy: None, copied: Path) -> None:
    config = CONFIG.model_copy(update={"level": "stopped", "only": True})
    heard = Recorder()
    first = recover(config, Run(copied, report=heard), keep_on_interrupt=True)
    assert figures(first).stopped == "interrupted after part 1 of 2" and first.state == "done"
    assert any("the same command resumes" in text for text in heard.warnings)
    assert not any(path.name.startswith(".work") for path in first.path.iterdir())
    second = recover(config, Run(copied), keep_on_interrupt=True)
    assert figures(second).stopped is None and figures(second).levels[0].tokens == 7
    assert {path.name for path in (copied / "recover").iterdir()} == {second.name}


@pytest.mark.parametrize(("kind", "said"), [(Broken, "the loss is nan"), (Short, "ran out of memory")])
def test_a_later_level_that_fails_leaves_the_result_of_the_earlier_ones(
    monkeypatch: pytest.MonkeyPatch, copied: Path, kind: type[Level], said: str
) -> None:
    register(monkeypatch, First, kind)
    level = kind.__name__.lower()
    config = CONFIG.model_copy(update={"level": level})
    for _ in range(2):
        # Again: the earlier levels are read, the level fails again.
        with pytest.raises((NumericalError, MemoryShortError), match=said) as caught:
            recover(config, Run(copied))
        assert f"--level {level} --only --from recover/" in str(caught.value.hint)
        (view,) = repaired(copied)
        assert [row.level for row in figures(view).levels] == ["first"] and level in str(figures(view).stopped)
        assert "first" in str(caught.value) and view.key in str(caught.value)
    torch.testing.assert_close(_logits(view.path), _logits(copied / "truncate" / "energy-0.70"))


def test_the_knobs_of_a_level_that_ran_out_of_memory_are_named(monkeypatch: pytest.MonkeyPatch, copied: Path) -> None:
    register(monkeypatch, First, Short)
    with pytest.raises(MemoryShortError) as caught:
        recover(CONFIG.model_copy(update={"level": "short", "only": True}), Run(copied))
    assert caught.value.hint == "use less of it"
    assert not repaired(copied)


def test_ctrl_c_at_the_beginning_of_a_level_keeps_the_levels_before_it(
    monkeypatch: pytest.MonkeyPatch, copied: Path
) -> None:
    register(monkeypatch, First, Interrupted)
    config = CONFIG.model_copy(update={"level": "interrupted"})
    view = recover(config, Run(copied), keep_on_interrupt=True)
    assert figures(view).stopped == "interrupted at the beginning of interrupted"
    assert [row.level for row in figures(view).levels] == ["first"]
    with pytest.raises(KeyboardInterrupt):
        recover(config.model_copy(update={"only": True}), Run(copied), keep_on_interrupt=True)


def test_the_loss_on_answers_reads_and_chooses_by_answers_alone(toy: None, copied: Path, tmp_path: Path) -> None:
    said = [[("user", f"What is {n}?"), ("assistant", f"{n} is a number, and so is {n + 1}.")] for n in range(400)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in one]} for one in said]
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CONFIG.model_copy(update={"level": "first", "only": True, "loss_on": "answers"})
    recover(config.model_copy(update={"text": f"chat:{path}", "seq_len": 64}), Run(copied))
    for name in ("First counted", "held out counted"):
        counted = READ[name]
        assert counted.dtype == torch.bool and 0 < counted.float().mean() < 1
    with pytest.raises(UsageError, match="has none"):
        recover(config, Run(copied))


def failed(result: Any, code: int, *words: str) -> None:
    """Check for one error, after the lines that say what was being done."""
    assert result.exit_code == code, result.output
    lines = result.stderr.splitlines()
    (error,) = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert all(line.startswith("hint: ") for line in lines[error + 1 :]) and len(lines) <= error + 2, result.stderr
    assert all(word in lines[error] for word in words), result.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--level", "closd"), 2, "did you mean closed"),
        (("--checkpoint", "other"), 1, "other"),
        (("--text", "file:/nowhere.txt"), 1, "/nowhere.txt"),
        (("--seq-len", 9000), 2, "9000"),
    ],
)
def test_bad_input_is_one_line(copied: Path, words: tuple[Any, ...], code: int, message: str) -> None:
    failed(ara("recover", *FEW, *words, "-w", copied), code, message)
    assert not (copied / "recover").exists() or not any((copied / "recover").iterdir())


def test_without_a_checkpoint_the_command_that_makes_one_is_named(copied: Path) -> None:
    shutil.rmtree(copied / "eval")
    shutil.rmtree(copied / "truncate")
    assert "ara truncate" in refused(ara("recover", *FEW, "-w", copied), 1, "has no result of ara truncate")


def test_a_densified_checkpoint_is_refused(copied: Path) -> None:
    done("truncate", "--densify", "-w", copied)
    refused(ara("recover", *FEW, "--checkpoint", "energy-0.70-dense", "-w", copied), 1, "is densified")


def test_too_little_text_is_refused(copied: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words " * 7)
    failed(ara("recover", *FEW, "--text", f"file:{text}", "-w", copied), 1, "windows", "at least 3")


@pytest.mark.parametrize("layout", ["factors", "pivoted"])
def test_the_graph_of_a_repaired_checkpoint_computes_the_same(
    layout: str, checkpoint: Callable[..., Any], tmp_path: Path, tiny_text: str
) -> None:
    words = [checkpoint("llama", None).folder, "--text", tiny_text, "--samples", 16, "--seq-len", 48, *CPU]
    words += ["--rank-samples", 8, "--held-out", 4, "--keep", 0.5, "--layout", layout, "--no-eval"]
    done("run", *words, "-w", tmp_path / "ws")
    exported = json.loads(done("export", "-w", tmp_path / "ws", "--json").stdout)
    assert exported["parents"][0]["key"].startswith("recover/")
    assert exported["results"]["parity"]["cases"]


def test_run_repairs_by_default_and_none_leaves_it_out(
    tmp_path: Path, tiny_settings: dict[str, Any], tiny_text: str
) -> None:
    words = ["run", tiny_settings["model"], "--text", tiny_text, "--samples", 16, "--seq-len", 48, *CPU]
    words += ["--rank-samples", 8, "--held-out", 4, "--no-eval", "-w", tmp_path / "ws"]
    done(*words)
    views = {view.stage: view for view in Workspace.open(tmp_path / "ws").views("checkpoint")}
    assert set(views) == {"truncate", "recover"}
    assert (figures(views["recover"]).windows, figures(views["recover"]).held_out) == (16, 4)
    done(*words[:-1], tmp_path / "other", "--recover", "none")
    assert [view.stage for view in Workspace.open(tmp_path / "other").views("checkpoint")] == ["truncate"]
    failed(ara(*words[:-1], tmp_path / "third", "--recover", "clozed"), 2, "did you mean closed")
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("family", ["opt", "qwen2", "gemma", "phi3"])
def test_families_with_biases_tied_heads_and_packed_layers(family: str, tmp_path: Path, tiny_text: str) -> None:
    model = save_tiny(tmp_path / "model", family)
    words = [model, "--text", tiny_text, "--samples", 40, "--seq-len", 48, *CPU, "--rank-samples", 8, "--held-out", 8]
    done("run", *words, "--keep", 0.5, "--layout", "pivoted", "--no-eval", "-w", tmp_path / "ws")
    (view,) = (one for one in Workspace.open(tmp_path / "ws").views("checkpoint") if one.stage == "recover")
    found = figures(view)
    assert found.levels[0].kept and found.after < found.before


def test_a_kept_adapter_is_in_the_result_and_survives_a_kill(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import PeftModel

    from ara.models.checkpoint import load
    from ara.stages.compressed import Compressed

    words = {"level": "distill", "only": True, "train": "lora", "keep_adapter": True, "rate": 3e-3, "steps": 4}
    config = CONFIG.model_copy(update={**words, "batch": 4, "check_every": 2, "lora_rank": 3})
    with monkeypatch.context() as patch:
        # Killed after the level has finished, before the checkpoint is written.
        patch.setattr(Compressed, "write", _killed)
        patch.setattr("ara.workspace.writer.StageWriter._abandon", lambda self, error: None)
        with pytest.raises(KeyboardInterrupt):
            recover(config, Run(copied))
        # What has finished is read, not made again.
        patch.undo()
        patch.setattr("ara.recovery.distill.Distill.repair", _killed)
        view = recover(config, Run(copied))
    assert view.manifest is not None
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= set(view.manifest.files)
    (row,) = figures(view).levels
    assert row.after == row.before and "adapter/" in row.notes[-1]
    # Card and provenance claim no repair of the weights.
    assert row.adapter is not None and row.adapter != row.before and not row.in_weights
    card = (view.path / "checkpoint" / "README.md").read_text()
    assert "not changed by any repair" in card and f"with it the divergence is {row.adapter:.4f}" in card
    made = json.loads((view.path / "checkpoint" / "config.json").read_text())["quantization_config"]["provenance"]
    assert made["recovery"] == []
    before = _logits(copied / "truncate" / "energy-0.70")
    torch.testing.assert_close(_logits(view.path), before)
    model = PeftModel.from_pretrained(load(view.path / "checkpoint", "cpu", "float32"), str(view.path / "adapter"))
    with torch.inference_mode():
        assert not torch.allclose(model(input_ids=torch.arange(3, 23)[None]).logits, before, atol=1e-3)


def _killed(*args: Any, **figures: Any) -> None:
    raise KeyboardInterrupt


def test_a_training_in_half_precision_resumes(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"level": "distill", "only": True, "dtype": "bfloat16", "steps": 4, "batch": 4, "save_every": 1}
    config = CONFIG.model_copy(update=words)
    whole = figures(recover(config, Run(copied), name="whole"))
    with monkeypatch.context() as patch:
        patch.setattr("ara.recovery.distill.Row", _third)
        with pytest.raises(KeyboardInterrupt):
            recover(config, Run(copied), name="again")
    heard = Recorder()
    again = figures(recover(config, Run(copied, report=heard), name="again"))
    assert any("resuming after step 2 of 4" in text for text in heard.facts)
    assert again.after == whole.after and again.levels[0].tokens == whole.levels[0].tokens


def _third(step: int, *values: Any) -> Any:
    if step == 3:
        raise KeyboardInterrupt
    from ara.recovery.history import Row

    return Row(step, *values)
