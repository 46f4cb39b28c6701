"""lm-eval's tasks: local data in official definitions, lm-eval's own figures, names, subsets, and what goes wrong."""

from __future__ import annotations

import json
import logging
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ara.errors import DataError, NumericalError
from ara.evaluation import harness, tasks
from ara.evaluation.harness import ask
from ara.evaluation.tasks import LOCAL, ZERO_SHOT, check_task, chosen_documents, expand, is_text, load_tasks
from tests.questions import write_questions
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(autouse=True)
def local(questions: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARA_DATA_DIR", str(questions))
    monkeypatch.setenv("ARA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def _model() -> Any:
    return tiny_model("llama").eval()


def test_names() -> None:
    assert expand(["wikitext2", "zero-shot", "piqa"]) == ("wikitext2", *ZERO_SHOT)
    assert is_text("wikitext2") and is_text("file:x") and not is_text("wikitext") and not is_text("zero-shot")
    assert not any(map(is_text, ("chat", "ultrachat", "chat:said.jsonl")))
    assert set(ZERO_SHOT) <= set(LOCAL)
    for name in LOCAL.keys() - {"hellaswag", "openbookqa", "mathqa"}:
        check_task(name)


def test_a_subset_is_drawn_by_seed_and_task() -> None:
    drawn = chosen_documents("piqa", 100, 10, 0)
    assert drawn is not None and drawn == sorted(set(drawn)) and len(drawn) == 10 and max(drawn) < 100
    assert drawn == chosen_documents("piqa", 100, 10, 0)
    assert drawn != chosen_documents("piqa", 100, 10, 1) != chosen_documents("arc_easy", 100, 10, 1)
    assert chosen_documents("piqa", 100, 100, 0) is None and chosen_documents("piqa", 100, None, 0) is None


@pytest.mark.parametrize("name", ["arc_easy", "piqa", "winogrande", "lambada_openai", "wikitext"])
def test_figures_are_those_of_lm_eval(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Its own entry point, with its own wrapper of the model, gives the same for every question."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = _model(), tiny_tokenizer()
    (task,) = load_tasks(name)
    documents = chosen_documents(name, task.documents, 9, 0)
    states = random.getstate(), torch.random.get_rng_state()
    capfd.readouterr()
    score = ask(model, tokenizer, task, documents, batch_size=4)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")
    assert random.getstate() == states[0] and torch.equal(torch.random.get_rng_state(), states[1])
    assert logging.getLogger("lm_eval").level != logging.ERROR
    (again,) = load_tasks(name)
    assert again.digest == task.digest
    expected = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=200),
        tasks=[again.definition],
        samples={name: documents},
        task_manager=tasks._manager(str(Path(__file__).parent)),
        bootstrap_iters=10,
    )
    row = expected["results"][name]
    assert score.metrics == {key: pytest.approx(row[f"{key},none"], rel=1e-4) for key in score.metrics}
    for metric, stderr in score.stderrs.items():
        if metric.startswith("acc"):
            assert stderr == pytest.approx(row[f"{metric}_stderr,none"])
        else:
            assert stderr is None
    assert [answer.document for answer in score.answers] == documents
    assert score.headline == ("word_perplexity" if name == "wikitext" else "acc")
    theirs = {sample["doc_id"]: sample for sample in expected["samples"][name]}
    for answer in score.answers:
        assert answer.digest == theirs[answer.document]["doc_hash"]
        if name != "wikitext":
            assert answer.metrics["acc"] == theirs[answer.document]["acc"]


def test_the_definition_is_the_official_one() -> None:
    """All but the data source and the splits that are not there."""
    (task,) = load_tasks("arc_challenge")
    config = task.definition.config
    assert config.doc_to_text == "Question: {{question}}\nAnswer:"
    assert [metric["metric"] for metric in config.metric_list] == ["acc", "acc_norm"]
    assert config.test_split == "test" and config.training_split is None
    assert task.documents == 24 and task.origin.startswith("file ")


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_every_definition_is_where_we_look(name: str) -> None:
    import lm_eval.tasks
    import yaml

    class Lenient(yaml.SafeLoader):
        """Reads lm-eval's own tags as nothing."""

    Lenient.add_multi_constructor("!", lambda loader, suffix, node: None)
    path = Path(lm_eval.tasks.__file__).parent / LOCAL[name].definition
    found = yaml.load(path.read_text(encoding="utf-8"), Lenient)
    assert found["task"] == name
    hub = found.get("dataset_path") or "allenai/ai2_arc"  # arc_challenge includes arc_easy
    assert hub == LOCAL[name].hub


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    with pytest.raises(DataError, match=r"task 'mathqa': no file .*mathqa/test\.jsonl \(ARA_DATA_DIR is") as caught:
        load_tasks("mathqa")
    assert "regisss/math_qa" in str(caught.value.hint)
    built: list[Any] = []

    class Manager:
        all_tasks = ("boolq", "copa")

        def __init__(self, folder: Any) -> None:
            built.append(folder)

        def load(self, name: str) -> Any:
            raise error

    monkeypatch.setattr(tasks, "_manager", Manager)
    tasks._index.cache_clear()
    request.addfinalizer(tasks._index.cache_clear)
    with pytest.raises(DataError, match="there is no text or lm-eval task 'bolq'") as unknown:
        check_task("bolq")
    assert unknown.value.exit_code == 1
    hint = "did you mean boolq? texts: c4, wikitext2, python-docs, chat, ultrachat, file:PATH, chat:PATH;"
    assert str(unknown.value.hint).startswith(hint)
    error: Exception = ModuleNotFoundError("No module named 'rouge_score.x'", name="rouge_score.x")
    with pytest.raises(DataError, match="task boolq needs the Python module rouge_score, which is not") as module:
        load_tasks("boolq")
    assert module.value.hint == "pip install rouge_score"
    wrapped = ImportError("`jieba` is needed: pip install jieba")
    wrapped.__cause__, error = error, wrapped
    with pytest.raises(DataError, match="task boolq needs the Python module rouge_score"):
        load_tasks("boolq")
    error = ImportError("Please install `jieba`.\nThanks")
    with pytest.raises(DataError, match=r"task boolq needs .* cannot be imported: Please install `jieba`\.$"):
        load_tasks("boolq")
    error = ConnectionError("no route")
    with pytest.raises(DataError, match=r"of boolq cannot be fetched .*ConnectionError: no route") as offline:
        load_tasks("boolq")
    assert str(offline.value.hint).startswith("go online, or use a task with local data (ARA_DATA_DIR): arc_easy")
    assert built == [None], "the index of all tasks is made once"


def test_damaged_questions_and_the_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text('{"goal": "x"}\n')
    monkeypatch.setenv("ARA_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="the questions of piqa cannot be used") as caught:
        load_tasks("piqa")
    assert "baber/piqa" in str(caught.value.hint)
    monkeypatch.delenv("ARA_DATA_DIR")
    import datasets

    def unreachable(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"cannot be fetched from the Hugging Face hub \(ConnectionError: no route\)$"
    ) as offline:
        load_tasks("piqa")
    assert offline.value.hint == "set ARA_DATA_DIR (needs piqa/validation.jsonl), or go online"


@pytest.mark.parametrize("name", ["piqa", "wikitext", "made"])
def test_a_model_that_gives_nan_is_an_error_at_its_first_batch(name: str, questions: Path, tmp_path: Path) -> None:
    model, calls = _model(), []
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    model.register_forward_hook(lambda *_: calls.append(1))
    task = _made(questions, tmp_path, "generate_until", _ANSWER) if name == "made" else load_tasks(name)[0]
    with pytest.raises(NumericalError, match="mine: the model gives logits of nan, expected finite numbers"):
        ask(model, tiny_tokenizer(), task, [0, 1, 2], label="mine")
    assert len(calls) == 1


def test_answers_that_are_written_are_checked_and_stay_the_same(questions: Path, tmp_path: Path) -> None:
    model, tokenizer = _model(), tiny_tokenizer()
    score = ask(model, tokenizer, _made(questions, tmp_path, "generate_until", _ANSWER), [0, 1, 2])
    ids = tokenizer("Carry bread home", return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert len(score.answers) == 3 and set(score.metrics) == {"exact_match"}
    assert score.answers[0].responses == [tokenizer.decode(written, skip_special_tokens=True)]


def test_tokens_that_the_model_has_no_row_for(questions: Path, tmp_path: Path) -> None:
    """Filling up batches with one is no error; a question with one is."""
    tokenizer, plain = tiny_tokenizer(), tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD2]"})
    for kind, rest in (("generate_until", _ANSWER), ("multiple_choice", _CHOICES)):
        task = _made(questions, tmp_path, kind, rest)
        found, expected = (ask(_model(), one, task, [0, 1, 2], batch_size=3) for one in (tokenizer, plain))
        assert [answer.responses for answer in found.answers] == [answer.responses for answer in expected.answers]
        words = json.loads((questions / "piqa" / "validation.jsonl").read_text().splitlines()[0])["goal"].split()
        tokenizer.add_tokens([words[-1]])
        with pytest.raises(DataError, match=rf"^mine holds the token '{words[-1]}' \(id 261\); .*260 rows"):
            ask(_model(), tokenizer, task, [0], label="mine")
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "[PAD2]"})


@pytest.mark.parametrize(
    ("error", "seen", "words"),
    [
        (ZeroDivisionError("no\nquestions"), DataError, "^lm-eval fails at piqa, mine: ZeroDivisionError: no$"),
        (ModuleNotFoundError("x", name="rouge_score"), DataError, "^piqa, mine needs the Python module rouge_score"),
        (NumericalError("nan"), NumericalError, "^nan$"),
        (RuntimeError("CUDA out of memory. Tried"), RuntimeError, "^CUDA out of memory"),
        (MemoryError(), MemoryError, "^$"),
        (OSError("disk"), OSError, "^disk$"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_what_lm_eval_raises_names_task_and_model(
    error: BaseException, seen: type[BaseException], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    (task,) = load_tasks("piqa")
    monkeypatch.setattr(task.definition, "process_results", fail)
    with pytest.raises(seen, match=words) as caught:
        ask(_model(), tiny_tokenizer(), task, [0, 1], label="piqa, mine")
    assert type(caught.value) is seen and (seen is not DataError or caught.value.__cause__ is error)


# -- metrics of all kinds ---------------------------------------------------------------------------------------


_F1 = """
task: made_f1
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{goal}}}}"
{rest}
"""
_CHOICES = """
doc_to_choice: ["{{sol1}}", "{{sol2}}"]
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: f1}, {metric: mcc}, {metric: brier_score}]
"""
_ANSWER = """
doc_to_target: "{{sol1}}"
generation_kwargs: {max_gen_toks: 5, until: ["|||"]}
metric_list: [{metric: exact_match}]
"""


def _made(questions: Path, folder: Path, kind: str, rest: str) -> tasks.Task:
    """Return a task of our own over the questions of piqa."""
    text = _F1.format(file=questions / "piqa" / "validation.jsonl", cache=folder / "cache", kind=kind, rest=rest)
    (folder / "made.yaml").write_text(text)
    definition = tasks._manager(str(folder)).load("made_f1")["tasks"]["made_f1"]
    return tasks.Task("made_f1", definition, 24, "made", "")


def test_scalars_of_numpy_and_tuples_are_kept_as_json(questions: Path, tmp_path: Path) -> None:
    task = _made(questions, tmp_path, "multiple_choice", _CHOICES)
    score = ask(_model(), tiny_tokenizer(), task, [0, 3, 4, 7, 9], batch_size=4)
    kept = json.loads(json.dumps(asdict(score), allow_nan=False))
    assert {"acc", "f1", "mcc", "brier_score"} == set(kept["metrics"]) == set(kept["answers"][0]["metrics"])
    assert score.stderrs["acc"] is not None and score.stderrs["f1"] is None
    gold, said = zip(*(answer["metrics"]["f1"] for answer in kept["answers"]), strict=True)
    true = sum(a == b == 1 for a, b in zip(gold, said, strict=True))
    assert kept["metrics"]["f1"] == pytest.approx(2 * true / (sum(gold) + sum(said)) if true else 0)


def _sample(number: Any, **metrics: Any) -> dict[str, Any]:
    row = {"doc_id": number, "doc_hash": "x", "filter": "none", "filtered_resps": [(np.float32(-1.5), np.bool_(True))]}
    return {**row, "metrics": list(metrics), **metrics}


def test_numbers_of_numpy_count_as_numbers() -> None:
    samples = [_sample(np.int64(i), exact_match=np.int64(i % 2), other=np.float64("nan"), words={i}) for i in range(4)]
    score = harness._score({"exact_match,none": np.float32(0.5), "other,none": np.nan, "alias": "x"}, samples, "mine")
    assert (score.headline, score.metrics) == ("exact_match", {"exact_match": 0.5})
    assert score.stderrs["exact_match"] == pytest.approx(math.sqrt(1 / 3) / 2)
    assert score.answers[1].metrics == {"exact_match": 1, "other": None, "words": [1]}
    assert score.answers[1].responses == [[-1.5, True]]
    json.dumps(asdict(score), allow_nan=False)


def test_a_task_whose_figure_is_nan_or_missing_is_an_error() -> None:
    with pytest.raises(NumericalError, match="acc of mine is nan, expected a finite number"):
        harness._score({"acc,none": math.nan, "f1,none": 0.1}, [_sample(0, acc=0.0)], "mine")
    with pytest.raises(DataError, match="lm-eval gives no number for mine"):
        harness._score({"alias": "x", "sample_len": 4}, [_sample(0)], "mine")
