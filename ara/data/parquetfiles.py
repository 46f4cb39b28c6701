"""Reads a column of texts or lists from a Parquet file with pyarrow, a requirement of ``datasets``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ara.data import packed
from ara.errors import DataError, near_matches

PARQUET_MAGIC = b"PAR1"
PARQUET_SUFFIXES = (".parquet", ".pq")
# Rows that are unpacked at once. Equal rows are packed very densely, so larger batches could exhaust the memory.
_ROWS = 64
# Most columns that an error lists.
_SHOWN = 12


@dataclass(frozen=True)
class Kind:
    """What a column must hold.

    Attributes:
        one: name of one value.
        many: name of several values.
        fits: tells whether a type of pyarrow is one of them.
    """

    one: str
    many: str
    fits: Callable[[Any], bool]


def is_text(kind: Any) -> bool:
    """Tell whether a type of pyarrow is text."""
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)) or (
        types.is_dictionary(kind) and is_text(kind.value_type)
    )


def is_list(kind: Any) -> bool:
    """Tell whether a type of pyarrow is a list."""
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind))


TEXT = Kind("string", "text", is_text)
LIST = Kind("list", "list", is_list)


def read_parquet(path: Path, file: BinaryIO, field: str, kind: Kind = TEXT) -> list[Any]:
    """Return the values of the column ``field``.

    Args:
        path: the file, for errors.
        file: positioned at the start.
        field: name of the column.
        kind: what it must hold: strings by default.

    Raises:
        DataError: the file is damaged or too large, or the column is missing, of another type, or has a null.
    """
    import pyarrow

    try:
        return _read(path, file, field, kind)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, column {field!r}: not UTF-8 text ({error.reason})", "store it as strings") from error
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} cannot be read as Parquet: {reason}", "it may be incomplete: write it again"
        ) from error


def _read(path: Path, file: BinaryIO, field: str, kind: Kind) -> list[Any]:
    from pyarrow import parquet

    parquet_file = parquet.ParquetFile(file)
    _check_column(path, parquet_file.schema_arrow, field, kind)
    values: list[Any] = []
    size = 0
    for batch in parquet_file.iter_batches(batch_size=_ROWS, columns=[field]):
        size += batch.nbytes
        if size > packed.MAX_TEXT_BYTES:
            raise packed.too_large(path, "holds")
        column = batch.column(0)
        if column.null_count:
            row = len(values) + column.to_pylist().index(None) + 1
            raise DataError(
                f"{path}, row {row}: column {field!r} is null, expected a {kind.one}", "remove such rows from the file"
            )
        values += column.to_pylist()
    return values


def _check_column(path: Path, schema: Any, field: str, kind: Kind) -> None:
    """Refuse a column that is missing, duplicated or of another kind; the error lists the columns of this kind."""
    fitting = [column.name for column in schema if kind.fits(column.type)]
    listed = ", ".join(repr(name) for name in fitting[:_SHOWN]) or "none"
    hint = f"{near_matches(field, fitting)}{kind.many} columns: {listed}; choose one with PATH#COLUMN"
    count = schema.names.count(field)
    if count != 1:
        raise DataError(f"{path} has {'no' if count == 0 else count} column{'s' if count else ''} {field!r}", hint)
    found = schema.field(field).type
    if not kind.fits(found):
        raise DataError(f"{path}: column {field!r} holds {str(found)[:40]}, expected {kind.one}s", hint)
