"""Rows of Parquet files in bounded memory; needs pyarrow, which comes with `graft-tuning[parquet]`."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft.errors import DataError
from graft.reading.faults import BadRow, Faults, settle
from graft.reading.lines import BOMB_BYTES, MAX_RATIO

_BATCH = 256
"""Rows that are decoded together at most."""

_BATCH_BYTES = 1 << 28
"""Bytes that the values of one column may take in the rows that are decoded together."""

_DENSE = 20
"""How many times its packed size a column of texts takes at most, as a rule."""


def parquet_rows(path: Path, faults: Faults | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, row of JSON values) of a Parquet file; dates and decimals become texts.

    Raises `DataError` without pyarrow, for a damaged file, for columns of bytes (such as pickled objects), for two
    columns of one name, and for values that grow beyond `MAX_RATIO` times the file. A row with NaN or an infinite
    number is a bad row.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: pyarrow reads Parquet", "pip install 'graft-tuning[parquet]'") from None
    number, size, packed = 0, 0, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            special = _check_columns(path, file.schema_arrow)
            for batch in file.iter_batches(batch_size=_rows_at_once(path, file.metadata), use_threads=False):
                size += batch.nbytes
                _check_size(path, number + 1, size, packed)
                for row in batch.to_pylist():
                    number += 1
                    try:
                        yield number, _as_json(row, f"{path}:{number}") if special else row
                    except BadRow as bad:
                        settle(faults, bad)
    except (pyarrow.ArrowException, ValueError, NotImplementedError, KeyError, OverflowError) as error:
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{path}:{number + 1}: Parquet that cannot be read ({reason})", "write or fetch the file again"
        ) from None


def _check_size(path: Path, number: int, size: int, packed: int) -> None:
    """Raise `DataError` where `packed` bytes have become too many, as in gzip."""
    if size > BOMB_BYTES and size > MAX_RATIO * packed:
        reason = f"Parquet that unpacks to more than {MAX_RATIO} times its size ({size // 10**6} MB so far)"
        raise DataError(f"{path}:{number}: {reason}", "write it as JSONL yourself if you trust it")


def _rows_at_once(path: Path, about: Any) -> int:
    """How many rows are decoded together. A column's dictionary holds a text once that every row may have, so a small
    file can fill the memory with one batch: the largest text that there may be counts for each row.
    """
    largest = 1
    for group in range(about.num_row_groups):
        for index in range(about.row_group(group).num_columns):
            column = about.row_group(group).column(index)
            _check_size(path, 1, column.total_uncompressed_size, column.total_compressed_size)
            if not column.has_dictionary_page:
                continue
            dense = column.total_uncompressed_size <= _DENSE * column.total_compressed_size
            held = _DENSE * (column.data_page_offset - (column.dictionary_page_offset or 0))
            largest = max(
                largest, min(held if dense else column.total_uncompressed_size, column.total_uncompressed_size)
            )
    return max(1, min(_BATCH, _BATCH_BYTES // largest))


def _check_columns(path: Path, schema: Any) -> bool:
    """Whether values may need to be made JSON: numbers with a point, dates and the like."""
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise DataError(f"{path}:1: the column {name!r} stands twice", "give every column its own name")
    kinds = {kind for field in schema for kind in _leaves(field.type, field.name, path)}
    return not kinds <= {"plain"}


def _leaves(kind: Any, name: str, path: Path) -> Iterator[str]:
    """ "plain" or "special" for every part of a column's type; raises `DataError` for bytes."""
    from pyarrow import types

    if isinstance(getattr(kind, "storage_type", None), type(kind)) or "extension" in str(kind):
        yield from _leaves(kind.storage_type, name, path)
        return
    if types.is_dictionary(kind):
        yield from _leaves(kind.value_type, name, path)
    elif kind.num_fields:
        for index in range(kind.num_fields):
            yield from _leaves(kind.field(index).type, name, path)
    elif (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or "binary" in str(kind)
    ):
        raise DataError(
            f"{path}:1: the column {name!r} holds bytes, such as pictures or pickled objects, which are not read",
            "write the file without this column",
        )
    plain = types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)
    yield "plain" if plain or types.is_boolean(kind) or types.is_null(kind) else "special"


def _as_json(row: dict[str, Any], place: str) -> dict[str, Any]:
    """The row with texts for dates, durations and decimals; raises `BadRow` for NaN and infinite numbers."""
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRow(place, f"{name!r} is {value}, allowed are finite numbers and null")
    try:
        loaded: dict[str, Any] = json.loads(json.dumps(row, default=str, allow_nan=False))
    except ValueError:
        raise BadRow(place, "NaN or an infinite number, allowed are finite numbers and null") from None
    return loaded
