"""Caches the calibration windows of one text, with a checksum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ara.data.chat import default_template, special_tokens
from ara.data.chat_windows import conversation_windows
from ara.data.conversations import Conversations, require_template
from ara.data.texts import Documents
from ara.data.tokens import TokenWindows, calibration_windows, check_sizes, checked, windows_digest
from ara.errors import disk_errors
from ara.files import is_plain_file
from ara.models.vocabulary import has_row
from ara.progress import SILENT, Reporter
from ara.workspace.tensors import written_aside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Part of every cache key. Increase it when the same inputs would give other windows.
CACHE_FORMAT = 1


def cached_calibration_windows(
    cache_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    text: Documents | Conversations,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    rows: int | None = None,
    report: Reporter = SILENT,
) -> TokenWindows:
    """Return the calibration windows of one text, from ``<cache_dir>/<key>.safetensors`` if it exists.

    The file holds int32 ids, uint8 answers of conversations, and their digest. A damaged file is reported and replaced.
    Arguments and windows are those of :func:`ara.data.tokens.calibration_windows` and
    :func:`ara.data.chat_windows.conversation_windows`.

    Raises:
        UsageError, DataError, ModelError: as of these.
        DiskFullError: no room for the cache.
    """
    check_sizes(samples, seq_len)
    if isinstance(text, Conversations):
        require_template(tokenizer, text.name)
    elif _eos_left_out(tokenizer, rows):
        report.warn(
            f"the model's embedding has {rows:,} rows, none for {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}), "
            "the separator of documents: they are joined without it"
        )
    key = cache_key(text, tokenizer, samples=samples, seq_len=seq_len, seed=seed, rows=rows)
    path = cache_dir / f"{key}.safetensors"
    if path.exists():
        try:
            windows = _read_cache(path, text, samples, seq_len, seed)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            report.warn(f"discarding the damaged token cache {path} ({error})")
        else:
            report.fact(f"{windows.windows} windows of {seq_len} tokens read from {path}")
            return checked(windows, text, tokenizer, rows)
    sizes = {"samples": samples, "seq_len": seq_len, "seed": seed}
    if isinstance(text, Conversations):
        windows = conversation_windows(text, tokenizer, **sizes, rows=rows)
    else:
        windows = calibration_windows(text, tokenizer, **sizes, rows=rows)
    _write_cache(path, windows)
    return windows


def cache_key(
    text: Documents | Conversations,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    rows: int | None = None,
) -> str:
    """Return the sha256 (hex) over everything that determines the calibration windows."""
    parts: list[Any] = [CACHE_FORMAT, text.digest, tokenizer_fingerprint(tokenizer), samples, seq_len, seed]
    if isinstance(text, Conversations):
        parts += ["conversations", default_template(tokenizer), special_tokens(tokenizer)]
    elif _eos_left_out(tokenizer, rows):
        parts.append("eos left out")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sha256 (hex) that differs between tokenizers that may give different ids.

    It covers the serialised pipeline of a fast tokenizer, without the padding and truncation settings, which each call
    overwrites. Of a slow one it covers class and vocabulary. The ids of bos, eos and unk are included.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline = json.loads(backend.to_str())
        content = {name: pipeline[name] for name in pipeline if name not in ("padding", "truncation")}
    else:
        content = {"class": type(tokenizer).__name__, "vocab": sorted(tokenizer.get_vocab().items())}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256(json.dumps([content, special], sort_keys=True).encode()).hexdigest()


def _eos_left_out(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> bool:
    """Tell whether the embedding has no row for the separator of documents."""
    return tokenizer.eos_token_id is not None and not has_row(tokenizer.eos_token_id, rows)


def _read_cache(path: Path, text: Documents | Conversations, asked: int, seq_len: int, seed: int) -> TokenWindows:
    """Read a cache file; raises a ValueError or an error of safetensors if it is damaged."""
    if not is_plain_file(path):  # opening a pipe would block
        raise ValueError("it is not a regular file")
    with safe_open(path, framework="pt") as file:
        expected = (file.metadata() or {})["digest"]
        ids = file.get_tensor("ids").to(torch.int64)
        answers = file.get_tensor("answers").to(torch.bool) if isinstance(text, Conversations) else None
    if windows_digest(ids, answers) != expected:
        raise ValueError("its ids do not match their checksum")
    if ids.ndim != 2 or ids.shape[1] != seq_len:
        raise ValueError(f"its windows have shape {tuple(ids.shape)}")
    sources = torch.zeros(len(ids), dtype=torch.int64)
    return TokenWindows(ids, asked, seed, expected, (text.name,), sources, answers)


def _write_cache(path: Path, windows: TokenWindows) -> None:
    tensors = {"ids": windows.ids.to(torch.int32)}
    if windows.answers is not None:
        tensors["answers"] = windows.answers.to(torch.uint8)
    with disk_errors(path.parent, windows.tokens * 4), written_aside(path) as aside:
        save_file(tensors, aside, metadata={"digest": windows.digest})
