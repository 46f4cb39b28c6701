"""Upper and lower bounds of settings, the check of text settings, and how a refused value is shown.

The bounds lie far beyond every use, but low enough that nothing overflows or runs out of memory. A setting outside them
is a typing error, and is refused before any work begins.
"""

from __future__ import annotations

from typing import Any

# Tokens of a window, a prompt or an answer; the longest context of a published model has 10 million.
MAX_TOKENS = 2**24
# Windows to read: at 512 tokens each, more text than any calibration set has.
MAX_WINDOWS = 10**6
# First N windows or questions: no text or task has as many.
MAX_COUNT = 10**9
# Rows of a batch.
MAX_BATCH = 2**16
# Training steps.
MAX_STEPS = 10**6
# A rank is at most the smaller side of a layer; the widest published ones (vocabulary heads) have about 2**18 rows.
MAX_RANK = 2**20
# Atoms of a mask; each costs every layer a row of memory.
MAX_ATOMS = 2**16
# Every generator takes seeds below this one.
SEED_LIMIT = 2**31
# Measurements of one case; more of them narrow no range that matters.
MAX_ROUNDS = 10**4
# Threads: the largest machines that Linux runs on have 8,192 processors.
MAX_THREADS = 2**16
# Lengths and batch sizes of a benchmark; each is one case.
MAX_CASES = 1000
# Prompts that every model continues.
MAX_CONTINUATIONS = 10**4
# GiB of memory: from one byte to a petabyte.
MIN_GIB, MAX_GIB = 2.0**-30, 2.0**20
# Bits per parameter: a model in float64 has 64.
MAX_BITS = 64
# Bytes of a safetensors file, or of all files of a checkpoint.
MIN_SHARD_BYTES, MAX_SHARD_BYTES = 1000, 10**15
# Weights of losses: a loss of some thousand nats times this fits into float32.
MAX_WEIGHT = 1e9
# Learning rates: Adam moves a parameter by about this much per step.
MIN_RATE, MAX_RATE = 1e-12, 1e6
# Temperatures and slopes: scores of some thousand nats, divided or multiplied by these, fit into float32.
MIN_SLOPE, MAX_SLOPE = 1e-6, 1e6
# Logits: beyond this, a sigmoid in float32 is 0 or 1 and has no gradient.
MAX_LOGIT = 80.0
# Characters shown of a refused value.
_SHOWN = 100


def shown(value: Any, quoted: bool = True) -> str:
    """Return the beginning of a refused value, on one line."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a number of thousands of digits"
    if not quoted:
        text = text[1:-1]
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def check_text(value: Any) -> None:
    """Refuse text, also inside collections, that file names and manifests cannot hold; raises ``ValueError``."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("a null character cannot be used")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("it is not valid UTF-8") from None
    elif isinstance(value, dict):
        check_text([*value, *value.values()])
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            check_text(item)
