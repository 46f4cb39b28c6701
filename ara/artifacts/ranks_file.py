"""``ranks.json``: an allocation as plain JSON, which users can edit and pass to ``--ranks``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from ara import jsonfile
from ara.artifacts.base import Rank
from ara.config.sizes import Block, GridConfig
from ara.errors import DataError, ProblemsError, near_matches
from ara.layout_names import DEFAULT_LAYOUT, LAYOUT_NAMES, LayoutName
from ara.layouts.grid import BITS, Bits
from ara.models.weights import LinearSpec
from ara.solver.problem import DENSE, Allocation, Choice

# Format 2 has a table of bits, or those of the embedding; format 3 has a table of blocks as well. Format 4 names the
# block of all other layers, or says that there are no zero points.
RANKS_FORMAT, WITH_BITS, WITH_BLOCKS, WITH_GRID = 1, 2, 3, 4
RANKS_FILE = "ranks.json"
_KEYS = ("format_version", "layout", "about", "ranks", "bits", "embedding_bits", "blocks", "block", "zero_points")
_LENGTHS = ", ".join(map(str, get_args(Block)))
_COPY = "copy an allocation's ranks.json and edit its numbers"
# Limits of an error message: problems, and characters of a name or value.
_SHOWN_PROBLEMS, _SHOWN = 20, 100


@dataclass(frozen=True)
class FewBits:
    """What a ranks file says of few bits, besides those of each layer.

    Attributes:
        embedding: bits of the embedding and the head; ``None``: they stay as they are.
        block: weights per scale of what the table of blocks does not name; ``None``: the file does not say.
        zero_points: whether there is a zero point per block; ``None``: the file does not say.
    """

    embedding: Bits | None = None
    block: int | None = None
    zero_points: bool | None = None

    def plain(self) -> dict[str, Any]:
        """Return block and zero points as JSON data, without those that ``ara quantise`` has by default."""
        defaults = {key: GridConfig.model_fields[key].default for key in ("block", "zero_points")}
        return {key: value for key, own in defaults.items() if (value := getattr(self, key)) not in (None, own)}


def ranks_table(allocation: Allocation) -> dict[str, Rank]:
    """Return an allocation as JSON data: module path → rank or ``"dense"``."""
    return {name: "dense" if rank is None else rank for name, rank in allocation.ranks.items()}


def from_table(
    ranks: Mapping[str, Any],
    specs: Sequence[LinearSpec],
    bits: Mapping[str, int] | None = None,
    blocks: Mapping[str, int] | None = None,
) -> Allocation:
    """Return the allocation that :func:`ranks_table` describes, with costs in parameters.

    Args:
        ranks: one valid entry for each of ``specs``.
        specs: the layers.
        bits: module path → bits per weight; the others have those of the model.
        blocks: module path → weights per scale; the others are as the results of the allocation say.
    """

    def choice(spec: LinearSpec) -> Choice:
        rank = None if ranks[spec.name] == DENSE else ranks[spec.name]
        found = Choice.of(spec, rank, bits=(bits or {}).get(spec.name))
        return replace(found, block=(blocks or {}).get(spec.name))

    return Allocation({spec.name: choice(spec) for spec in specs})


def ranks_document(
    allocation: Allocation,
    layout: LayoutName,
    about: Mapping[str, Any],
    specs: Sequence[LinearSpec],
    few: FewBits = FewBits(),
) -> str:
    """Return the text of ``ranks.json``.

    Args:
        allocation: to write.
        layout: of its low-rank layers.
        about: its origin; not read back.
        specs: the layers.
        few: bits of the embedding, and the grid of layers that the table of blocks does not name.
    """
    own = {spec.name: spec.bits for spec in specs}
    bits = {name: choice.bits for name, choice in allocation.choices.items() if choice.bits != own[name]}
    tables: dict[str, Any] = {"bits": bits} if bits else {}
    if few.embedding is not None:
        tables["embedding_bits"] = few.embedding
    version = WITH_BITS if tables else RANKS_FORMAT
    blocks = {name: one.block for name, one in allocation.choices.items() if one.block not in (None, few.block)}
    if blocks:
        tables["blocks"], version = blocks, WITH_BLOCKS
    if tables and (grid := few.plain()):
        tables, version = tables | grid, WITH_GRID
    document: dict[str, Any] = {"format_version": version, "layout": layout}
    document |= {"about": about, "ranks": ranks_table(allocation), **tables}
    return json.dumps(document, indent=1) + "\n"


def read_layout(path: Path) -> LayoutName:
    """Return the layout that a ranks file names; ``factors`` if it names none.

    Raises:
        DataError: missing, not a ranks file, or an unknown layout.
    """
    layout = _read(path)[0].get("layout", DEFAULT_LAYOUT)
    if layout not in LAYOUT_NAMES:
        raise DataError(f"{path} has layout {_shown(layout)}, known are {', '.join(LAYOUT_NAMES)}", _COPY)
    found: LayoutName = layout
    return found


def read_few_bits(path: Path) -> FewBits:
    """Return what a ranks file says of few bits, besides those of each layer.

    Raises:
        DataError: missing, not a ranks file, or impossible bits, block or zero points.
    """
    return _few_bits(_read(path)[0], path)


def _few_bits(document: Mapping[str, Any], path: Path) -> FewBits:
    """Return what a document says of few bits, after a check."""
    bits, block, zero_points = (document.get(key) for key in ("embedding_bits", "block", "zero_points"))
    if "embedding_bits" in document and (type(bits) is not int or bits not in BITS):
        raise DataError(f"{path} has embedding_bits {_shown(bits)}, expected 4 or 8, or none for 16 bits", _COPY)
    if "block" in document and (type(block) is not int or block not in get_args(Block)):
        raise DataError(f"{path} has block {_shown(block)}, expected one of {_LENGTHS}", _COPY)
    if "zero_points" in document and type(zero_points) is not bool:
        raise DataError(f"{path} has zero_points {_shown(zero_points)}, expected true or false", _COPY)
    return FewBits(bits, block, zero_points)


def read_ranks(path: Path, specs: Sequence[LinearSpec]) -> Allocation:
    """Read and validate a ranks file.

    Args:
        path: JSON with ``format_version`` and ``ranks``: module path → whole number or ``"dense"``.
        specs: the factorised layers, in the file's layout; the file must name exactly these.

    Raises:
        DataError: missing, not JSON of this form, or an impossible grid of few bits.
        ProblemsError: lists every unknown or missing module and every invalid rank.
    """
    document, repeated = _read(path)
    _few_bits(document, path)
    problems = [f"unknown key {_shown(key)}" for key in document if key not in _KEYS]
    problems += [f"{_plain(name)}: named more than once" for name in repeated]
    problems += _problems(document["ranks"], specs)
    bits = document.get("bits", {})
    blocks = document.get("blocks", {})
    problems += _bits_problems(bits, specs) + _blocks_problems(blocks, bits)
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        if more > 0:
            problems[_SHOWN_PROBLEMS:] = [f"and {more:,} more"]
        raise ProblemsError(f"{path} does not fit this model", problems)
    return from_table(document["ranks"], specs, bits, blocks)


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the document of a ranks file, and the names that occur in it more than once."""
    repeated: list[str] = []

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # JSON keeps the last of two equal names; an edit of the first one would be lost silently.
        counts = Counter(name for name, _ in pairs)
        repeated.extend(name for name, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        document = jsonfile.read(path, pairs=table)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", "--ranks wants a ranks.json file") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})", "--ranks wants a ranks.json file") from None
    if not isinstance(document, dict) or not isinstance(document.get("ranks"), dict):
        raise DataError(f'{path} has no "ranks" table', _COPY)
    version = document.get("format_version")
    if type(version) is not int or not RANKS_FORMAT <= version <= WITH_GRID:
        raise DataError(f"{path} has format_version {_shown(version)}, expected {RANKS_FORMAT} to {WITH_GRID}", _COPY)
    return document, repeated


def _problems(ranks: dict[str, Any], specs: Sequence[LinearSpec]) -> list[str]:
    known = {spec.name: spec for spec in specs}
    unknown = [name for name in ranks if name not in known]
    problems = [
        # The search for near matches is slow, so that it is limited to the problems shown.
        f"{_plain(name)}: not a factorised layer; {near_matches(name[:_SHOWN], known)}".rstrip("; ")
        for name in unknown[:_SHOWN_PROBLEMS]
    ]
    problems += [f"{_plain(name)}: not a factorised layer" for name in unknown[_SHOWN_PROBLEMS:]]
    problems += [f"{name}: missing" for name in known if name not in ranks]
    for name, spec in known.items():
        rank = ranks.get(name, DENSE)
        if rank == DENSE:
            continue
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            problems.append(f'{name}: {_shown(rank)} is neither a whole number of at least 1 nor "dense"')
        elif spec.lacks_ranks and rank > spec.stored_rank:
            problems.append(f"{name}: rank {_shown(rank)} is above {spec.stored_rank}, the largest one that is stored")
        elif rank > spec.top_rank:
            less = f" or at most {spec.top_rank}" if spec.top_rank else ""
            problems.append(f'{name}: rank {_shown(rank)} costs as much as the dense weight; write "dense"{less}')
    return problems


def _bits_problems(bits: Any, specs: Sequence[LinearSpec]) -> list[str]:
    if not isinstance(bits, dict):
        return [f'"bits" is {_shown(bits)}, expected a table']
    known = {spec.name for spec in specs}
    problems = [f"bits of {_plain(name)}: not a factorised layer" for name in bits if name not in known]
    wrong = {name: value for name, value in bits.items() if type(value) is not int or value not in BITS}
    return problems + [f"bits of {_plain(name)}: {_shown(value)} is not 4 or 8" for name, value in wrong.items()]


def _blocks_problems(blocks: Any, bits: Any) -> list[str]:
    if not isinstance(blocks, dict):
        return [f'"blocks" is {_shown(blocks)}, expected a table']
    known = bits if isinstance(bits, dict) else {}
    problems = [f"block of {_plain(name)}: the layer has no few bits" for name in blocks if name not in known]
    wrong = {name: value for name, value in blocks.items() if type(value) is not int or value not in get_args(Block)}
    return problems + [
        f"block of {_plain(name)}: {_shown(value)} is none of {_LENGTHS}" for name, value in wrong.items()
    ]


def _shown(value: Any) -> str:
    """Return a value of the file in one line, shortened."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _plain(name: str) -> str:
    """Return a name of the file; a long name, or one with invisible characters, as :func:`_shown`."""
    return name if name.isprintable() and len(name) <= _SHOWN else _shown(name)
