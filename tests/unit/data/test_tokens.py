"""Token windows and their cache."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ara.data import tokens
from ara.data.texts import SEPARATOR, Documents
from ara.data.token_cache import cache_key, cached_calibration_windows, tokenizer_fingerprint
from ara.data.tokens import TokenWindows, calibration_windows, evaluation_windows
from ara.errors import DataError, UsageError
from tests.recorder import Recorder
from tests.tiny import tiny_texts, tiny_tokenizer

BOS, EOS = 1, 2


def _documents(texts: list[str]) -> Documents:
    digest = hashlib.sha256(repr(texts).encode()).hexdigest()
    return Documents("test", "calibration", tuple(texts), SEPARATOR, "a test", digest)


DOCUMENTS = _documents(tiny_texts())
SIZES: dict[str, Any] = {"samples": 7, "seq_len": 31, "seed": 5}


def _other_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Return tokenizers that may give other ids than the plain one, and only such."""
    no_bos, other_eos, one_more = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    no_bos.backend_tokenizer.post_processor = None
    other_eos.eos_token = "<pad>"
    one_more.add_tokens(["heron"])
    return {"no bos": no_bos, "other eos": other_eos, "one more token": one_more}


# -- calibration ------------------------------------------------------------------------------------------------


def test_shape_type_and_range() -> None:
    windows = calibration_windows(DOCUMENTS, tiny_tokenizer(), **SIZES)
    assert windows.ids.shape == (7, 31)
    assert windows.ids.dtype == torch.int64
    assert (windows.windows, windows.seq_len, windows.tokens) == (7, 31, 217)
    assert (windows.asked, windows.seed) == (7, 5)


def test_same_seed_same_bytes_other_seed_other_bytes() -> None:
    first, second = (calibration_windows(DOCUMENTS, tiny_tokenizer(), **SIZES) for _ in range(2))
    other = calibration_windows(DOCUMENTS, tiny_tokenizer(), **{**SIZES, "seed": 6})
    assert torch.equal(first.ids, second.ids) and first.digest == second.digest
    assert not torch.equal(first.ids, other.ids) and first.digest != other.digest


def test_more_windows_start_with_the_same_ones() -> None:
    few = calibration_windows(DOCUMENTS, tiny_tokenizer(), **SIZES)
    many = calibration_windows(DOCUMENTS, tiny_tokenizer(), **{**SIZES, "samples": 20})
    assert torch.equal(many.ids[:7], few.ids)


def test_every_document_is_between_bos_and_eos() -> None:
    tokenizer = tiny_tokenizer()
    windows = calibration_windows(DOCUMENTS, tokenizer, samples=1, seq_len=5000, seed=0)
    stream = windows.ids[0].tolist()
    starts = [index for index, token in enumerate(stream) if token == BOS]
    assert stream[0] == BOS
    assert all(stream[start - 1] == EOS for start in starts[1:])
    whole = [stream[start + 1 : end - 1] for start, end in pairwise(starts)]
    assert {tokenizer.decode(ids) for ids in whole} <= set(DOCUMENTS.documents)
    assert [tokenizer.decode(ids) for ids in whole] != list(DOCUMENTS.documents[: len(whole)])  # shuffled


def test_no_eos_twice_where_bos_is_eos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<bos>"
    stream = calibration_windows(DOCUMENTS, tokenizer, samples=1, seq_len=3000, seed=0).ids[0].tolist()
    assert not any(left == right == BOS for left, right in pairwise(stream))


def test_separator_where_there_is_no_eos() -> None:
    tokenizer = _other_tokenizers()["no bos"]
    tokenizer.eos_token = None
    ids = calibration_windows(_documents(["one", "two"]), tokenizer, samples=1, seq_len=10, seed=0).ids[0]
    assert tokenizer.decode(ids) in ("one\n\ntwo\n\n", "two\n\none\n\n")


def test_an_eos_that_the_model_has_no_row_for_does_not_stand_between_documents(tmp_path: Path) -> None:
    tokenizer = _other_tokenizers()["no bos"]
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})  # id 260
    texts, sizes = _documents(["one", "two"]), {"samples": 1, "seq_len": 10, "seed": 0}
    listener = Recorder()
    for said in ([], ["built"]):  # the second time from the cache
        ids = cached_calibration_windows(tmp_path, tokenizer, texts, **sizes, rows=260, report=listener).ids[0]
        assert tokenizer.decode(ids) in ("one\n\ntwo\n\n", "two\n\none\n\n")
        assert len(listener.facts) == len(said)
    assert "260 rows, none for '<|im_end|>' (id 260)" in listener.warnings[0]
    assert 260 in calibration_windows(texts, tokenizer, samples=1, seq_len=7, seed=0, rows=261).ids
    assert cache_key(texts, tokenizer, **sizes, rows=260) != cache_key(texts, tokenizer, **sizes, rows=261)
    assert cache_key(texts, tokenizer, **sizes, rows=261) == cache_key(texts, tokenizer, **sizes)


def test_a_token_that_the_model_has_no_row_for_is_named_if_the_text_holds_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["[PAD2]"], special_tokens=True)
    with_it = _documents(["one [PAD2] two"])
    said = r"text 'test' \(calibration\) holds the token '\[PAD2\]' \(id 260\); .*260 rows, the tokenizer 261 tokens"
    with pytest.raises(DataError, match=said):
        calibration_windows(with_it, tokenizer, samples=1, seq_len=9, seed=0, rows=260)
    cached_calibration_windows(tmp_path, tokenizer, with_it, samples=1, seq_len=9, seed=0)
    with pytest.raises(DataError, match=said):
        cached_calibration_windows(tmp_path, tokenizer, with_it, samples=1, seq_len=9, seed=0, rows=260)
    with pytest.raises(DataError, match=r"holds the token '\[PAD2\]'"):
        evaluation_windows(with_it, tokenizer, seq_len=9, rows=260)
    # A tokenizer with more tokens than rows is no error as long as the text has none of them.
    evaluation_windows(with_it, tokenizer, seq_len=4, max_windows=1, rows=260)


def test_short_text_gives_what_there_is() -> None:
    windows = calibration_windows(_documents(["a" * 100]), tiny_tokenizer(), samples=9, seq_len=30, seed=0)
    assert windows.ids.shape == (3, 30)
    assert windows.asked == 9


@pytest.mark.parametrize("cut", [calibration_windows, evaluation_windows])
def test_less_than_one_window_is_an_error_with_numbers(cut: Callable[..., TokenWindows]) -> None:
    options = {"samples": 2, "seed": 0} if cut is calibration_windows else {}
    with pytest.raises(DataError, match=r"11 tokens, one window needs 12"):
        cut(_documents(["a" * 10]), tiny_tokenizer(), seq_len=12, **options)


def test_impossible_sizes() -> None:
    with pytest.raises(UsageError, match="0 windows"):
        calibration_windows(DOCUMENTS, tiny_tokenizer(), samples=0, seq_len=8, seed=0)
    with pytest.raises(UsageError, match="1 tokens"):
        evaluation_windows(DOCUMENTS, tiny_tokenizer(), seq_len=1)
    with pytest.raises(UsageError, match="0 windows"):
        evaluation_windows(DOCUMENTS, tiny_tokenizer(), seq_len=8, max_windows=0)


def test_long_texts_are_tokenised_quietly(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluation_windows(DOCUMENTS, tiny_tokenizer(), seq_len=64)  # far over its model_max_length of 256
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


# -- evaluation -------------------------------------------------------------------------------------------------


def test_evaluation_is_one_tokenised_join_in_windows() -> None:
    tokenizer = tiny_tokenizer()
    documents = _documents(["", "first line\n", "", "second line", ""])
    expected = tokenizer("\n\n".join(documents.documents))["input_ids"]
    windows = evaluation_windows(documents, tokenizer, seq_len=7)
    count = len(expected) // 7
    assert windows.ids.flatten().tolist() == expected[: count * 7]
    assert len(expected) % 7  # there is a remainder to drop
    assert (windows.windows, windows.asked, windows.seed) == (count, count, None)
    assert windows.ids.flatten().tolist().count(BOS) == 1


def test_evaluation_takes_the_front() -> None:
    every = evaluation_windows(DOCUMENTS, tiny_tokenizer(), seq_len=40)
    front = evaluation_windows(DOCUMENTS, tiny_tokenizer(), seq_len=40, max_windows=3)
    assert torch.equal(front.ids, every.ids[:3])
    assert (front.windows, front.asked) == (3, 3)
    more = evaluation_windows(DOCUMENTS, tiny_tokenizer(), seq_len=40, max_windows=10_000)
    assert more.windows == every.windows < more.asked == 10_000


# -- long texts -------------------------------------------------------------------------------------------------


def _trained(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one of the four families, trained on the tiny texts."""
    special = ["<s>", "</s>", "<unk>"]
    options: dict[str, Any] = {"vocab_size": 300, "special_tokens": special, "show_progress": False}
    if kind == "byte-level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer: Any = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**options)
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        trainer = trainers.BpeTrainer(**options)
    made.train_from_iterator(tiny_texts(), trainer)
    if kind == "metaspace-bpe":  # as Llama 2: nothing splits the text, merges run over all of it
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bare = json.loads(made.to_str())
        bare["pre_tokenizer"] = None
        made = Tokenizer.from_str(json.dumps(bare))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


_KINDS = ["byte-level", "unigram", "wordpiece", "metaspace-bpe"]


@pytest.fixture
def short_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_LONG", 2048)
    monkeypatch.setattr(tokens, "_MARGIN", 32)


@pytest.mark.parametrize("kind", _KINDS)
def test_the_front_of_a_long_text_has_the_ids_of_the_whole(
    kind: str, short_is_long: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = _trained(kind)
    lines = "\n".join(tiny_texts(400)) + "\n\n\n" + "  \t x" * 300 + "no-blank-at-all" * 300 + "\U0001f642é" * 500
    for text in (lines, lines.replace("\n", " "), lines.replace("\n", "").replace(" ", "_")):
        whole = tokenizer(text, verbose=False)["input_ids"]
        for needed in (1, 40, 200, 700):
            assert tokens._front(tokenizer, text, needed)[:needed] == whole[:needed]
    lengths: list[int] = []
    tokenise = tokens._tokenise

    def watched(tokenizer: Any, texts: list[str]) -> list[list[int]]:
        lengths.append(sum(map(len, texts)))
        return tokenise(tokenizer, texts)

    monkeypatch.setattr(tokens, "_tokenise", watched)
    windows = evaluation_windows(_documents([lines]), tokenizer, seq_len=20, max_windows=3)
    expected = tokenizer(lines, verbose=False)["input_ids"]
    assert windows.ids.flatten().tolist() == expected[:60]
    again = calibration_windows(_documents([lines]), tokenizer, samples=3, seq_len=20, seed=0)
    assert again.ids.flatten().tolist() == expected[:60]
    assert max(lengths) < len(lines) / 2, "the whole text was tokenised"
    lengths.clear()
    assert evaluation_windows(_documents([lines]), tokenizer, seq_len=20).windows == len(expected) // 20
    assert lengths == [len(lines)]


def test_a_tokenizer_whose_ids_depend_on_the_end_reads_the_whole_text(short_is_long: None) -> None:
    class Looking:
        """Gives ids that depend on how long the text is."""

        eos_token_id = None

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[len(text)] * len(text) for text in texts]}

    text = "a" * 20_000
    windows = evaluation_windows(_documents([text]), Looking(), seq_len=4, max_windows=2)  # type: ignore[arg-type]
    assert windows.ids.unique().tolist() == [20_000]


def test_few_tokens_of_many_long_documents_read_few_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    tokenise = tokens._tokenise

    def watched(tokenizer: Any, texts: list[str]) -> list[list[int]]:
        read.extend(texts)
        return tokenise(tokenizer, texts)

    monkeypatch.setattr(tokens, "_tokenise", watched)
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 500)
    windows = calibration_windows(DOCUMENTS, tiny_tokenizer(), **SIZES)
    assert sum(map(len, read)) < 2 * windows.tokens + 500


# -- cache ------------------------------------------------------------------------------------------------------


def test_cache_gives_the_same_windows_without_tokenising(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, listener = tmp_path / "new" / "cache", Recorder()
    built = cached_calibration_windows(folder, tiny_tokenizer(), DOCUMENTS, **SIZES, report=listener)
    assert torch.equal(built.ids, calibration_windows(DOCUMENTS, tiny_tokenizer(), **SIZES).ids)
    (path,) = folder.iterdir()  # nothing left aside
    assert path.name == cache_key(DOCUMENTS, tiny_tokenizer(), **SIZES) + ".safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("ids").dtype == torch.int32
    assert not listener.facts
    monkeypatch.setattr("ara.data.token_cache.calibration_windows", lambda *_, **__: pytest.fail("tokenised again"))
    read = cached_calibration_windows(folder, tiny_tokenizer(), DOCUMENTS, **SIZES, report=listener)
    assert torch.equal(read.ids, built.ids) and read.ids.dtype == torch.int64
    assert (read.asked, read.seed, read.digest) == (built.asked, built.seed, built.digest)
    assert len(listener.facts) == 1 and not listener.warnings


def test_cache_remembers_what_was_asked_of_a_short_text(tmp_path: Path) -> None:
    short = _documents(["a" * 100])
    for _ in range(2):
        windows = cached_calibration_windows(tmp_path, tiny_tokenizer(), short, samples=9, seq_len=30, seed=0)
        assert (windows.windows, windows.asked) == (3, 9)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    listener = Recorder()
    sizes: dict[str, Any] = {"samples": 2, "seq_len": 5, "seed": 0}
    built = cached_calibration_windows(tmp_path, tiny_tokenizer(), DOCUMENTS, **sizes)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    for position in range(len(good)):
        for bit in (1, 128):
            path.write_bytes(good[:position] + bytes([good[position] ^ bit]) + good[position + 1 :])
            again = cached_calibration_windows(tmp_path, tiny_tokenizer(), DOCUMENTS, **sizes, report=listener)
            assert torch.equal(again.ids, built.ids), f"byte {position}"
    assert len(listener.warnings) > 1.8 * len(good)  # padding may be flipped without harm
    assert all(str(path) in warning for warning in listener.warnings)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_truncated_or_foreign_cache_is_rebuilt(content: bytes | None, tmp_path: Path) -> None:
    listener = Recorder()
    built = cached_calibration_windows(tmp_path, tiny_tokenizer(), DOCUMENTS, **SIZES)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    path.write_bytes(good[:-1] if content is None else content)
    again = cached_calibration_windows(tmp_path, tiny_tokenizer(), DOCUMENTS, **SIZES, report=listener)
    assert torch.equal(again.ids, built.ids)
    assert len(listener.warnings) == 1
    assert path.read_bytes() == good


def test_key_covers_text_sizes_and_seed() -> None:
    keys = {cache_key(DOCUMENTS, tiny_tokenizer(), **SIZES), cache_key(_documents(["x"]), tiny_tokenizer(), **SIZES)}
    keys |= {cache_key(DOCUMENTS, tiny_tokenizer(), **{**SIZES, name: SIZES[name] + 1}) for name in SIZES}
    assert len(keys) == 5


def test_other_tokenizers_have_other_keys() -> None:
    keys = [cache_key(DOCUMENTS, tokenizer, **SIZES) for tokenizer in _other_tokenizers().values()]
    assert len({*keys, cache_key(DOCUMENTS, tiny_tokenizer(), **SIZES)}) == 4


def test_fingerprint_survives_use_and_saving(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "longer"], padding=True, truncation=True, max_length=4)  # both settings stay in the backend
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == before


class _SlowTokenizer:
    """The little that the fingerprint asks of a tokenizer without a Rust backend."""

    bos_token_id = eos_token_id = unk_token_id = None

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self._vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


def test_slow_tokenizers_are_known_by_their_vocabulary() -> None:
    def fingerprint(vocabulary: dict[str, int]) -> str:
        return tokenizer_fingerprint(_SlowTokenizer(vocabulary))

    assert fingerprint({"a": 0, "b": 1}) == fingerprint({"b": 1, "a": 0})
    assert fingerprint({"a": 0, "b": 1}) != fingerprint({"a": 1, "b": 0})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_in_the_place_of_the_cache_is_not_waited_for(tmp_path: Path) -> None:
    listener = Recorder()
    built = cached_calibration_windows(tmp_path, tiny_tokenizer(), DOCUMENTS, **SIZES)
    (path,) = tmp_path.iterdir()
    path.unlink()
    os.mkfifo(path)
    again = cached_calibration_windows(tmp_path, tiny_tokenizer(), DOCUMENTS, **SIZES, report=listener)
    assert torch.equal(again.ids, built.ids) and path.is_file() and "not a regular file" in listener.warnings[0]
