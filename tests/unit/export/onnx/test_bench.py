"""What exported graphs compute and read, counted from files, against the same models in torch; caches that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ara.evaluation.cost import Case, count_model
from ara.layouts.grid import Grid
from ara.models.checkpoint import load
from ara.stages.common import Run
from export.config import ExportConfig
from export.onnx.bench_runner import OnnxRunner, count_checkpoint, parameters_of
from export.onnx.export_report import Fallback
from export.onnx.quantize import BLOCK
from export.onnx.stored_weights import Checkpoint
from export.stage import export_folder


def exported(source: Path, output: Path, **settings: Any) -> Any:
    config = ExportConfig(execution_provider="cpu", parity=False, **settings)
    return export_folder(config, Run(output), source, output)


@pytest.mark.parametrize("layout", [None, "factors", "pivoted"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "phi3", "mixtral", "qwen2_moe"])
def test_files_are_counted_as_the_model_is(
    checkpoint: Callable[..., Any], tmp_path: Path, family: str, layout: str | None
) -> None:
    folder = checkpoint(family, layout).folder
    source, model = Checkpoint(folder), load(folder, "cpu", "float32")
    about = exported(folder, tmp_path / "out", last_logits=True)
    assert count_checkpoint(source, about) == count_model(model, last_logits=True)
    assert parameters_of(source) == sum(parameter.numel() for parameter in model.parameters())
    for precision, weight, cache in (("fp16", 2, 2), ("int8", 1 + 4 / BLOCK, 4)):
        narrower = about.model_copy(update={"precision": precision, "last_logits": False})
        expected = replace(count_model(model, last_logits=False), weight_bytes=weight, cache_bytes=cache)
        assert count_checkpoint(source, narrower) == expected
    # 16 bits on the disk, float32 in memory.
    fallback = Fallback(matrices={"lm_head": 0.1}, candidates=3, weights=expected.head, extra_bytes=1, kl=0.1)
    mixed = count_checkpoint(source, narrower.model_copy(update={"fallback": fallback}))
    others = expected.linear + expected.experts
    total = (1 + 4 / BLOCK) * others + 4 * expected.head
    assert mixed.weight_bytes == pytest.approx(total / (others + expected.head))


@pytest.mark.parametrize(
    ("grid", "precision", "provider", "weight"),
    [
        (Grid(8, 32, True), "fp32", "cpu", 4),
        (Grid(8, 32, True), "int8", "cpu", 1 + 5 / 32),
        (Grid(8, 16, False), "fp16", "cuda", 1 + 2 / 16),
        (Grid(4, 32, True), "fp32", "cpu", 0.5 + 4.5 / 32),
        (Grid(4, 64, False), "int8", "cpu", 0.5 + 4 / 64),
    ],
    ids=str,
)
def test_few_bits_are_counted_in_the_form_that_they_are_read_in(
    checkpoint: Callable[..., Any], tmp_path: Path, grid: Grid, precision: str, provider: str, weight: float
) -> None:
    folder = checkpoint("llama", "factors", grid=grid, embedding=grid, tie_word_embeddings=True).folder
    source, about = Checkpoint(folder), exported(folder, tmp_path / "out", precision="fp32")
    about = about.model_copy(update={"precision": precision, "execution_provider": provider})
    assert count_checkpoint(source, about).weight_bytes == pytest.approx(weight)
    fallback = Fallback(matrices={"lm_head": 0.1}, candidates=3, weights=1, extra_bytes=0, kl=0.1)
    mixed = count_checkpoint(source, about.model_copy(update={"fallback": fallback}))
    expands = grid.bits == 8 and precision == "int8"
    assert (mixed.weight_bytes > weight + 0.01) is expands


@pytest.mark.parametrize("case", [Case(2, 0, 7), Case(3, 11, 1)])
def test_a_pass_finds_its_caches_as_the_one_before_did(
    checkpoint: Callable[..., Any], tmp_path: Path, case: Case
) -> None:
    folder = checkpoint("llama").folder
    about, source = exported(folder, tmp_path / "out"), Checkpoint(folder)
    runner = OnnxRunner(tmp_path / "out", parameters_of(source), count_checkpoint(source, about), threads=1)
    prepared = runner.prepare(case)
    logits: list[Any] = []
    for _ in range(3):
        logits.append(np.copy(prepared.run()))  # type: ignore[call-overload]
        prepared.rewind()
    assert logits[0].shape == (case.batch, case.new, 260)
    assert np.isfinite(logits[0]).all()
    assert all(np.array_equal(found, logits[0]) for found in logits)
    assert runner.weight_bytes == (tmp_path / "out" / "model.onnx.data").stat().st_size
