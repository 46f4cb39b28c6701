"""The ONNX runner: greedy text with caches bound once, providers that are what was asked for, bad folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from ara.errors import ModelError, UnavailableError, UsageError
from ara.layouts.grid import Grid
from ara.progress import SILENT
from export.config import ExportConfig
from export.onnx import runner
from export.onnx.runner import OnnxDecoder
from export.onnx.settings import resolve
from export.onnx.stored_weights import Checkpoint
from export.onnx.torch_like import TorchLike
from export.onnx.writing import write_onnx
from tests.decoders import BASIC, DECODERS


@pytest.fixture(scope="module")
def exported(checkpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    made = checkpoint("llama", "pivoted")
    folder = tmp_path_factory.mktemp("onnx")
    write_onnx(Checkpoint(made.folder), folder, resolve(ExportConfig(execution_provider="cpu")), "0" * 64, SILENT)
    return folder, made.model


def test_greedy_text_is_that_of_torch(exported: tuple[Path, Any]) -> None:
    folder, model = exported
    prompt = torch.arange(4, 30)
    expected = model.generate(prompt[None], max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    decoder = OnnxDecoder(folder, threads=1)
    found = list(decoder.generate(prompt.numpy(), 40, stop=set()))
    assert found == expected[0, 26:].tolist() and len(set(found)) > 3
    # It ends before a token that stops it, and begins anew each time.
    stop = found[5]
    assert list(decoder.generate(prompt.numpy(), 40, stop={stop})) == found[: found.index(stop)]


def test_graphs_that_hand_out_new_caches_generate_the_same(exported: tuple[Path, Any], tmp_path: Path) -> None:
    """As another exporter's graphs do; caches are not bound then."""
    folder = Path(shutil.copytree(exported[0], tmp_path / "out"))
    document = json.loads((folder / "ara_export.json").read_text())
    assert document["decoder"]["shared_caches"] is True
    document["decoder"]["shared_caches"] = False
    (folder / "ara_export.json").write_text(json.dumps(document))
    decoder, prompt = OnnxDecoder(folder), np.arange(4, 30)
    decoder.bind = None  # type: ignore[assignment,method-assign]
    assert list(decoder.generate(prompt, 20, set())) == list(OnnxDecoder(exported[0]).generate(prompt, 20, set()))


def test_more_tokens_than_the_context_are_refused(exported: tuple[Path, Any]) -> None:
    decoder = OnnxDecoder(exported[0])
    with pytest.raises(
        UsageError, match="26 tokens of prompt and 175 new ones are more than the 200 positions"
    ) as caught:
        next(decoder.generate(np.arange(4, 30), 175))
    assert caught.value.hint == "use --max-new-tokens 174"


def test_it_can_stand_for_a_model_of_transformers(exported: tuple[Path, Any]) -> None:
    folder, model = exported
    ids = torch.arange(4, 60).view(2, 28)
    with torch.inference_mode():
        expected = model(ids).logits
    found = TorchLike(OnnxDecoder(folder), model.config).eval()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_rows_that_are_filled_up_on_the_left_are_continued(exported: tuple[Path, Any]) -> None:
    """As lm-eval asks for text; the graph itself knows no filling on the left."""
    folder, model = exported
    like = TorchLike(OnnxDecoder(folder), model.config)
    rows = [torch.arange(4, 30), torch.arange(40, 50)]
    single = [like.generate(row[None], max_new_tokens=8)[0, len(row) :] for row in rows]
    ids = torch.stack([rows[0], torch.cat([torch.zeros(16, dtype=torch.int64), rows[1]])])
    mask = torch.ones_like(ids)
    mask[1, :16] = 0
    both = like.generate(ids, attention_mask=mask, max_length=34, pad_token_id=3)
    for row, expected in zip(both[:, 26:], single, strict=True):
        assert row[: len(expected)].tolist() == expected.tolist() and set(row[len(expected) :].tolist()) <= {3}
    with pytest.raises(UsageError, match="continues greedily only"):
        like.generate(ids, max_new_tokens=1, do_sample=True)


def test_a_provider_that_is_not_there_is_an_error(exported: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself would take the CPU and say nothing."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UnavailableError, match="CUDAExecutionProvider"):
        OnnxDecoder(exported[0], "cuda")
    monkeypatch.setattr(runner.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UnavailableError, match="this ONNX Runtime has no CUDAExecutionProvider"):
        OnnxDecoder(exported[0], "cuda")


def test_folders_that_are_no_export(exported: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not an export \(ara_export\.json is missing\)"):
        OnnxDecoder(tmp_path)
    (tmp_path / "ara_export.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        OnnxDecoder(tmp_path)
    (tmp_path / "ara_export.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is not what ara export writes \(source: Field required\)"):
        OnnxDecoder(tmp_path)
    document = json.loads((exported[0] / "ara_export.json").read_text())
    (tmp_path / "ara_export.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=r"model\.onnx is missing; ara_export\.json says"):
        OnnxDecoder(tmp_path)
    for name in document["files"]:
        shutil.copyfile(exported[0] / name, tmp_path / name)
    assert list(OnnxDecoder(tmp_path).generate(np.arange(4, 30), 3))
    with (tmp_path / "model.onnx.data").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match=r"model\.onnx\.data has 1,000 bytes; ara_export\.json says [\d,]+") as caught:
        OnnxDecoder(tmp_path)
    assert caught.value.hint is not None and "copy it again" in caught.value.hint
    (tmp_path / "model.onnx").write_bytes(b"x" * document["files"]["model.onnx"]["bytes"])
    (tmp_path / "model.onnx.data").unlink()
    del document["files"]["model.onnx.data"]
    (tmp_path / "ara_export.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=r"model\.onnx cannot be loaded"):
        OnnxDecoder(tmp_path)
    document["files"]["../../secret"] = document["files"]["model.onnx"]
    (tmp_path / "ara_export.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match=r"names the file '\.\./\.\./secret'"):
        OnnxDecoder(tmp_path)


def test_graphs_of_others_that_cannot_be_run(exported: tuple[Path, Any], tmp_path: Path) -> None:
    """Sizes without a number, and nodes that fail."""

    def changed(change: Callable[[ir.Model], Any]) -> Path:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        folder = Path(shutil.copytree(exported[0], tmp_path / "out"))
        model = ir.load(folder / "model.onnx")
        change(model)
        ir.save(model, folder / "changed.onnx", external_data="changed.data")
        (folder / "changed.onnx").rename(folder / "model.onnx")
        document = json.loads((folder / "ara_export.json").read_text())
        document["files"]["model.onnx"]["bytes"] = (folder / "model.onnx").stat().st_size
        (folder / "ara_export.json").write_text(json.dumps(document))
        return folder

    def without_sizes(model: ir.Model) -> None:
        cache = next(value for value in model.graph.inputs if value.name == "past_key_values.1.key")
        cache.shape = ir.Shape(["b", "heads", "past", 16])

    def failing(model: ir.Model) -> None:
        table = next(value for name, value in model.graph.initializers.items() if "cos" in name)
        assert table.const_value is not None
        table.const_value = ir.tensor(table.const_value.numpy()[:3].copy(), name=table.name)
        table.shape = ir.Shape(table.const_value.shape)

    with pytest.raises(ModelError, match=r"does not say how large past_key_values\.1\.key is: heads, 16"):
        OnnxDecoder(changed(without_sizes))
    decoder = OnnxDecoder(changed(failing))
    with pytest.raises(ModelError, match=r"model\.onnx cannot be run"):
        next(decoder.generate(np.arange(4, 30), 3))
    with pytest.raises(ModelError, match=r"model\.onnx cannot be run"):
        decoder.forward(np.arange(4, 30)[None])


@pytest.mark.parametrize(
    ("family", "precision", "grid"),
    [(family, precision, None) for family in BASIC for precision in ("fp32", "int8")]
    + [(family, "fp32", Grid(4, 32, True)) for family in BASIC]
    + [(family, "fp32", None) for family in DECODERS]
    + [("llama", "fp32", Grid(8, 16, False))],
    ids=str,
)
def test_genai_answers_as_the_graph_does(
    family: str, precision: str, grid: Grid | None, checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """And in fp32 as torch does: other software reads what we write, for every family and for matrices of few bits."""
    og = pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai (make setup installs it)")
    made = checkpoint(family) if grid is None else checkpoint(family, grid=grid)
    config = resolve(ExportConfig(execution_provider="cpu", precision=precision, parity=False))
    write_onnx(Checkpoint(made.folder), tmp_path, config, "0" * 64, SILENT)
    prompt = list(range(4, 30))
    loaded = og.Model(str(tmp_path))
    parameters = og.GeneratorParams(loaded)
    parameters.set_search_options(max_length=len(prompt) + 20, do_sample=False)
    generator = og.Generator(loaded, parameters)
    generator.append_tokens(prompt)
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    expected = list(OnnxDecoder(tmp_path).generate(np.array(prompt), 20))
    # What ends the text is in GenAI's answer, not in ours.
    assert found[: len(expected)] == expected and len(found) - len(expected) in (0, 1)
    if precision == "fp32":
        torchs = made.model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert expected == torchs[: len(expected)] and expected
