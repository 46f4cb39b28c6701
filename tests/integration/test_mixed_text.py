"""A mixture of plain text and conversations through the stages, on a tiny model with a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ara.artifacts.factors import FactorsResults, FactorsSettings
from ara.config import AllocateConfig, DecomposeConfig
from ara.errors import DataError
from ara.masks.context import TuningContext
from ara.reporting.results import read_decomposition
from ara.stages import tuning
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.decompose import decompose
from tests.damage import contents
from tests.recorder import Recorder
from tests.tiny import save_tiny, tiny_texts, tiny_tokenizer

SAMPLES = 20
WARNING = "the model has a chat template and the calibration text no conversation"


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as ``ARA_DATA_DIR`` names it, with a little C4 and a few conversations."""
    folder = tmp_path_factory.mktemp("data")
    texts = tiny_texts(400)
    (folder / "c4_sample").mkdir()
    (folder / "instructions").mkdir()
    lines = [json.dumps({"text": text}) for text in texts[:300]]
    (folder / "c4_sample/c4_rp1.jsonl").write_text("\n".join(lines))
    spoken = [
        {"messages": [{"role": "user", "content": one.upper()}, {"role": "assistant", "content": other.upper()}]}
        for one, other in zip(texts[300:350], texts[350:], strict=True)
    ]
    (folder / "instructions/calibration.jsonl").write_text("\n".join(map(json.dumps, spoken)))
    return folder


@pytest.fixture
def settings(data_folder: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("ARA_DATA_DIR", str(data_folder))
    return {"model": str(tiny_llama), "samples": SAMPLES, "seq_len": 48, "device": "cpu", "dtype": "float32"}


def test_the_default_of_a_chat_model_goes_through_the_stages(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Recorder()
    view = decompose(DecomposeConfig(**settings), Run(tmp_path / "ws", report=heard))
    found, stored = FactorsResults.read(view), FactorsSettings.read(view)
    assert stored.text == "c4:0.8,chat:0.2"
    assert [(part.name, part.share) for part in found.parts] == [("c4", 0.8), ("chat", 0.2)]
    assert found.windows == (SAMPLES, 48) and sum(part.tokens for part in found.parts) == SAMPLES * 48
    assert abs(found.parts[1].tokens / 48 - 0.2 * SAMPLES) <= 1
    assert found.text is not None and found.text.startswith("80 % file ") and "; 20 % file " in found.text
    assert not any(WARNING in warning for warning in heard.warnings)
    assert view.manifest is not None
    shown = read_decomposition(view.manifest)
    assert shown.text == "c4:0.8,chat:0.2"
    assert shown.origin == "80 % file c4_rp1.jsonl; 20 % file calibration.jsonl"

    contexts: list[TuningContext] = []

    def keep(*args: Any, **named: Any) -> TuningContext:
        contexts.append(TuningContext(*args, **named))
        return contexts[-1]

    monkeypatch.setattr(tuning, "TuningContext", keep)
    allocate(AllocateConfig(keep=0.7, method="sensitivity", samples=8, held_out=4, device="cpu"), Run(tmp_path / "ws"))
    (context,) = contexts
    rows = {tuple(row) for row in torch.cat([context.train, context.held_out]).tolist()}
    assert (len(context.train), len(context.held_out), len(rows)) == (8, 4, 12)
    spoken = [_is_spoken(row) for row in rows]
    assert 1 <= sum(spoken) <= 4


def _is_spoken(ids: tuple[int, ...]) -> bool:
    """Tell conversations, which are in capitals, from prose."""
    text = str(tiny_tokenizer().decode(list(ids)))
    return sum(map(str.isupper, text)) > len(text) / 3


def test_equal_seeds_give_equal_bytes(settings: dict[str, Any], tmp_path: Path) -> None:
    folders = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        view = decompose(DecomposeConfig(**settings, text="chat,c4", seed=seed), Run(tmp_path / name))
        folders.append({file: data for file, data in contents(view.path).items() if file.endswith(".safetensors")})
    assert folders[0] == folders[1] != folders[2]


def test_a_finished_mixture_is_found_again(settings: dict[str, Any], tmp_path: Path) -> None:
    first = decompose(DecomposeConfig(**settings), Run(tmp_path))
    for text in (None, "c4:0.8,chat:0.2", "c4:0.4,chat:0.1"):
        heard = Recorder()
        again = decompose(DecomposeConfig(**settings, text=text), Run(tmp_path, report=heard))
        assert again.manifest == first.manifest and any("is there already" in fact for fact in heard.facts)


@pytest.mark.parametrize(("text", "warned"), [("c4", True), ("chat", False), ("c4,chat", False)])
def test_a_chat_model_without_conversations_is_said(
    text: str, warned: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    heard = Recorder()
    decompose(DecomposeConfig(**settings, text=text, method="whitened"), Run(tmp_path, report=heard))
    assert sum(WARNING in warning for warning in heard.warnings) == warned


def test_a_base_model_reads_c4_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "llama")
    (folder / "chat_template.jinja").unlink()
    heard = Recorder()
    view = decompose(DecomposeConfig(**{**settings, "model": str(folder)}), Run(tmp_path / "ws", report=heard))
    assert FactorsSettings.read(view).text == "c4" and not any(WARNING in warning for warning in heard.warnings)
    with pytest.raises(DataError, match="the model has no chat template, which the text 'chat' needs"):
        decompose(DecomposeConfig(**{**settings, "model": str(folder)}, text="c4,chat"), Run(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_data_folder_without_instructions_is_an_error(
    settings: dict[str, Any], tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data/c4_sample").mkdir(parents=True)
    (tmp_path / "data/c4_sample/c4_rp1.jsonl").write_bytes((data_folder / "c4_sample/c4_rp1.jsonl").read_bytes())
    monkeypatch.setenv("ARA_DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(
        DataError, match=r"text 'chat' \(calibration\): no file .*instructions/calibration.jsonl"
    ) as error:
        decompose(DecomposeConfig(**settings), Run(tmp_path / "ws"))
    assert "--text c4" in (error.value.hint or "")
    assert not (tmp_path / "ws").exists()
