"""The plan against what the stages write, and budgets and models that it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from ara.config import AllocateConfig, DecomposeConfig, PlanConfig, TruncateConfig
from ara.errors import AraError, ModelError, UsageError
from ara.models import placement
from ara.models.checkpoint import checkpoint_bytes
from ara.planning.needs import LIBRARIES, STAGES
from ara.planning.plan import Plan, StagePlan, make_plan
from ara.planning.probe import Speed
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.truncate import truncate
from tests.tiny import save_tiny, save_with_tokenizer, tiny_config, tiny_model

NAMES = ["decompose", "train-masks", "allocate", "truncate", "recover", "eval", "export"]


def plan(model: Path | str, root: Path, **settings: Any) -> Plan:
    """Return a plan without a probe, on the CPU in float32."""
    fixed = {"seq_len": 48, "device": "cpu", "dtype": "float32", "probe": False}
    return make_plan(PlanConfig(**{"model": str(model), **fixed, **settings}), root)


def stage(found: Plan, name: str) -> StagePlan:
    """Return one stage of a plan."""
    return next(one for one in found.stages if one.stage == name)


def tensor_bytes(folder: Path) -> int:
    """Return the bytes of all tensors in the files of a folder, without headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


@pytest.mark.parametrize(
    ("family", "layout", "keep"), [("llama", "factors", 0.8), ("gemma", "pivoted", 0.5), ("gpt2", "factors", 0.6)]
)
def test_disk_is_what_the_stages_write(family: str, layout: Any, keep: float, tiny_text: str, tmp_path: Path) -> None:
    model, root = save_tiny(tmp_path / "model", family), tmp_path / "ws"
    settings: dict[str, Any] = {"text": tiny_text, "samples": 4, "seq_len": 48, "device": "cpu", "dtype": "float32"}
    factors = decompose(DecomposeConfig(model=str(model), **settings, keep_moments="yes"), Run(root))
    allocate(AllocateConfig(keep=keep, method="uniform", layout=layout), Run(root))
    written = truncate(TruncateConfig(), Run(root))
    found = plan(model, root, keep=keep, layout=layout)
    assert stage(found, "decompose").disk_bytes == tensor_bytes(factors.path)
    files = checkpoint_bytes(written.path / "checkpoint")
    assert stage(found, "truncate").disk_bytes == pytest.approx(files, rel=0.01)
    assert found.checkpoint_bytes == stage(found, "truncate").disk_bytes


def test_fewer_stored_ranks_take_less_disk_and_memory(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    model, root = tiny_settings["model"], tmp_path / "ws"
    made = decompose(DecomposeConfig(**tiny_settings, max_keep=0.6, keep_moments="yes"), Run(root))
    usual, found = plan(model, tmp_path, keep=0.5), plan(model, tmp_path, keep=0.5, max_keep=0.6)
    assert stage(found, "decompose").disk_bytes == tensor_bytes(made.path) < stage(usual, "decompose").disk_bytes
    for name in ("allocate", "train-masks", "truncate"):
        assert stage(found, name).memory_bytes < stage(usual, name).memory_bytes
    assert stage(found, "train-masks").flops < stage(usual, "train-masks").flops
    assert found.checkpoint_bytes == usual.checkpoint_bytes
    # The level closed needs all ranks.
    assert [one.stage for one in found.stages] == [name for name in NAMES if name != "recover"]
    assert (found.max_keep, usual.max_keep) == (0.6, None)


def test_a_folder_needs_no_weights(tiny_llama: Path, tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path / "empty")
    whole, empty = plan(tiny_llama, tmp_path), plan(tmp_path / "empty", tmp_path)
    assert whole.weights.here == (tiny_llama / "model.safetensors").stat().st_size
    assert empty.weights.here is None and empty.weights.download == 0
    assert whole.weights.mapped and empty.weights.mapped
    assert empty.stages == whole.stages
    assert whole.parameters == sum(math.prod(shape) for shape in _stored(tiny_llama).values())


def _stored(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_weights_of_another_dtype_are_no_pages(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the copies that other tests have made of the same model.
    monkeypatch.setenv("ARA_CACHE_DIR", str(tmp_path / "cache"))
    found = plan(tiny_llama, tmp_path, dtype="bfloat16")
    assert not found.weights.mapped
    assert found.weight_bytes == plan(tiny_llama, tmp_path).weight_bytes // 2
    assert found.converted_bytes == 0
    # A copy is written where they do not fit.
    monkeypatch.setattr("ara.planning.plan.available_bytes", lambda device: 2 * found.weight_bytes - 2)
    small = plan(tiny_llama, tmp_path, dtype="bfloat16")
    assert small.converted_bytes == small.weight_bytes
    assert _lasting(small) == _lasting(found) + small.weight_bytes
    # Half of the memory is left for the stages.
    monkeypatch.setattr("ara.planning.plan.available_bytes", lambda device: 2 * found.weight_bytes)
    assert plan(tiny_llama, tmp_path, dtype="bfloat16").converted_bytes == 0


def _lasting(found: Plan) -> int:
    """Return the bytes of the disk of the least machine, without what a stage removes at its end."""
    return found.least_disk - max(one.scratch_bytes for one in found.stages)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep": 0.001}, "keep 0.001 allows"),
        ({"size": "1KB"}, "--size 1KB allows 1,000"),
        ({"size": "143KB"}, "are left for the factorised layers"),
        ({"size": "1MB", "keep": 0.5}, "--keep 0.5 and --size 1MB"),
        ({"keep": 0.9, "max_keep": 0.6}, "keep 0.9 needs higher ranks than the decomposition stores"),
        ({"size": "1MB", "max_keep": 0.6}, "--size 1MB needs the factors of all ranks"),
        ({"method": "none-such"}, "unknown decomposition"),
        ({"exclude": ("none-such",)}, "matches no linear layer"),
        ({"seq_len": 257}, "--seq-len 257 is more than the 256 positions"),
        ({"device": "cuda:99"}, "device cuda:99"),
        ({"size": "1MB", "embedding_bits": 4, "model": "GEMMA"}, None),
    ],
)
def test_what_cannot_be_done(settings: dict[str, Any], said: str | None, tiny_llama: Path, tmp_path: Path) -> None:
    if said is None:
        save_tiny(tmp_path / "gemma", "gemma")
        settings = {**settings, "model": str(tmp_path / "gemma")}
        assert plan(**settings, root=tmp_path).size == 10**6
        return
    with pytest.raises(UsageError, match=said):
        plan(tiny_llama, tmp_path, **settings)


def test_models_that_are_no_models(tmp_path: Path) -> None:
    for name in ("none/such/folder", "no-such-alias"):
        with pytest.raises(ModelError):
            plan(name, tmp_path)
    tiny_config("llama").save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="only pickled weights"):
        plan(tmp_path / "pickled", tmp_path)
    odd = {"model_type": "llama", "hidden_size": "wide"}
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps(odd))
    with pytest.raises(AraError):
        plan(tmp_path / "odd", tmp_path)


def test_more_text_is_more_work_and_a_smaller_model_less_disk(tiny_llama: Path, tmp_path: Path) -> None:
    usual = plan(tiny_llama, tmp_path)
    assert [one.stage for one in usual.stages] == NAMES == [_command(one.__name__) for one in STAGES]
    more, plain = plan(tiny_llama, tmp_path, samples=512), plan(tiny_llama, tmp_path, method="plain")
    assert stage(more, "decompose").flops > stage(usual, "decompose").flops > stage(plain, "decompose").flops
    # Plain factors need no text, so there are no second moments to keep.
    assert stage(plain, "decompose").disk_bytes < stage(usual, "decompose").disk_bytes
    smaller = plan(tiny_llama, tmp_path, keep=0.5)
    for name in ("truncate", "recover", "export"):
        assert stage(smaller, name).disk_bytes < stage(usual, name).disk_bytes
    assert plan(tiny_llama, tmp_path, keep=1.0).checkpoint_bytes == pytest.approx(usual.weights.here, rel=0.01)


def _command(function: str) -> str:
    return {"evaluate": "eval"}.get(function, function.replace("_", "-"))


def test_the_least_machine_has_room_for_every_required_stage(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = plan(tiny_llama, tmp_path)
    required = [one for one in usual.stages if not one.optional]
    assert usual.least_memory == max(one.least_memory_bytes for one in required) > LIBRARIES
    assert all(one.least_memory_bytes <= one.memory_bytes for one in required)
    assert usual.least_disk >= sum(one.disk_bytes for one in required)
    monkeypatch.setattr("ara.planning.plan.available_bytes", lambda device: LIBRARIES - 1)
    assert {one.place for one in plan(tiny_llama, tmp_path).stages} == {"nowhere"}
    # One byte less than everything: the weights are pages of files, and come and go.
    everything = stage(usual, "decompose").memory_bytes
    monkeypatch.setattr("ara.planning.plan.available_bytes", lambda device: everything - 1)
    assert stage(plan(tiny_llama, tmp_path), "decompose").place == "mapped"


def test_a_repair_of_weights_that_do_not_fit_has_them_in_files(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = plan(tiny_llama, tmp_path)
    much = stage(usual, "recover")
    # Half of the free memory is too little for the compressed weights, and a quarter for outputs of blocks.
    monkeypatch.setattr("ara.planning.plan.available_bytes", lambda device: usual.checkpoint_bytes)
    little = stage(plan(tiny_llama, tmp_path), "recover")
    assert little.scratch_bytes > much.scratch_bytes + 0.9 * usual.checkpoint_bytes
    assert little.disk_bytes == much.disk_bytes and little.memory_bytes < much.memory_bytes
    # One byte less than everything: the weights of both models are pages of files.
    monkeypatch.setattr("ara.planning.plan.available_bytes", lambda device: much.memory_bytes - 1)
    assert stage(plan(tiny_llama, tmp_path), "recover").place == "mapped"


def test_what_is_converted_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_choose_dtype", lambda device: ("float32", "no bf16 arithmetic"))
    model = save_with_tokenizer(tmp_path / "published", tiny_model("llama", 0).bfloat16())
    # Factors and checkpoints in float32, as the run, and in bfloat16, as the model was published.
    same, other = (plan(model, tmp_path, dtype=dtype) for dtype in ("float32", "auto"))
    assert (same.stored_dtype, other.stored_dtype) == ("float32", "bfloat16")
    for name in ("train-masks", "allocate"):
        assert stage(other, name).memory_bytes == stage(same, name).memory_bytes
        assert stage(other, name).least_memory_bytes > stage(same, name).least_memory_bytes
    assert stage(other, "eval").least_memory_bytes > stage(same, "eval").least_memory_bytes


def test_models_that_are_made_in_memory_are_no_pages(tiny_llama: Path, tmp_path: Path) -> None:
    large, small = (plan(tiny_llama, tmp_path, keep=keep, layout="pivoted") for keep in (0.8, 0.4))
    assert large.weights.mapped
    # Low-rank layers of the uniform model.
    fewer = 4 * 0.4 * large.linear_parameters
    found = stage(large, "eval").least_memory_bytes - stage(small, "eval").least_memory_bytes
    assert found == pytest.approx(fewer, rel=0.1)
    # Of factors the first rows of A are pages.
    factors = plan(tiny_llama, tmp_path, keep=0.8)
    assert stage(factors, "eval").least_memory_bytes < stage(large, "eval").least_memory_bytes - 0.6 * fewer
    # The checkpoint in float32, then the graph.
    assert stage(large, "export").least_memory_bytes == LIBRARIES + stage(large, "export").disk_bytes


def test_times_come_from_a_probe(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(one.seconds is None for one in plan(tiny_llama, tmp_path).stages)
    asked: list[tuple[str, int, Path]] = []

    def probe(shape: object, device: str, rows: int, folder: Path) -> Speed:
        asked.append((device, rows, folder))
        return Speed(1e9, 1e9, 1e9, 1e9, 1e9, 1e9, 1e9)

    monkeypatch.setattr("ara.planning.plan.probe", probe)
    found = plan(tiny_llama, tmp_path / "not" / "there", probe=True)
    assert asked == [("cpu", 4 * 48, tmp_path)]
    assert not (tmp_path / "not").exists()
    assert all(one.seconds is not None and one.seconds > 0 for one in found.stages)
