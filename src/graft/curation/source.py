"""The rows of any source, one by one: a file, starter data or `task:NAME`, each with the fields it was read from."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from graft import assets
from graft.data import formats, tasks
from graft.data.formats import AnyRow
from graft.errors import DataError, nearest
from graft.reading.faults import BadRow, Faults
from graft.reading.files import Record, iterate_records
from graft.reading.lines import lines_of, suffix_of

_PEEK = 100
"""Rows by which a format is recognized."""

_NO_ROWS = "give a file with at least one row"


@dataclass(frozen=True, slots=True)
class Item:
    """One row as read, or why it cannot be."""

    place: str
    """`file:line`."""
    fields: Mapping[str, Any]
    """What the file has; empty for rows of a task."""
    row: AnyRow | None
    """The row, None where it is faulty."""
    reason: str = ""
    """Why it is faulty."""


@dataclass
class Source:
    """A source that was opened and recognized."""

    name: str
    """As it was given."""
    file: str
    """The file behind it, as places name it."""
    format: str
    """The name of its format."""
    unit: str
    """What its rows are."""
    why: str
    """By what the format was recognized."""
    items: Iterator[Item]
    """Its rows. Those that are faulty as a line of the file stand in `faults` only."""
    faults: Faults
    """Every faulty row so far; complete when `items` has ended."""


def open_source(given: str, columns: Mapping[str, str] | None = None, wanted: str | None = None) -> Source:
    """Open a file, starter data or a task source.

    `columns` maps field names to the file's, `wanted` names a format instead of recognizing it.
    Raises `DataError` for a source that is missing or of no known format.
    """
    faults = Faults(1.0, keep=10_000_000)
    if tasks.is_task(given):
        made = (Item(row.place, formats.to_record(row, "messages"), row) for row in _task_rows(given))
        return Source(given, given, "messages", "dialogue", "a task makes questions and answers", made, faults)
    starters = [name for name, asset in assets.ASSETS.items() if asset.kind == "data"]
    if given in starters:
        path, starter = assets.folder(given) / "all.jsonl", True
    else:
        path, starter = Path(given).expanduser(), False
        if path.name == given and not path.suffix and not path.exists():
            raise DataError(f"{given!r} is neither starter data nor a file", nearest(given, starters))
    records = iterate_records(path, faults)
    if starter:  # neutral rows of starter data have no label
        records = (record for record in records if record.fields.get("label") is not None)
    head = list(islice(records, _PEEK))
    if not head:
        first = f": {faults.first()}" if faults.count else ""
        raise DataError(f"{given} has no row that can be read{first}", _NO_ROWS)
    recognized = formats.recognize(head, dict(columns or {}), wanted)

    def read(record: Record) -> Item:
        try:
            return Item(record.place, record.fields, formats.read_row(record, recognized))
        except BadRow as bad:
            faults.add(bad.place, bad.reason, bad.snippet)
            return Item(record.place, record.fields, None, bad.reason)

    items = (read(record) for record in chain(head, records))
    return Source(given, str(path), recognized.name, recognized.unit, recognized.why, items, faults)


def _task_rows(given: str) -> Iterator[Any]:
    yield from tasks.task_dialogues(given, "train")


def share_read(given: str) -> Callable[[str], float]:
    """A function from the place of a row to the share of the file before it, by its line; a guess in packed files."""
    total, told = 0, 0
    path = Path(given).expanduser()
    if path.is_file() and path.suffix.lower() not in (".gz", ".parquet"):
        with path.open("rb") as file:
            total = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))

    def share(place: str) -> float:
        nonlocal told
        told += 1
        line = place.rpartition(":")[2]
        if total and line.isdecimal():
            return min(1.0, int(line) / total)
        return told / (told + 50_000)

    return share


def line_of(place: str) -> int:
    """The line or row number in `file:line`, 0 where there is none."""
    line = place.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0


def raw_lines(given: str, places: Collection[str]) -> dict[str, str]:
    """The lines of a JSONL or table file at some places (`file:line`), as they stand there; bad bytes as \\xNN."""
    wanted = {line_of(place): place for place in places}
    path = Path(given).expanduser()
    if not wanted or not path.is_file() or suffix_of(path) == ".parquet":
        return {}
    found: dict[str, str] = {}
    try:
        for number, line in lines_of(path):
            if number in wanted:
                found[wanted[number]] = line.decode("utf-8", "backslashreplace").rstrip("\r\n")
    except DataError:  # what ended the reading of the rows ends this as well
        pass
    return found
