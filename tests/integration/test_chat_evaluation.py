"""``ara eval`` on conversations: figures against independent ones, resumed after NaN, shown in table and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ara.stages.chats as chats
import ara.stages.measure as measure
from ara.config import EvalConfig
from ara.errors import DataError, NumericalError
from ara.evaluation.generation import greedy_tokens
from ara.stages.common import Run
from ara.stages.evaluate import evaluate
from tests.commands import ara, done, refused
from tests.tiny import save_tiny

NAME = "energy-0.70"
MODELS = ["dense", "uniform", NAME]
CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
WORDS = ("--device", "cpu", "--dtype", "float32", "--seq-len", 100, "--max-new-tokens", 4)
NEW = 4
_SAID = (
    ("Who bakes the bread?", "The baker."),
    ("Where is the river?", None),
    ("How many stones?", "Twelve, and one more."),
    ("x" * 120, "Too long."),
    ("When does the mill open?", "At dawn"),
    ("And the salt?", None),
)


def _conversation(question: str, answer: str | None) -> list[dict[str, str]]:
    asked = [{"role": "user", "content": question}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


@pytest.fixture
def chat(tmp_path: Path) -> str:
    path = tmp_path / "secret" / "said.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"messages": _conversation(*said)}) + "\n" for said in _SAID))
    return f"chat:{path}"


def _config(chat: str, **changes: Any) -> EvalConfig:
    return EvalConfig(**{"tasks": (chat,), "seq_len": 100, "max_new_tokens": NEW, **CPU, **changes})


def _prompt(tokenizer: Any, question: str) -> torch.Tensor:
    text = tokenizer.apply_chat_template(_conversation(question, None), add_generation_prompt=True, tokenize=False)
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_figures_are_those_of_an_independent_computation(
    copied: Path, tiny_llama: Path, chat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ara as _registered  # noqa: F401  # registers compressed checkpoints

    folders = {"dense": tiny_llama, NAME: copied / "truncate" / NAME / "checkpoint"}
    models = {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    kept = [said for said in _SAID if len(said[0]) < 100]
    prompts = [_prompt(tokenizer, question) for question, _answer in kept]
    # So that some answers are empty: what the dense model says first to two prompts, and the compressed one to one.
    stop = {next(greedy_tokens(models["dense"], prompts[i], 1, set())) for i in (0, 1)}
    stop |= {next(greedy_tokens(models[NAME], prompts[4], 1, set()))}
    monkeypatch.setattr(chats, "stop_tokens", lambda _model: stop)

    results = evaluate(_config(chat), Run(copied)).manifest.results  # type: ignore[union-attr]
    assert list(results["variants"]) == MODELS
    found = results["tasks"][chat]
    counts = ("kind", "conversations", "of", "too_long", "dense_answers", "seq_len", "max_new_tokens")
    assert [found[name] for name in counts] == ["chat", 5, 6, 1, 2, 100, NEW]

    distances, tokens = [], 0
    for prompt, (question, answer) in zip(prompts, kept, strict=True):
        if answer is None:
            said = list(greedy_tokens(models["dense"], prompt, NEW, stop))
            if len(said) < NEW:  # the token that ended the turn counts
                said = list(greedy_tokens(models["dense"], prompt, len(said) + 1, set()))
            ids = torch.cat([prompt, torch.tensor(said)])
        else:
            text = tokenizer.apply_chat_template(_conversation(question, answer), tokenize=False)
            ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        with torch.inference_mode():
            dense, other = (model(input_ids=ids[None]).logits[0].double().log_softmax(-1) for model in models.values())
        rows = range(len(prompt) - 1, len(ids) - 1)
        tokens += len(rows)
        kl = sum(float((dense[row].exp() * (dense[row] - other[row])).sum()) for row in rows) / len(rows)
        same = sum(int(dense[row].argmax()) == int(other[row].argmax()) for row in rows) / len(rows)
        distances.append((kl, same))
    assert found["answer_tokens"] == tokens
    assert found["models"]["dense"]["divergence"] is None
    divergence = found["models"][NAME]["divergence"]
    assert divergence["kl"] == pytest.approx(sum(kl for kl, _ in distances) / 5, rel=1e-5)
    assert divergence["agreement"] == pytest.approx(sum(same for _, same in distances) / 5)
    spread = torch.tensor([kl for kl, _ in distances], dtype=torch.float64).std() / 5**0.5
    assert divergence["kl_stderr"] == pytest.approx(float(spread), rel=1e-5)
    for name, model in models.items():
        said = [tokenizer.decode(list(greedy_tokens(model, prompt, NEW, stop))).strip() for prompt in prompts]
        assert found["models"][name]["empty"] == sum(not text for text in said)
    assert found["models"]["dense"]["empty"] >= 2


def test_finished_pieces_survive_nan(copied: Path, chat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = measure.openings

    def watched(chat: Any, name: str, *arguments: Any) -> Any:
        opened.append(name)
        if name == broken:
            raise NumericalError("broken")
        return original(chat, name, *arguments)

    monkeypatch.setattr(measure, "openings", watched)
    broken = "uniform"
    with pytest.raises(NumericalError, match="broken"):
        evaluate(_config(chat), Run(copied))
    assert opened == ["dense", "uniform"]
    opened.clear()
    broken = ""

    def failing(*_arguments: Any, **_options: Any) -> Any:
        raise NumericalError("broken later")

    with monkeypatch.context() as patch:
        patch.setattr(measure, "answer_distances", failing)
        with pytest.raises(NumericalError, match="broken later"):
            evaluate(_config(chat), Run(copied))
    assert opened == ["uniform", NAME]
    opened.clear()
    resumed = evaluate(_config(chat), Run(copied)).manifest
    assert opened == [] and resumed is not None
    again = evaluate(_config(chat), Run(copied, force=True)).manifest
    assert opened == MODELS and again is not None
    assert again.results["tasks"] == resumed.results["tasks"]


def test_models_one_after_the_other_have_no_distance(copied: Path, chat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together = evaluate(_config(chat), Run(copied)).manifest.results["tasks"][chat]  # type: ignore[union-attr]
    monkeypatch.setattr(measure, "groups_in_memory", lambda models, *_: [[model] for model in models])
    apart = evaluate(_config(chat), Run(copied, force=True)).manifest.results["tasks"][chat]  # type: ignore[union-attr]
    for name in MODELS:
        assert apart["models"][name] == {"divergence": None, "empty": together["models"][name]["empty"]}
    assert apart["answer_tokens"] == together["answer_tokens"]


def test_conversations_are_drawn_and_stand_beside_texts(copied: Path, chat: str, tiny_text: str) -> None:
    config = _config(chat, tasks=(tiny_text, chat), conversations=3, max_windows=2)
    results = evaluate(config, Run(copied)).manifest.results  # type: ignore[union-attr]
    assert list(results["tasks"]) == [tiny_text, chat]
    found = results["tasks"][chat]
    assert found["conversations"] + found["too_long"] == 3 and found["of"] == 6


def test_table_report_and_card_show_it(copied: Path, chat: str, tmp_path: Path) -> None:
    result = done("eval", "--tasks", chat, *WORDS, "-w", copied)
    assert "1 of 6 conversations of" in result.stderr and "are left out: longer than 100 tokens" in result.stderr
    assert "2 of 5 conversations" in result.stderr and "the dense model's greedy answer" in result.stderr
    table = result.stdout
    assert "5 of 6 conversations" in table and "2 answers are the dense model's own; 1 longer ones left out" in table
    assert "KL from dense, nats" in table and "empty answers" in table and table.count(" of 5") == 3
    document = json.loads(done("eval", "--tasks", chat, *WORDS, "-w", copied, "--json").stdout)
    assert document["results"]["tasks"][chat]["conversations"] == 5
    assert "of 5 answers empty" in done("status", "-w", copied).output
    card = tmp_path / "card.md"
    done("report", "-w", copied, "--model-card", card)
    (page,) = (copied / "report").glob("*/report.html")
    for text in (page.read_text(), card.read_text()):
        assert "empty answers" in text and "chat:said.jsonl" in text and "secret" not in text
    assert 'id="chat"' in page.read_text()


def test_what_cannot_be_asked(copied: Path, chat: str, tmp_path: Path, tiny_llama: Path) -> None:
    words = ("-w", copied, "-q", *WORDS)
    refused(ara("eval", "--tasks", f"chat:{tmp_path / 'none.jsonl'}", *words), 1, "none.jsonl")
    found = refused(ara("eval", "--tasks", chat, *words, "--seq-len", 10), 1, "no conversation of", "fits into 10")
    assert "--seq-len" in found
    unknown = ara("eval", "--tasks", "chatt", "-w", copied, "-q")
    assert unknown.exit_code == 1 and "there is no text or lm-eval task 'chatt'" in unknown.output


def test_a_model_without_a_chat_template(
    tiny_settings: dict[str, Any], chat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "base", "llama")
    (folder / "chat_template.jinja").unlink()
    root = tmp_path / "ws"
    options = ("--samples", 4, "--seq-len", 48, "--text", tiny_settings["text"], "--device", "cpu", "-w", root, "-q")
    done("run", folder, "--keep", "0.7", "--method", "uniform", "--no-eval", *options)
    with pytest.raises(DataError, match="the model has no chat template"):
        evaluate(_config(chat), Run(root))
