"""Models that also read pictures: their language model is compressed, the rest stays, and the whole loads again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import ara
from ara.artifacts.checkpoint import CARD, CheckpointResults
from ara.artifacts.factors import factor_files, specs_of
from ara.artifacts.ranks import read_allocation
from ara.config import (
    AllocateConfig,
    DecomposeConfig,
    EvalConfig,
    QuantiseConfig,
    RecoverConfig,
    TruncateConfig,
)
from ara.errors import UnsupportedModelError
from ara.models.checkpoint import load, save_checkpoint
from ara.models.cutting import save_cut
from ara.models.low_rank import apply_factors, low_rank_layers
from ara.models.sources import ModelSource, resolve
from ara.models.weights import LinearSpec
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.evaluate import evaluate
from ara.stages.quantise import quantise
from ara.stages.recover import recover
from ara.stages.truncate import truncate
from ara.workspace.view import StageView
from tests.commands import ara as command
from tests.commands import done, refused
from tests.pictures import KINDS, logits_of, save_picture_model
from tests.recorder import Recorder
from tests.tiny import tiny_tokenizer

PLACE: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
_CPU = ("--device", "cpu")
_LANGUAGE = "model.language_model.layers."
_REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Made:
    """A model that reads pictures, and what the stages have made of it."""

    kind: str
    folder: Path
    root: Path
    facts: list[str]
    factors: StageView
    ranks: StageView
    written: StageView

    @property
    def checkpoint(self) -> Path:
        return self.written.path / "checkpoint"

    @property
    def specs(self) -> list[LinearSpec]:
        return specs_of(self.factors)

    @property
    def source(self) -> ModelSource:
        return resolve(str(self.folder))

    def dense(self) -> PreTrainedModel:
        return self.source.load_model(torch.float32)

    def chosen(self) -> dict[str, int]:
        return read_allocation(self.ranks, self.specs).low_rank()

    def in_memory(self, ranks: dict[str, int]) -> PreTrainedModel:
        model = self.dense()
        apply_factors(model, ranks, factor_files(self.factors, self.specs))
        return model


@pytest.fixture(scope="module", params=KINDS)
def made(request: Any, tmp_path_factory: pytest.TempPathFactory, tiny_text: str) -> Made:
    root = tmp_path_factory.mktemp(request.param)
    folder, report = save_picture_model(root / "model", request.param), Recorder()
    run = Run(root / "ws", report=report)
    settings = {"model": str(folder), "text": tiny_text, "samples": 6, "seq_len": 32, **PLACE}
    factors = decompose(DecomposeConfig(**settings), run)
    ranks = allocate(AllocateConfig(keep=0.6, method="energy"), run)
    return Made(
        request.param, folder, run.root, report.facts, factors, ranks, truncate(TruncateConfig(check=True), run)
    )


def test_only_layers_of_the_language_model_are_factorised(made: Made) -> None:
    linears = {spec.name for spec in made.specs}
    assert linears and all(name.startswith(_LANGUAGE) for name in linears)
    (said,) = [fact for fact in made.facts if fact.startswith("kept as they are: ")]
    parts = said.removeprefix("kept as they are: ").partition(" (")[0].split(", ")
    assert parts == (
        ["model.visual"] if made.kind == "qwen3_vl" else ["model.vision_tower", "model.multi_modal_projector"]
    )
    loaded = ara.load(made.checkpoint, "cpu")
    assert type(loaded) is type(made.dense())
    assert low_rank_layers(loaded) == made.chosen()
    figures = CheckpointResults.read(made.written)
    assert figures.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert figures.linear_keep <= 0.6 < figures.model_keep


def test_all_other_tensors_keep_their_names_and_bits(made: Made) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (made.folder, made.checkpoint))
    gone = before.keys() - after.keys()
    # One name stays as the guard against readers that know no factors; it holds nothing.
    (guard,) = [name for name, tensor in after.items() if not tensor.numel()]
    assert len(gone) == len(made.chosen()) - 1
    assert all(name.endswith("_proj.weight") and "language_model" in name for name in {*gone, guard})
    kept = before.keys() & after.keys() - {guard}
    assert len([name for name in kept if "vis" in name]) > 10
    for name in kept:
        assert before[name].numpy().tobytes() == after[name].numpy().tobytes(), name
    assert {name.rpartition(".")[0].rpartition(".")[0] + ".weight" for name in after.keys() - before.keys()} == {
        *gone,
        guard,
    }
    copied = "preprocessor_config.json"
    assert (made.checkpoint / copied).read_bytes() == (made.folder / copied).read_bytes()


def test_the_files_are_those_of_the_loaded_model(made: Made, tmp_path: Path) -> None:
    how: dict[str, Any] = {"ranks": made.chosen(), "provenance": {}}
    stored = made.source.stored_model(torch.float32)
    assert stored.converted() is None
    files = factor_files(made.factors, made.specs)
    save_cut(stored, tiny_tokenizer(), tmp_path / "cut", files=files, layout="factors", **how)
    save_checkpoint(made.in_memory(made.chosen()), tiny_tokenizer(), tmp_path / "whole", **how)
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("cut", "whole"))
    assert one == other


_SCRIPT = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ara":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import torch, transformers
folder, inputs, out = sys.argv[1:]
logits, autos = [], [transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM]
for auto in autos:
    try:
        auto.from_pretrained(folder, trust_remote_code=False)
        sys.exit("loaded without the code")
    except (ValueError, RuntimeError):
        pass
for auto in autos:
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits.append(model(**torch.load(inputs)).logits[0])
assert torch.equal(*logits)
torch.save(logits[0], out)
print(type(model).__name__)
"""


def test_all_ways_of_loading_read_pictures(made: Made, tmp_path: Path) -> None:
    from tests.pictures import picture_inputs

    memory = made.in_memory(made.chosen())
    expected = logits_of(memory)
    assert torch.equal(logits_of(ara.load(made.checkpoint, "cpu")), expected)
    plain = AutoModelForImageTextToText.from_pretrained(made.checkpoint)
    assert type(plain) is type(memory)
    assert torch.equal(logits_of(plain.eval()), expected)
    torch.save(picture_inputs(memory), tmp_path / "inputs")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [made.checkpoint, tmp_path / "inputs", tmp_path / "logits"]
    ended = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.split() == [type(memory).__name__]
    assert torch.equal(torch.load(tmp_path / "logits"), expected)


def test_at_full_rank_text_and_pictures_give_the_logits_of_the_dense_model(made: Made, tmp_path: Path) -> None:
    ranks = {spec.name: spec.full_rank for spec in made.specs}
    files = factor_files(made.factors, made.specs)
    stored = made.source.stored_model(torch.float32)
    save_cut(stored, tiny_tokenizer(), tmp_path, ranks=ranks, files=files, provenance={}, layout="factors")
    dense, whole = made.dense(), load(tmp_path, "cpu")
    assert low_rank_layers(whole) == ranks
    ids = torch.arange(20, 44)[None]
    with torch.no_grad():
        pairs = [[model(input_ids=ids).logits for model in (dense, whole)]]
    pairs += [[logits_of(model, seed) for model in (dense, whole)] for seed in (0, 1)]
    for one, other in pairs:
        torch.testing.assert_close(other, one, rtol=0, atol=2e-4 * float(one.abs().max()))
    # The pictures are seen: another one gives other logits after it.
    assert (pairs[1][0] - pairs[2][0])[5:].abs().max() > 0.1


def test_weights_in_files_give_the_same_bytes(made: Made, tmp_path: Path, tiny_text: str) -> None:
    settings = {"model": str(made.folder), "text": tiny_text, "samples": 6, "seq_len": 32, **PLACE}
    report = Recorder()
    view = decompose(DecomposeConfig(**settings), Run(tmp_path, report=report, offload="disk"))
    assert any("files" in fact for fact in report.facts)
    assert view.manifest.files == made.factors.manifest.files  # type: ignore[union-attr]


def test_plan_counts_all_parts_from_the_config(made: Made, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((made.folder / "config.json").read_bytes())
    words = ("plan", tmp_path, "--no-probe", "--seq-len", 32, "--device", "cpu", "--dtype", "float32")
    plan = json.loads(done(*words, "--remove", 0.4, "--json").stdout)
    model = made.dense()
    assert plan["architecture"] == type(model).__name__
    assert plan["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert plan["linear_parameters"] == sum(spec.dense_cost for spec in made.specs)
    for path, count in plan["kept_parts"].items():
        assert count == sum(parameter.numel() for parameter in model.get_submodule(path).parameters())
    assert sum(plan["kept_parts"].values()) > 0
    assert f"{next(iter(plan['kept_parts']))}, kept as it is" in done(*words).stdout


@pytest.mark.parametrize("made", ["gemma3"], indirect=True)
def test_later_stages_measure_repair_and_round_it(made: Made, tiny_text: str) -> None:
    run = Run(made.root)
    evaluation = evaluate(EvalConfig(tasks=(tiny_text,), seq_len=32, max_windows=4, **PLACE), run)
    (task,) = evaluation.manifest.results["tasks"].values()  # type: ignore[union-attr]
    assert {"dense", "uniform"} < set(task["models"])
    repaired = recover(RecoverConfig(level="closed", samples=8, seq_len=32, held_out=2, **PLACE), run)
    rounded = quantise(QuantiseConfig(bits=8, samples=4, held_out=2, **PLACE), run, checkpoint=repaired.key)
    towers = [load_file(view.path / "checkpoint" / "model.safetensors") for view in (made.written, repaired, rounded)]
    for name, tensor in towers[0].items():
        if "vision_tower" in name or "projector" in name:
            assert all(torch.equal(tensor, other[name]) for other in towers[1:]), name
    for view in (repaired, rounded):
        loaded = ara.load(view.path / "checkpoint", "cpu")
        assert (view.path / "checkpoint" / "preprocessor_config.json").is_file()
        assert not torch.equal(logits_of(loaded), logits_of(loaded, 1))
    words = ("generate", "a story", "--source", made.checkpoint, "--max-new-tokens", 6, "--no-chat", *_CPU)
    answer = json.loads(done(*words, "--json").stdout)["answer"]
    prompt = tiny_tokenizer()("a story", return_tensors="pt")
    tokens = ara.load(made.checkpoint, "cpu").generate(**prompt, max_new_tokens=6, do_sample=False)
    assert answer == tiny_tokenizer().decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    card = (made.written.path / CARD).read_text(encoding="utf-8")
    assert "AutoModelForImageTextToText" in card and "AutoProcessor" in card
    export = command("export", "--onnx", "-q", "-w", made.root, "--from", made.written.key)
    refused(export, 1, "a gemma3 model reads more than text")


def test_a_causal_class_of_the_same_type_does_not_load_a_part_of_it(tmp_path: Path, tiny_text: str) -> None:
    """transformers has a class for the language model of Qwen3.5 alone, with the same model type."""
    folder, run = save_picture_model(tmp_path / "model", "qwen3_5"), Run(tmp_path / "ws")
    settings = {"model": str(folder), "text": tiny_text, "samples": 2, "seq_len": 24, **PLACE}
    decompose(DecomposeConfig(method="plain", **settings), run)
    allocate(AllocateConfig(keep=0.5, method="energy"), run)
    checkpoint = truncate(TruncateConfig(), run).path / "checkpoint"
    assert set(json.loads((checkpoint / "config.json").read_text())["auto_map"]) == {
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
    }
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Gemma3Model", "is no Gemma3ForConditionalGeneration, the class of its model_type that writes text"),
        ("Gemma3ForCausalLM", "is no Gemma3ForConditionalGeneration"),
    ],
)
def test_another_class_is_refused_and_leaves_nothing(name: str, said: str, tmp_path: Path) -> None:
    folder = save_picture_model(tmp_path / "model", "gemma3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    with pytest.raises(UnsupportedModelError, match=said):
        decompose(DecomposeConfig(model=str(folder), method="plain", **PLACE), Run(tmp_path / "ws"))
    assert not (tmp_path / "ws").exists()
