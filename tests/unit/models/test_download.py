"""What a model on the hub will download, and what it does download; the hub is a server in this process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from ara.config import DecomposeConfig
from ara.decomposition.two_sided import TwoSided
from ara.errors import DiskFullError, ModelError
from ara.models.download import missing_weights
from ara.models.placement import choose_placement
from ara.models.sources import resolve
from ara.planning.decomposition import plan_decomposition
from ara.planning.sizes import Pages
from ara.stages.common import Run
from ara.stages.decompose import decompose
from tests.hub import COMMIT, Hub, hub
from tests.recorder import Recorder
from tests.tiny import tiny_model, tiny_tokenizer

NAME = "owner/name"
OTHERS = ("pytorch_model.bin", "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "model.onnx")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Return a repository with a tiny llama in several files, and with its weights in other formats."""
    folder = tmp_path / "repository"
    tiny_model("llama").save_pretrained(folder, max_shard_size="80KB")
    tiny_tokenizer().save_pretrained(folder)
    for name in OTHERS:
        (folder / name).write_bytes(b"not to be fetched")
    with hub(NAME, folder, monkeypatch, tmp_path / "cache") as found:
        yield found


def shards(served: Hub) -> list[str]:
    """Return the names of the weight files."""
    found = sorted(path.name for path in served.folder.glob("model-*.safetensors"))
    assert len(found) >= 3
    return found


def test_only_safetensors_are_fetched_and_their_bytes_are_known_before(served: Hub) -> None:
    source = resolve(NAME)
    download = source.to_download()
    assert download is not None and sorted(download.files) == shards(served)
    assert download.bytes == sum((served.folder / name).stat().st_size for name in shards(served))
    assert not set(served.names) & {*shards(served), *OTHERS}
    model = source.load_model(torch.float32)
    assert set(shards(served)) < set(served.names) and not set(served.names) & set(OTHERS)
    expected = tiny_model("llama")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected.parameters(), strict=True))
    assert source.to_download() is None


def test_a_complete_cache_asks_no_hub(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(NAME).load_model(torch.float32)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert missing_weights(NAME, COMMIT) is None


def test_files_that_arrived_before_an_interruption_are_kept(served: Hub) -> None:
    *arrived, last = shards(served)
    served.down = {last}
    with pytest.raises(ModelError, match=NAME):
        resolve(NAME).load_model(torch.float32)
    assert set(arrived) <= set(served.names)
    served.down, served.fetched = set(), []
    download = resolve(NAME).to_download()
    assert download is not None and list(download.files) == [last]
    resolve(NAME).load_model(torch.float32)
    assert {name for name in served.names if name.endswith(".safetensors")} == {last}


def test_a_broken_connection_continues_where_it_broke(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    first = shards(served)[0]
    served.cut_after = {first: 5000}
    model = resolve(NAME).load_model(torch.float32)
    begins = [start for name, start in served.fetched if name == first]
    assert len(begins) == 2 and begins[0] == 0 and 0 < begins[1] <= 5000
    expected = tiny_model("llama")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_missing_shard_is_named_before_any_is_fetched(served: Hub) -> None:
    names = shards(served)
    (served.folder / names[1]).unlink()
    with pytest.raises(ModelError, match=rf"^{NAME} lacks 1 of {len(names)} weight files: {names[1]}$") as caught:
        resolve(NAME).load_model(torch.float32)
    assert "--revision" in str(caught.value.hint)
    assert not set(served.names) & set(names)


def test_a_repository_without_safetensors_is_refused_before_its_weights(served: Hub) -> None:
    for path in (*served.folder.glob("*.safetensors"), served.folder / "model.safetensors.index.json"):
        path.unlink()
    with pytest.raises(ModelError, match=f"{NAME} has no safetensors weights") as caught:
        resolve(NAME).load_model(torch.float32)
    assert "safetensors only" in str(caught.value.hint)
    assert not set(served.names) & set(OTHERS)


def test_too_little_disk_is_told_with_three_sizes_before_the_download(
    served: Hub, tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**tiny_settings, "model": NAME}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300_000))
    with pytest.raises(
        DiskFullError,
        match=r"has 0 MiB free, needed are 1 MiB: model \d MiB, factors \d MiB, a later checkpoint .*MiB$",
    ) as caught:
        decompose(DecomposeConfig(**settings), Run(tmp_path / "ws"))
    assert "with --max-keep 1 the factors take" in str(caught.value.hint)
    assert not set(served.names) & {*shards(served), *OTHERS}


@pytest.mark.parametrize(("moments", "missing", "fits"), [("yes", 1, False), ("yes", 0, True), ("no", 1, True)])
def test_a_copy_in_another_dtype_and_kept_moments_are_counted(
    served: Hub,
    tiny_settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moments: str,
    missing: int,
    fits: bool,
) -> None:
    monkeypatch.setenv("ARA_CACHE_DIR", str(tmp_path / "copies"))
    config = DecomposeConfig(**{**tiny_settings, "model": NAME, "dtype": "bfloat16", "keep_moments": moments})
    source = resolve(NAME, offload="disk")
    download = source.to_download()
    assert download is not None
    typed = config.model_copy(update={"factors_dtype": "bfloat16"})
    plan = plan_decomposition(typed, TwoSided(), source, choose_placement("cpu", "bfloat16"))
    parameters = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    assert plan.pages.copied == 2 * parameters and plan.moment_bytes > 0
    free = download.bytes + plan.pages.copied + plan.factor_bytes + plan.moment_bytes - missing
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    recorder = Recorder()
    run = Run(tmp_path / "ws", report=recorder, offload="disk")
    with nullcontext() if fits else pytest.raises(DiskFullError, match="needed are"):
        decompose(config, run)
    said = next(fact for fact in recorder.facts if fact.startswith("needed on the disk: model"))
    assert "a copy of it in bfloat16 0 MiB" in said and ("second moments" in said) == (moments == "yes")
    assert bool(set(served.names) & set(shards(served))) == fits
    # The copy is there now.
    again = plan_decomposition(typed, TwoSided(), source, choose_placement("cpu", "bfloat16"))
    assert again.pages == Pages(True, 0 if fits else 2 * parameters)


def test_the_sizes_are_told_and_the_model_is_downloaded(
    served: Hub, tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    recorder = Recorder()
    view = decompose(
        DecomposeConfig(**{**tiny_settings, "model": NAME}, max_keep=1), Run(tmp_path / "ws", report=recorder)
    )
    assert view.state == "done"
    assert any(fact.startswith("needed on the disk: model") for fact in recorder.facts)
    assert any(fact.startswith(f"downloading {len(shards(served))} files") for fact in recorder.facts)
    assert not set(served.names) & set(OTHERS)
