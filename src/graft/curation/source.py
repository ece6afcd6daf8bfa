"""The rows of any source, one by one: a file, starter data or `task:NAME`, each with the fields it was read from."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from graft import assets
from graft.data import formats, tasks
from graft.data.formats import AnyRow
from graft.errors import DataError, nearest
from graft.reading.faults import BadRow, Fault, Faults
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
    fault: Fault | None = None
    """Why it is faulty; the same object stands in the source's `faults`."""


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
    """Its rows. Those that are faulty as a piece of the file stand in `faults` only."""
    faults: Faults
    """Every faulty row so far; complete when `items` has ended."""


def open_source(given: str, columns: Mapping[str, str] | None = None, wanted: str | None = None) -> Source:
    """Open a file, starter data or a task source.

    `columns` maps field names to the file's, `wanted` names a format instead of recognizing it.
    Raises `DataError` for a source that is missing or of no known format.
    """
    faults = Faults(1.0, keep=10_000_000, whole=True)
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
            return Item(record.place, record.fields, None, faults.add(bad.place, bad.reason, bad.snippet))

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
        line, number = order_of(place)
        if total and line and not number:  # elements of one line say nothing
            return min(1.0, line / total)
        return told / (told + 50_000)

    return share


_LINE = re.compile(r":(\d+)(?:\[(\d+)\])?$")


def order_of(place: str) -> tuple[int, int]:
    """(line or row, element on that line) of a place, `file:line` or `file:line[number]`; 0 where there is none."""
    found = _LINE.search(place)
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)


def raw_rows(given: str, faults: Sequence[Fault], kept: Mapping[str, str]) -> dict[str, str]:
    """Faulty rows by place as they stand in the file: of `kept`, else the line, with bad bytes as \\xNN.

    What has no line of its own, such as the cut-off end of an array, is not among them.
    """
    found = {fault.place: kept[fault.place] for fault in faults if fault.place in kept}
    wanted: dict[int, list[str]] = {}
    for fault in faults:
        at, element = order_of(fault.place)
        if fault.place not in found and not element:
            wanted.setdefault(at, []).append(fault.place)
    path = Path(given).expanduser()
    if not wanted or not path.is_file() or suffix_of(path) == ".parquet":
        return found
    try:
        for number, line in lines_of(path):
            text = line.decode("utf-8", "backslashreplace").rstrip("\r\n") if number in wanted else ""
            found |= dict.fromkeys(wanted.get(number, ()), text)
    except DataError:  # what ended the reading of the rows ends this as well
        pass
    return found
