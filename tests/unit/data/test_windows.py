"""Windows of mixtures: shares, order, answers, and further windows that differ from the first ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ara.data import token_cache
from ara.data.chat_windows import conversation_windows
from ara.data.conversations import conversation_tokens, load_conversations
from ara.data.mixtures import load_calibration_text
from ara.data.texts import load_documents
from ara.data.token_cache import cache_key, cached_calibration_windows
from ara.data.tokens import TokenWindows, calibration_windows
from ara.data.windows import WindowReader, take_turns
from ara.errors import DataError, UsageError
from tests.recorder import Recorder
from tests.tiny import tiny_texts, tiny_tokenizer
from tests.unit.data.test_conversations import rows, written

SEQ_LEN = 37
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a story, other prose, and 60 conversations."""
    path = tmp_path_factory.mktemp("mixture")
    texts = tiny_texts(400)
    for name, part in (("story", texts[:200]), ("other", [text.upper() for text in texts[200:]])):
        (path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    written(path / "spoken.jsonl", rows(*((texts[i], texts[-i]) for i in range(60))))
    return path


def reader(
    folder: Path, cache: Path, shares: str = "story:0.7,spoken:0.3", seed: int = 3, seq_len: int = SEQ_LEN
) -> WindowReader:
    parts = []
    for part in shares.split(","):
        name, _, share = part.partition(":")
        prefix = "chat" if name == "spoken" else "file"
        parts.append(f"{prefix}:{folder / name}.jsonl" + (f":{share}" if share else ""))
    tokenizer: Any = tiny_tokenizer()
    return WindowReader(cache, tokenizer, load_calibration_text(",".join(parts)), seq_len, seed, 260, Recorder())


def alone(folder: Path, name: str, samples: int, seed: int = 3) -> TokenWindows:
    """Return the windows of one text, read by itself."""
    tokenizer: Any = tiny_tokenizer()
    sizes: dict[str, Any] = {"samples": samples, "seq_len": SEQ_LEN, "seed": seed}
    if name == "spoken":
        spoken = load_conversations(f"chat:{folder / name}.jsonl", "calibration")
        return conversation_windows(spoken, tokenizer, **sizes)
    return calibration_windows(load_documents(f"file:{folder / name}.jsonl", "calibration"), tokenizer, **sizes)


# -- turns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [(0.8, 0.2), (0.5, 0.5), (0.05, 0.95), (0.6, 0.3, 0.1), (0.2,) * 5])
def test_every_beginning_has_about_the_shares(shares: tuple[float, ...]) -> None:
    for seed in range(5):
        turns = take_turns(shares, 200, seed)
        for count in range(1, 201):
            for index, share in enumerate(shares):
                excess = turns[:count].count(index) - share * count
                assert -(len(shares) - 1) - 1e-6 < excess < 1 + 1e-6
        assert turns[:50] == take_turns(shares, 50, seed)
    assert take_turns(shares, 200, 1) != take_turns(shares, 200, 2)


def test_one_text_gives_every_window() -> None:
    assert take_turns([1.0], 4, 0) == [0, 0, 0, 0]


# -- the first windows ------------------------------------------------------------------------------------------


def test_each_text_gives_its_own_windows_in_its_order(folder: Path, tmp_path: Path) -> None:
    found = reader(folder, tmp_path).first(20)
    assert found.ids.shape == (20, SEQ_LEN) and found.asked == 20 and found.ids.dtype == torch.int64
    counts = torch.bincount(found.sources).tolist()
    assert sum(counts) == 20 and abs(counts[1] - 6) <= 1
    assert found.names == tuple(part.text.name for part in reader(folder, tmp_path).text.parts)
    assert list(found.tokens_of.values()) == [count * SEQ_LEN for count in counts]
    for index, name in enumerate(("story", "spoken")):
        own = alone(folder, name, counts[index])
        assert torch.equal(found.ids[found.sources == index], own.ids)
        if name == "spoken":
            assert found.answers is not None and own.answers is not None
            assert torch.equal(found.answers[found.sources == 1], own.answers) and not own.answers.all()
    assert found.answers is not None and found.answers[found.sources == 0].all()


def test_the_first_windows_do_not_depend_on_their_number(folder: Path, tmp_path: Path) -> None:
    few, many = reader(folder, tmp_path).first(9), reader(folder, tmp_path).first(20)
    assert torch.equal(few.ids, many.ids[:9]) and torch.equal(few.sources, many.sources[:9])


def test_equal_seeds_give_equal_windows(folder: Path, tmp_path: Path) -> None:
    first = reader(folder, tmp_path / "a").first(12)
    for cache in ("a", "b"):  # from the cache, and made again
        again = reader(folder, tmp_path / cache).first(12)
        assert again.digest == first.digest and torch.equal(again.ids, first.ids)
        assert again.answers is not None and first.answers is not None and torch.equal(again.answers, first.answers)
    assert reader(folder, tmp_path, seed=4).first(12).digest != first.digest


def test_one_plain_text_is_as_before(folder: Path, tmp_path: Path) -> None:
    found, own = reader(folder, tmp_path, "story").first(8), alone(folder, "story", 8)
    assert torch.equal(found.ids, own.ids) and found.digest == own.digest and found.answers is None
    assert reader(folder, tmp_path, "story,other").first(8).answers is None
    spoken = reader(folder, tmp_path, "spoken").first(8)
    assert spoken.answers is not None and spoken.digest == alone(folder, "spoken", 8).digest


def test_a_short_text_gives_fewer_windows_and_says_so(folder: Path, tmp_path: Path) -> None:
    there = alone(folder, "spoken", 10_000).windows
    one = reader(folder, tmp_path, "story:0.5,spoken:0.5")
    asked = 2 * there + 20
    found = one.first(asked)
    assert isinstance(one.report, Recorder)
    assert int((found.sources == 1).sum()) == there and found.windows < found.asked == asked
    (warning,) = one.report.warnings
    assert f"spoken.jsonl has only {there} of the " in warning and "requested windows of 37 tokens" in warning
    assert torch.equal(found.ids[:there], one.first(there).ids)


def test_a_share_below_one_window_is_said(folder: Path, tmp_path: Path) -> None:
    one = reader(folder, tmp_path, "story:0.99,spoken:0.01")
    found = one.first(2)
    assert isinstance(one.report, Recorder)
    if not (found.sources == 1).any():
        assert "no window comes from" in one.report.warnings[0] and "1 %" in one.report.warnings[0]
    assert found.windows == 2


def test_sizes_are_checked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="got 0 windows"):
        reader(folder, tmp_path).first(0)
    with pytest.raises(UsageError, match="windows of 1 tokens"):
        reader(folder, tmp_path, seq_len=1).first(3)
    with pytest.raises(DataError, match=r"spoken.jsonl' \(calibration\) has [\d,]+ tokens, one window needs 9,999"):
        reader(folder, tmp_path, "spoken", seq_len=9999).first(3)


# -- further windows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", ["story", "spoken", "story:0.7,spoken:0.3", "story:0.4,spoken:0.3,other:0.3"])
def test_further_windows_are_new_and_held_out_ones_apart(shares: str, folder: Path, tmp_path: Path) -> None:
    one = reader(folder, tmp_path, shares)
    used, (learn, held) = one.first(12), one.further(12, 10, 6)
    assert isinstance(one.report, Recorder) and not one.report.warnings
    assert (learn.windows, held.windows) == (10, 6)
    seen = {tuple(row) for row in used.ids.tolist()}
    assert len(seen | {tuple(row) for row in (*learn.ids.tolist(), *held.ids.tolist())}) == 28
    for index, part in enumerate(one.text.parts):
        name = Path(part.text.name).stem
        counts = [int((windows.sources == index).sum()) for windows in (used, learn, held)]
        own = alone(folder, name, sum(counts) + 1).ids
        expected = own[counts[0] : counts[0] + counts[1]], own[len(own) - counts[2] :]
        for windows, rows_of_part in zip((learn, held), expected, strict=True):
            assert torch.equal(windows.ids[windows.sources == index], rows_of_part)


def test_a_short_text_is_read_again_and_others_are_not(folder: Path, tmp_path: Path) -> None:
    there = alone(folder, "spoken", 10_000).windows
    one = reader(folder, tmp_path, "story:0.5,spoken:0.5")
    used = 2 * there
    learn, held = one.further(used, 8, 8)
    assert isinstance(one.report, Recorder)
    (warning,) = one.report.warnings
    assert f"spoken.jsonl has {there} windows of 37 tokens" in warning and "overlap" in warning
    story = alone(folder, "story", 10_000).ids
    before = {tuple(row) for row in story[: take_turns([0.5, 0.5], used, 3).count(0)].tolist()}
    for windows in (learn, held):
        assert int((windows.sources == 1).sum()) > 0
        assert not before & {tuple(row) for row in windows.ids[windows.sources == 0].tolist()}
    both = [{tuple(row) for row in windows.ids.tolist()} for windows in (learn, held)]
    assert not both[0] & both[1]


def test_a_text_with_fewer_than_three_windows_is_refused(folder: Path, tmp_path: Path) -> None:
    length = alone(folder, "spoken", 10_000).tokens // 2 - SEQ_LEN
    with pytest.raises(DataError, match=r"spoken.jsonl has 2 windows of \d+ tokens, at least 3 are needed"):
        reader(folder, tmp_path, "spoken", seq_len=length).further(1, 1, 1)


# -- conversations ----------------------------------------------------------------------------------------------


def test_conversations_follow_each_other_with_their_answers(folder: Path) -> None:
    spoken = load_conversations(f"chat:{folder / 'spoken.jsonl'}", "calibration")
    tokenizer: Any = tiny_tokenizer()
    found = alone(folder, "spoken", 10_000)
    whole = {tuple(one.ids.tolist()): one.answers for one in conversation_tokens(tokenizer, spoken.conversations)}
    assert found.answers is not None
    stream, answers = found.ids.flatten().tolist(), found.answers.flatten().tolist()
    position = read = 0
    while position + 400 < len(stream):
        ids = next(ids for ids in whole if tuple(stream[position : position + len(ids)]) == ids)
        assert answers[position : position + len(ids)] == whole[ids].tolist()
        position, read = position + len(ids), read + 1
    assert read > 30


def test_the_cache_keeps_answers_and_notices_damage(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken = load_conversations(f"chat:{folder / 'spoken.jsonl'}", "calibration")
    tokenizer: Any = tiny_tokenizer()
    sizes: dict[str, Any] = {"samples": 3, "seq_len": 11, "seed": 0}
    built = cached_calibration_windows(tmp_path, tokenizer, spoken, **sizes)
    (path,) = tmp_path.iterdir()
    good, listener = path.read_bytes(), Recorder()
    for position in range(len(good) - 3 * 11 * 5 - 8, len(good), 3):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with monkeypatch.context() as patched:
            patched.setattr(token_cache, "conversation_windows", lambda *_, **__: built)
            again = cached_calibration_windows(tmp_path, tokenizer, spoken, **sizes, report=listener)
        assert torch.equal(again.ids, built.ids) and torch.equal(_marks(again), _marks(built))
    assert len(listener.warnings) > 50
    monkeypatch.setattr(token_cache, "conversation_windows", lambda *_, **__: pytest.fail("rendered again"))
    read = cached_calibration_windows(tmp_path, tokenizer, spoken, **sizes)
    assert torch.equal(_marks(read), _marks(built)) and read.digest == built.digest


def _marks(windows: TokenWindows) -> torch.Tensor:
    assert windows.answers is not None and windows.answers.dtype == torch.bool
    return windows.answers


def test_the_key_of_conversations_covers_the_template(folder: Path) -> None:
    spoken = load_conversations(f"chat:{folder / 'spoken.jsonl'}", "calibration")
    story = load_documents(f"file:{folder / 'story.jsonl'}", "calibration")
    one, other = tiny_tokenizer(), tiny_tokenizer()
    other.chat_template += " "
    sizes: dict[str, Any] = {"samples": 3, "seq_len": 11, "seed": 0}
    assert len({cache_key(spoken, tokenizer, **sizes) for tokenizer in (one, other)}) == 2
    assert len({cache_key(story, tokenizer, **sizes) for tokenizer in (one, other)}) == 1


def test_a_model_without_template_needs_plain_text(folder: Path, tmp_path: Path) -> None:
    one = reader(folder, tmp_path)
    one.tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"the model has no chat template, which the text 'chat:.*spoken.jsonl' needs"):
        one.first(9)
