"""Reads the text column of a Parquet file with pyarrow, a requirement of ``datasets``."""

from __future__ import annotations

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


def read_parquet(path: Path, file: BinaryIO, field: str) -> list[str]:
    """Return the strings of the column ``field``.

    Args:
        path: the file, for errors.
        file: positioned at the start.
        field: name of the column.

    Raises:
        DataError: the file is damaged or too large, or the column is missing, not text, or has a null.
    """
    import pyarrow

    try:
        return _read(path, file, field)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, column {field!r}: not UTF-8 text ({error.reason})", "store it as strings") from error
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} cannot be read as Parquet: {reason}", "it may be incomplete: write it again"
        ) from error


def _read(path: Path, file: BinaryIO, field: str) -> list[str]:
    from pyarrow import parquet

    parquet_file = parquet.ParquetFile(file)
    _check_column(path, parquet_file.schema_arrow, field)
    texts: list[str] = []
    size = 0
    for batch in parquet_file.iter_batches(batch_size=_ROWS, columns=[field]):
        size += batch.nbytes
        if size > packed.MAX_TEXT_BYTES:
            raise packed.too_large(path, "holds")
        column = batch.column(0)
        if column.null_count:
            row = len(texts) + column.to_pylist().index(None) + 1
            raise DataError(
                f"{path}, row {row}: column {field!r} is null, expected a string", "remove such rows from the file"
            )
        texts += column.to_pylist()
    return texts


def _check_column(path: Path, schema: Any, field: str) -> None:
    """Refuse a column that is missing, duplicated or not text; the error lists the text columns."""
    from pyarrow import types

    def is_text(kind: Any) -> bool:
        return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)) or (
            types.is_dictionary(kind) and is_text(kind.value_type)
        )

    texts = [column.name for column in schema if is_text(column.type)]
    listed = ", ".join(repr(name) for name in texts[:_SHOWN]) or "none"
    hint = f"{near_matches(field, texts)}text columns: {listed}; choose one with file:PATH#COLUMN"
    count = schema.names.count(field)
    if count != 1:
        raise DataError(f"{path} has {'no' if count == 0 else count} column{'s' if count else ''} {field!r}", hint)
    kind = schema.field(field).type
    if not is_text(kind):
        raise DataError(f"{path}: column {field!r} holds {str(kind)[:40]}, expected strings", hint)
