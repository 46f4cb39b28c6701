"""The page says what report.json says, shows all text as text, and needs nothing from anywhere."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from ara.reporting.gather import gather
from ara.reporting.html import MARK, page
from tests.reported import EVIL, NAME, allocation, bare, sources, training

# What a figure may be multiplied by before it is shown: per cent, milliseconds, MiB, thousand millions.
SCALES = (1.0, 100.0, 1000.0, 2.0**-20, 1e-9)


class Reader(HTMLParser):
    """Takes a page apart."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.headings, self.figures = Counter(), [], [], []
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += [(tag, *attribute) for attribute in attributes]
        self._open.append((tag, dict(attributes)))

    def handle_data(self, data):
        tag, attributes = self._open[-1] if self._open else ("", {})
        if tag == "h2":
            self.headings.append(data)
        if tag == "data":
            self.figures.append((float(attributes["value"]), data))

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass


def numbers(value):
    """Yield all numbers of a JSON document."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


@pytest.fixture(scope="module")
def report():
    return gather(sources())


@pytest.fixture(scope="module")
def text(report):
    return page(report)


def test_every_figure_of_the_page_is_in_the_json(report, text):
    known = set(numbers(json.loads(report.model_dump_json())))
    shown = Reader(text).figures
    assert len(shown) > 200
    assert {value for value, _ in shown} <= known


def test_what_is_shown_is_the_figure(text):
    for value, words in Reader(text).figures:
        shown = re.match(r"(?:≈ )?-?[+]?([\d,]+\.?\d*(?:e[-+]\d+)?)", words)
        if "/" in words:  # least, mean and largest rank
            shown = re.search(r"/ (\d+) /", words)
        digits = shown[1].replace(",", "")
        unit = 10.0 ** -len(digits.partition("e")[0].partition(".")[2])
        if "e" in digits:
            unit *= 10.0 ** int(digits.partition("e")[2])
        assert any(abs(float(digits) - abs(value) * scale) <= 0.5001 * unit for scale in SCALES), (value, words)


def test_every_figure_of_quality_and_speed_is_on_the_page(report, text):
    shown = {value for value, _ in Reader(text).figures}
    for evaluation in report.evaluations:
        for result in evaluation.texts:
            assert {row.perplexity for row in result.models.values()} <= shown
            assert {row.kl for row in result.models.values() if row.kl is not None} <= shown
        for task in evaluation.harness:
            assert {row.value for row in task.models.values()} <= shown
    for bench in report.benches:
        for case in bench.cases:
            assert {row.ratio.median for row in case.models.values()} <= shown
            assert {row.macs for row in case.models.values()} <= shown
            assert {row.bytes_read for row in case.models.values()} <= shown
    assert {layer.keep for layer in report.layers} | {layer.left for layer in report.layers} <= shown
    assert {curve.held_out for curve in report.training.curves} <= shown


@pytest.mark.parametrize(("threads", "words"), [(1, "1 thread;"), (2, "2 threads;")])
def test_the_page_says_where_speeds_were_measured(report, threads, words):
    benches = tuple(bench.model_copy(update={"threads": threads}) for bench in report.benches)
    text = page(report.model_copy(update={"benches": benches}))
    assert f">torch, cpu, bfloat16, {words} Linux x86_64, A &amp; B, 2 cores, 24 GiB; models run in turn" in text
    old = tuple(bench.model_copy(update={"machine": {}}) for bench in benches)
    text = page(report.model_copy(update={"benches": old}))
    assert f"{words} the machine was not recorded; models run" in text and "A &amp; B" not in text


def test_verdict_title_and_commands_are_there(report, text):
    plain = unescape(text)
    assert report.verdict in plain and text.count(report.title) == 2
    for work in report.work:
        assert work.command in plain
    assert re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)[0].count("\n") == len(report.work)


def test_text_is_text(text):
    reader = Reader(text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;bold&lt;/b&gt;" in text
    assert EVIL not in text and "1 &lt; 2 &amp;" in text
    assert "<b>uniform</b>(empty)" in text
    assert not set(reader.tags) & {"script", "iframe", "img", "link", "object", "embed", "form", "input", "base"}
    assert reader.tags["b"] == 3  # the names of the models of the one continuation


@pytest.mark.parametrize("field", ["name", "architecture", "revision", "requested"])
def test_the_model_cannot_write_into_the_page(report, field):
    evil = report.base.model_copy(update={field: f'{EVIL}" onload="x'})
    text = page(report.model_copy(update={"base": evil, "title": EVIL, "verdict": EVIL}))
    assert EVIL not in text
    assert not [name for _, name, _ in Reader(text).attributes if name.startswith("on")]


def test_the_page_is_alone(text):
    reader = Reader(text)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("meta", "content", policy) in reader.attributes
    assert MARK in text[:2000]
    links = {value for _, name, value in reader.attributes if name in ("href", "src", "xlink:href")}
    far = {link for link in links if not link.startswith(("#", "data:image/png;base64,"))}
    assert far == {"https://arxiv.org/abs/2510.19389"}
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_names_are_unique_and_found(text):
    reader = Reader(text)
    names = Counter(value for _, name, value in reader.attributes if name == "id")
    assert [name for name, count in names.items() if count > 1] == []
    used = re.findall(r'(?:href="|url\()#([^")]+)', text)
    assert used and set(used) <= set(names)


def test_pictures_are_whole_and_in_the_colours_of_the_page(text):
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 6
    for picture in pictures:
        root = ElementTree.fromstring(picture.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1))
        assert root.get("role") == "img" and root.get("aria-label") and root.get("viewBox")
        assert root.get("width") is None
        assert "<style" not in picture and "#0102" not in picture and "currentColor" in picture
        tags = "".join(re.findall(r"<[^>]*>", picture))
        assert not re.search(r"\d\.\d{3,}", re.sub(r'id="[^"]*"', "", tags))
    words = {unescape(word) for word in re.findall(r"<text[^>]*>([^<]+)</text>", pictures[0])}
    assert {"ara", "uniform", "dense", "this checkpoint", "perplexity", "60%"} <= words


def test_numbers_in_words_are_not_rounded(report):
    front = report.fronts[0]
    points = tuple(point.model_copy(update={"series": "keep 0.725, 0.001 > 0"}) for point in front.points)
    text = page(report.model_copy(update={"fronts": (front.model_copy(update={"points": points}),)}))
    assert ">keep 0.725, 0.001 &gt; 0<" in text


def test_the_same_report_gives_the_same_page(report, text):
    assert page(report) == text


def test_sections_appear_with_their_figures(text):
    assert Reader(text).headings == [
        "Size", "Perplexity", "Chat", "Zero-shot tasks", "Speed and memory", "Ranks", "Spectra", "Training",
        "Allocators compared", "Exports", "Continuations", "Reproduce",
    ]  # fmt: skip


def test_without_measurements_the_page_says_what_to_do():
    text = page(gather(bare()))
    assert Reader(text).headings == ["Size", "Ranks", "Spectra", "Reproduce", "Not in this report"]
    assert "ara eval --tasks wikitext2 --checkpoint ara-0.80" in text
    assert set(re.findall(r'href="#([a-z-]+)">[A-Z]', text)) == {"size", "ranks", "spectra", "reproduce", "missing"}


def test_one_checkpoint_of_dense_layers_and_dollars(report):
    """What pictures must stand: no cut at all, one budget, a name that looks like mathematics."""
    dense = tuple(replace(layer, rank=None, left=0.0) for layer in report.layers[:1])
    front = report.fronts[0]
    points = tuple(point.model_copy(update={"series": "$a_b"}) for point in front.points)
    fronts = (front.model_copy(update={"points": points}),)
    text = page(report.model_copy(update={"layers": dense, "fronts": fronts}))
    assert "$a_b" in text


def test_a_task_that_counts_no_right_answers_is_no_share(report):
    (evaluation,) = report.evaluations
    rows = {
        name: row.model_copy(update={"value": 12.346, "stderr": None})
        for name, row in evaluation.harness[0].models.items()
    }
    harness = (evaluation.harness[0].model_copy(update={"models": rows, "metric": "word_perplexity"}),)
    text = page(report.model_copy(update={"evaluations": (evaluation.model_copy(update={"harness": harness}),)}))
    assert text.count(">12.35</data>") == 3


def test_accuracy_is_compared_with_dense_and_uniform_and_noise_is_marked(report):
    from ara.reporting.tables import harness_table

    (evaluation,) = report.evaluations
    first = evaluation.harness[0]
    noisy = first.compared["uniform"].model_copy(update={"p": 0.07})
    changed = first.model_copy(update={"compared": {**first.compared, "uniform": noisy}})
    table = harness_table(evaluation.model_copy(update={"harness": (changed, *evaluation.harness[1:])}))
    assert table.columns[-3:] == ("kept of dense", f"{NAME} − dense (p)", f"{NAME} − uniform (p)")
    rows = [[cell.text for cell in row[-3:]] for row in table.rows]
    assert rows[0] == ["93.4%", "-4.0% (0.012)", "≈ +9.0% (0.07)"]
    assert rows[1] == ["93.4%", "–", "–"]
    assert rows[-1] == ["93.4%", "-4.0% (0.012)", "+9.0% (0.0001)"]


def test_a_training_that_was_stopped_at_once_is_drawn():
    results = training().results
    short = {**results, "log": {"0.8": results["log"]["0.8"][:1], "0.6": []}}
    text = page(gather(sources(training=training().model_copy(update={"results": short}))))
    assert "held-out loss" in text


@pytest.mark.parametrize(("keep", "marked"), [(0.8, 1), (0.7, 0)])
def test_the_allocator_is_marked_where_the_budget_is_the_same(keep, marked):
    from ara.reporting.tables import comparison_table

    report = gather(sources())
    budget = report.allocation.model_copy(update={"keep": keep})
    assert (comparison_table(report.comparisons[0], budget).marked is not None) == bool(marked)
    assert allocation().name == NAME


def test_characters_that_steer_are_nowhere_on_the_page(report):
    """Not in texts, not in attributes, not in pictures, which would not even be XML."""
    name = "a\x1b[31m\u202eb\u200f\x00"
    fronts = tuple(
        front.model_copy(update={"points": tuple(p.model_copy(update={"series": name}) for p in front.points)})
        for front in report.fronts
    )
    evaluations = tuple(
        evaluation.model_copy(
            update={
                "name": name,
                "continuations": tuple(
                    replace(told, prompt=name, models={name: name}) for told in evaluation.continuations
                ),
            }
        )
        for evaluation in report.evaluations
    )
    assert fronts and evaluations
    text = page(report.model_copy(update={"title": name, "fronts": fronts, "evaluations": evaluations}))
    assert text.count("a\ufffd[31m\ufffdb\ufffd\ufffd") > 4 + len(fronts)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", text)
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(picture.replace("xlink:", ""))
