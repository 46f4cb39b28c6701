"""The valid files that the fuzzer spoils: one tiny model in several formats, and one workspace with every result.

::

    in/model/        a tiny llama, as `save_pretrained` writes it
    in/sharded/      the same in several safetensors files with an index
    in/tiny.gguf     the same as GGUF
    in/texts/        story.jsonl, story.txt and what else is read as text
    in/checkpoint/   the compressed checkpoint, and
    in/export/       its export, outside of any workspace
    ws/              decompose → train-masks → allocate → truncate → eval, bench, compare, export, report
    half/            a workspace whose decomposition was interrupted
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

STORY = "../in/texts/story.jsonl"
# Named by options in many targets.
FACTORS, MASKS, RANKS = "two-sided", "masks", "energy"
DECOMPOSE = ("--samples", "4", "--seq-len", "16", "--device", "cpu", "--dtype", "float32", "--batch-size", "4")
PLACE = ("--device", "cpu", "--dtype", "float32")
EVAL = (
    "--tasks",
    f"file:{STORY}",
    "--seq-len",
    "24",
    "--max-windows",
    "2",
    "--continuations",
    "1",
    "--max-new-tokens",
    "2",
)
TRAIN = ("--keep", "0.7", "--steps", "2", "--batch", "2", "--samples", "4", "--held-out", "2", "--name", MASKS)

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


def make_seeds(root: Path, ara: Any) -> None:
    """Write everything below ``root``, which is empty and becomes the parent of the current folder.

    Args:
        root: an empty folder that holds the current folder.
        ara: runs one command and raises unless it succeeds.
    """
    inputs = root / "in"
    model = _model()
    _save(model, inputs / "model")
    _save(model, inputs / "sharded", max_shard_size="20KB")
    _write_gguf(model, inputs / "tiny.gguf")
    _texts(inputs / "texts")
    ws = ("-w", "../ws", "-q")
    ara("decompose", "../in/model", "--text", f"file:{STORY}", *DECOMPOSE, *ws)
    ara("train-masks", *TRAIN, *PLACE, *ws)
    ara("allocate", "--keep", "0.7", "-m", "energy", "--name", RANKS, *ws)
    ara("truncate", "--name", RANKS, *ws)
    ara("eval", *EVAL, *PLACE, "--name", RANKS, *ws)
    ara("bench", "--prefill", "4", "--decode", "4", "--batch", "1", "--rounds", "6", "--name", RANKS, *PLACE, *ws)
    compared = ("--methods", "uniform,energy", "--tasks", f"file:{STORY}", "--max-windows", "1", "--eval-seq-len", "24")
    ara("compare", "--keep", "0.7", *compared, "--samples", "4", "--held-out", "2", *PLACE, "--name", RANKS, *ws)
    ara("export", "--name", RANKS, *ws)
    ara("report", "--name", RANKS, *ws)
    shutil.copytree(root / "ws" / "truncate" / RANKS / "checkpoint", inputs / "checkpoint")
    shutil.copytree(root / "ws" / "export" / RANKS, inputs / "export")
    _interrupted(root / "ws", root / "half")


def _model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.tiny import VOCABULARY

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _save(model: Any, folder: Path, **how: Any) -> None:
    from tests.tiny import tiny_tokenizer

    model.save_pretrained(folder, **how)
    tiny_tokenizer().save_pretrained(folder)


def _write_gguf(model: Any, path: Path) -> None:
    import gguf

    from tests.tiny import tiny_tokenizer

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
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
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{a}": f"model.layers.{layer}.{b}" for a, b in _LAYER.items()}
    for name, source in names.items():
        writer.add_tensor(f"{name}.weight", state[f"{source}.weight"].contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _texts(folder: Path) -> None:
    """Write the same story in every format that a text may have."""
    import pyarrow
    import pyarrow.parquet

    from tests.tiny import tiny_texts

    folder.mkdir(parents=True)
    texts = tiny_texts(24)
    lines = "".join(json.dumps({"text": text, "n": index}) + "\n" for index, text in enumerate(texts))
    (folder / "story.jsonl").write_text(lines, encoding="utf-8")
    (folder / "story.ndjson").write_text(lines, encoding="utf-8")
    (folder / "story.json").write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
    (folder / "story.txt").write_text("\n".join(texts), encoding="utf-8")
    (folder / "story.md").write_text("\n".join(texts), encoding="utf-8")
    (folder / "story.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "story.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode(), mtime=0))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": list(range(24))}), folder / "story.parquet")
    with (folder / "story.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "n"), *((text, index) for index, text in enumerate(texts))])
    with (folder / "story.tsv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([("text", "n"), *((text, 1) for text in texts)])


def _interrupted(finished: Path, root: Path) -> None:
    """Make a workspace as a killed decomposition leaves it."""
    from ara.workspace.manifest import Manifest, digest, essence
    from ara.workspace.writer import JOURNAL

    done = finished / "decompose" / FACTORS
    left = root / "decompose" / f".{FACTORS}.partial"
    left.mkdir(parents=True)
    shutil.copy(finished / "workspace.json", root)
    for path in done.glob("*.safetensors"):
        shutil.copy(path, left)
    made = Manifest.model_validate_json((done / "manifest.json").read_text(encoding="utf-8"))
    whole = made.model_dump(mode="json")
    journal = {key: whole[key] for key in ("seconds", "files", "tensors", "results")}
    journal["fingerprint"] = digest(essence("decompose", made.config, made.model, made.parents))
    (left / JOURNAL).write_text(json.dumps({**journal, "digest": digest(journal)}), encoding="utf-8")
