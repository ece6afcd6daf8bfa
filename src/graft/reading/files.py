"""Records of data files: JSONL, JSON arrays, CSV, TSV, TXT and Parquet, every fault named by file and line.

The content decides between JSONL and a JSON array, whatever the file is called. All but JSON arrays are read in
bounded memory, however large they are. With `Faults` a bad row is taken down and reading goes on behind it,
as far as it is certain where the next row begins.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from graft.errors import DataError
from graft.reading.faults import BadRow, Fault, Faults, kind_of
from graft.reading.jsonrows import array_rows, jsonl_rows
from graft.reading.lines import MAX_LINE, SUFFIXES, check_file, lines_of, suffix_of
from graft.reading.parquet import parquet_rows
from graft.reading.tables import csv_rows, txt_rows

__all__ = ["MAX_LINE", "SUFFIXES", "BadRow", "Fault", "Faults", "Record", "iterate_records", "kind_of", "read_records"]


@dataclass(frozen=True, slots=True)
class Record:
    """The fields of one row and its place: `file:line`, or `file:line[number]` where several elements of a JSON array
    begin on the line, with the number of the element in the file, from 1. No two rows of a file have one place."""

    fields: dict[str, Any]
    place: str


def read_records(path: Path) -> list[Record]:
    """All rows of a data file; raises `DataError` for the first fault."""
    return list(iterate_records(path))


def iterate_records(path: Path, faults: Faults | None = None) -> Iterator[Record]:
    """The rows of a data file, one by one.

    Raises `DataError` at once for what is no data file and, while reading, for a fault of the whole file, such as
    damaged gzip, a change of the file meanwhile or no row at all. A bad row is added to `faults`, or raised without it.
    """
    check_file(path)
    return _guarded(path, faults)


def _guarded(path: Path, faults: Faults | None) -> Iterator[Record]:
    before = _state(path)
    count = 0
    try:
        for record in _records(path, faults):
            count += 1
            yield record
    except FileNotFoundError:
        pass  # told by the state below
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", "check its permissions") from None
    if _state(path) != before:
        raise DataError(f"{path} changed while it was read", "run again when nothing writes to it")
    if not count and not (faults and faults.count):
        raise DataError(f"{path} has no rows", "give a file with at least one row")


def _state(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written to or replaced."""
    try:
        state = path.stat()
    except OSError:
        raise DataError(f"{path} was deleted while it was read", "restore it, or check the disk") from None
    return state.st_size, state.st_mtime_ns, state.st_ino


def _records(path: Path, faults: Faults | None) -> Iterator[Record]:
    for number, fields in _rows(path, faults):
        yield Record(fields, f"{path}:{number}")


def _rows(path: Path, faults: Faults | None) -> Iterator[tuple[int | str, dict[str, Any]]]:
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return parquet_rows(path, faults)
    lines = lines_of(path)
    first = next((line for line in lines if line[1].strip()), None)
    if first is None:
        return iter(())
    lines = chain([first], lines)
    if suffix == ".txt":
        return txt_rows(path, lines, faults)
    if suffix in (".csv", ".tsv"):
        return csv_rows(path, lines, faults)
    return (array_rows if first[1].lstrip().startswith(b"[") else jsonl_rows)(path, lines, faults)
