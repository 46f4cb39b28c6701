"""Calibration and evaluation texts, by name or ``file:PATH``.

``c4`` and ``wikitext2`` are read from ``$ARA_DATA_DIR`` if it is set, else from the Hugging Face hub. ``python-docs``
comes with Python. A source is never replaced by another one: results on different texts cannot be compared.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ara.data.filespecs import CHAT_PREFIX, FILE_PREFIX, check_text_file, is_file, origin_of, text_file
from ara.data.textfiles import DEFAULT_FIELD, read_file, read_jsonl, read_lists
from ara.errors import DataError, UsageError
from ara.files import expand_user
from ara.progress import SILENT, Reporter
from ara.registry import Entry, Registry

Purpose = Literal["calibration", "evaluation"]

DATA_DIR_VARIABLE = "ARA_DATA_DIR"
# GPTQ's evaluation, and those of SVD-LLM and others, join the rows of WikiText-2 with it.
SEPARATOR = "\n\n"
# Share of the characters of python-docs used for calibration; the rest is for evaluation.
_PYTHON_DOCS_CALIBRATION = 0.85
# The first line of a WikiText article is " = Robert Boulter = \n"; that of a section is " = = Life = = \n".
_ARTICLE_HEADING = re.compile(r" = [^=].*[^=] = \n?")

_CONVERSATIONS = "ara.data.conversations:"
TEXTS = Registry(
    "text",
    [
        Entry("c4", "web pages of the Colossal Clean Crawled Corpus", "ara.data.texts:load_c4", "arXiv 1910.10683"),
        Entry("wikitext2", "Wikipedia articles, raw", "ara.data.texts:load_wikitext2", "arXiv 1609.07843"),
        Entry("python-docs", "Python's own help topics; needs no network", "ara.data.texts:load_python_docs"),
        Entry("chat", "conversations: instructions of $ARA_DATA_DIR, else ultrachat", f"{_CONVERSATIONS}load_chat"),
        Entry("ultrachat", "conversations between two models", f"{_CONVERSATIONS}load_ultrachat", "arXiv 2305.14233"),
    ],
)


@dataclass(frozen=True)
class Documents:
    """A loaded text.

    Attributes:
        name: the name or ``file:PATH`` that was asked for.
        purpose: calibration or evaluation.
        documents: the texts, in the order of the source; for evaluation of wikitext2 its rows, with the empty ones.
        separator: joins two documents.
        origin: where they come from, in words.
        digest: sha256 (hex) over the documents and their lengths.
    """

    name: str
    purpose: Purpose
    documents: tuple[str, ...]
    separator: str
    origin: str
    digest: str


@dataclass(frozen=True)
class Part:
    """Where to find one part of a data set, such as a split.

    Attributes:
        local: file below ``$ARA_DATA_DIR``.
        hub: data set id on the Hugging Face hub.
        config: its configuration, or ``None``.
        data_file: the one shard to read, or ``None`` for all.
        split: its split.
        limit: number of rows taken from the front, or ``None`` for all.
        field: of a row. Values of the field ``text`` are texts, those of other fields are lists.
    """

    local: str
    hub: str
    config: str | None
    data_file: str | None
    split: str
    limit: int | None
    field: str = DEFAULT_FIELD


# C4: GPTQ and SVD-LLM calibrate on this shard; 10,000 of its 356,317 documents hold about 5 million tokens, which is
# more than enough. The 1,100 validation documents are those of GPTQ, which joins them by spaces and stops after 256
# windows. So perplexities on C4 are only comparable with other results of ARA.
_C4: dict[Purpose, Part] = {
    "calibration": Part(
        "c4_sample/c4_rp1.jsonl", "allenai/c4", None, "en/c4-train.00000-of-01024.json.gz", "train", 10_000
    ),
    "evaluation": Part(
        "c4_sample/c4_rp2.jsonl", "allenai/c4", None, "en/c4-validation.00000-of-00008.json.gz", "validation", 1_100
    ),
}
_WIKITEXT2: dict[Purpose, Part] = {
    "calibration": Part(
        "wikitext2_raw/train_first_1MB.jsonl", "Salesforce/wikitext", "wikitext-2-raw-v1", None, "train", None
    ),
    "evaluation": Part("wikitext2_raw/test.jsonl", "Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", None),
}


def check_text_spec(spec: str) -> None:
    """Check the name of one text, or that the file of ``file:PATH`` or ``chat:PATH`` exists, without loading it.

    Raises:
        UsageError: the name is unknown or the path is empty.
        DataError: the file is missing or not regular.
    """
    if is_file(spec):
        check_text_file(spec)
    elif spec not in TEXTS:
        try:
            TEXTS.entry(spec)
        except UsageError as error:
            hint = (
                "for your own text write file:PATH (.txt: one document; .jsonl, .parquet: a field 'text'), "
                "for your own conversations chat:PATH (a field 'messages')"
            )
            raise UsageError(str(error), hint) from None


def is_chat(spec: str) -> bool:
    """Tell whether ``spec`` names one text that holds conversations."""
    return spec.startswith(CHAT_PREFIX) or (spec in TEXTS and TEXTS.entry(spec).target.startswith(_CONVERSATIONS))


def load_documents(spec: str, purpose: Purpose, *, report: Reporter = SILENT) -> Documents:
    """Load the plain text ``spec`` for ``purpose``; :func:`ara.data.conversations.load_conversations` loads others.

    The calibration and evaluation parts of a named text share no document. ``file:PATH`` gives the same documents for
    both: one per JSON line or Parquet row; a ``.txt`` file is one document, so ``seed`` does not change its windows.

    Raises:
        UsageError: unknown name, or a text of conversations.
        DataError: a file is missing, empty or malformed, or the hub cannot be reached.
    """
    check_text_spec(spec)
    if is_chat(spec):
        raise UsageError(
            f"text {spec!r} holds conversations, expected plain text", "choose c4, wikitext2, python-docs or file:PATH"
        )
    if spec.startswith(FILE_PREFIX):
        file = text_file(spec)
        return _documents(spec, purpose, read_file(file.path, file.field), origin_of(file))
    documents: Documents = TEXTS.load(spec)(purpose, report)
    return documents


def load_c4(purpose: Purpose, report: Reporter = SILENT) -> Documents:
    """Load C4; of local files, the evaluation omits documents that are also in the calibration part."""
    texts, origin = read_part("c4", purpose, _C4[purpose], report)
    if purpose == "evaluation" and data_dir() is not None:
        # The splits on the hub are disjoint by construction; two local files may overlap.
        seen = {text.strip() for text in read_part("c4", "calibration", _C4["calibration"], report)[0]}
        kept = [text for text in texts if text.strip() not in seen]
        if len(kept) < len(texts):
            origin += f" ({len(texts) - len(kept)} documents that also occur in the calibration text left out)"
            if not kept:
                raise DataError(
                    f"text 'c4' (evaluation), {origin}: nothing is left", "put other documents in that file"
                )
        texts = kept
    return _documents("c4", purpose, texts, origin)


def load_wikitext2(purpose: Purpose, report: Reporter = SILENT) -> Documents:
    """Load WikiText-2: whole articles of the training split, or the unchanged rows of the test split."""
    rows, origin = read_part("wikitext2", purpose, _WIKITEXT2[purpose], report)
    return _documents("wikitext2", purpose, rows if purpose == "evaluation" else _articles(rows), origin)


def load_python_docs(purpose: Purpose, report: Reporter = SILENT) -> Documents:
    """Load Python's help topics, sorted by name: the first ones for calibration, the rest for evaluation.

    Raises:
        DataError: this Python was built without ``pydoc_data``.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "text 'python-docs' needs the module pydoc_data.topics, which this Python lacks",
            "install your system's full Python package, or use file:PATH",
        ) from error
    texts = [topics[name] for name in sorted(topics)]
    ends = itertools.accumulate(len(text) for text in texts)
    front = sum(end <= _PYTHON_DOCS_CALIBRATION * sum(map(len, texts)) for end in ends)
    chosen = texts[:front] if purpose == "calibration" else texts[front:]
    which = "first" if purpose == "calibration" else "last"
    origin = f"the {which} {len(chosen)} of {len(texts)} help topics of Python {platform.python_version()}"
    return _documents("python-docs", purpose, chosen, origin)


def _articles(rows: Iterable[str]) -> list[str]:
    """Join WikiText rows to articles, so that whole articles are shuffled instead of paragraphs."""
    articles: list[list[str]] = []
    for row in rows:
        if not articles or _ARTICLE_HEADING.fullmatch(row):
            articles.append([])
        articles[-1].append(row)
    return [SEPARATOR.join(article) for article in articles]


def _documents(name: str, purpose: Purpose, texts: list[str], origin: str) -> Documents:
    """Wrap ``texts``; calibration drops blank ones, evaluation keeps them to join the rows as published."""
    if purpose == "calibration":
        texts = [text for text in texts if text.strip()]
    if not any(text.strip() for text in texts):
        raise DataError(f"text {name!r} ({purpose}) is empty: {origin}", "it must hold at least one line of text")
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return Documents(name, purpose, tuple(texts), SEPARATOR, origin, digest.hexdigest())


def data_dir() -> Path | None:
    """Return the folder that ``$ARA_DATA_DIR`` names, or ``None``.

    Raises:
        UsageError: the home folder in it is unknown.
    """
    folder = os.environ.get(DATA_DIR_VARIABLE)
    return expand_user(folder, DATA_DIR_VARIABLE) if folder else None


def read_part(name: str, purpose: Purpose, part: Part, report: Reporter) -> tuple[list[Any], str]:
    """Return the texts of ``part``, or place and value of its lists; and where they come from, in words."""
    folder = data_dir()
    if folder is None:
        return _read_hub(name, part, report)
    path = folder / part.local
    if not path.is_file():
        other = "use python-docs, which needs no files"
        if part.field != DEFAULT_FIELD:
            other = "choose a text without conversations, such as --text c4"
        raise DataError(
            f"text {name!r} ({purpose}): no file {path} ({DATA_DIR_VARIABLE} is {folder})",
            f"put it there, or unset {DATA_DIR_VARIABLE} to fetch {part.hub} from the hub, or {other}",
        )
    rows: list[Any] = read_jsonl(path) if part.field == DEFAULT_FIELD else read_lists(path, part.field)
    return rows, f"file {path.resolve()}"


def _read_hub(name: str, part: Part, report: Reporter) -> tuple[list[Any], str]:
    """Fetch ``part`` with Hugging Face ``datasets``; a front is streamed, so that only it is downloaded."""
    import datasets

    where = "/".join(word for word in (part.hub, part.config, part.data_file) if word)
    front = f", first {part.limit:,} documents" if part.limit else ""
    report.step(f"Fetching {where} ({part.split} split{front}) from the Hugging Face hub")
    files = {part.split: part.data_file} if part.data_file else None
    try:
        with silence_datasets():
            rows = datasets.load_dataset(
                part.hub, part.config, data_files=files, split=part.split, streaming=part.limit is not None
            )
        with report.bar(f"{name} rows", part.limit or len(rows)) as bar:
            found: list[Any] = []
            for number, row in enumerate(itertools.islice(rows, part.limit), start=1):
                value = row[part.field]
                found.append(value if part.field == DEFAULT_FIELD else (f"{where}, row {number}", value))
                bar.advance()
    except Exception as error:  # the errors of datasets, huggingface_hub, httpx, aiohttp and fsspec share no base
        raise DataError(
            f"text {name!r}: {where} cannot be fetched from the Hugging Face hub ({type(error).__name__}: {error})",
            f"set {DATA_DIR_VARIABLE} to a folder with {part.local}, "
            "or use python-docs, which needs no network, or file:PATH",
        ) from error
    return found, f"Hugging Face hub {where}, {part.split} split{front}"


@contextmanager
def silence_datasets() -> Iterator[None]:
    """Hide the progress bars of datasets and the hub inside the block; only the console prints."""
    import datasets
    from huggingface_hub import utils as hub

    datasets_bars, hub_bars = datasets.are_progress_bars_disabled(), hub.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        if not datasets_bars:
            datasets.enable_progress_bars()
        if not hub_bars:
            hub.enable_progress_bars()
