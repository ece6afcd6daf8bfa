"""Rows of tables with a header line, and of plain text."""

import csv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from graft.errors import DataError
from graft.reading.faults import BadRow, Faults, settle, snippet_of
from graft.reading.lines import MAX_LINE, suffix_of, text_of

csv.field_size_limit(MAX_LINE)  # the default of 131,072 characters is less than a long document has


def txt_rows(
    path: Path, lines: Iterator[tuple[int, bytes]], faults: Faults | None
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, fields) of every paragraph, whose lines up to the next blank one are its `text`."""
    block: list[str] = []
    start, size = 0, 0
    bad: BadRow | None = None
    for number, line in chain(lines, [(0, b"")]):
        if line.strip():
            start = start or number
            size += len(line)
            if size > MAX_LINE:
                raise DataError(
                    f"{path}:{start}: a paragraph of more than {MAX_LINE // 10**6} MB, the most allowed",
                    "put blank lines between texts",
                )
            try:
                block.append(text_of(path, number, line).rstrip("\r\n"))
            except BadRow as fault:
                bad = bad or fault
        elif start:
            if bad is not None:
                settle(faults, bad)
            else:
                yield start, {"text": "\n".join(block)}
            block, start, size, bad = [], 0, 0, None


class _CsvLines:
    """The lines of a table for the parser, which asks for more of them inside quotes."""

    def __init__(self, path: Path, lines: Iterator[tuple[int, bytes]]) -> None:
        self.path = path
        self.lines = lines
        self.last = 0
        """Number of the last line the parser took."""
        self.bad: BadRow | None = None
        """The first line of the row that is no text."""

    def __iter__(self) -> Iterator[str]:
        for number, line in self.lines:
            self.last = number
            try:
                text = text_of(self.path, number, line)
            except BadRow as bad:
                self.bad = self.bad or bad
                text = line.decode("utf-8", "replace")
            yield text


def csv_rows(
    path: Path, lines: Iterator[tuple[int, bytes]], faults: Faults | None
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, fields) of every row below the header; the line is the one where the row begins."""
    first = next(lines)
    source = _CsvLines(path, chain([first], lines))
    separator = _separator(path, text_of(path, *first))
    reader = csv.reader(iter(source), delimiter=separator, strict=True)
    header: list[str] = []
    start = first[0]
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            bad = _unparsed(path, start, source.last, error)
            settle(faults if start == source.last and header else None, bad)
            start, source.bad = source.last + 1, None
            continue
        if row is None:
            return
        place, start = start, source.last + 1
        fault, source.bad = source.bad, None
        if fault is None and not any(cell.strip() for cell in row):
            continue
        if not header:
            if fault is not None:
                raise fault
            header = _header(path, place, row)
            continue
        if fault is None and len(row) != len(header):
            several = f" (the row ends in line {source.last})" if source.last > place else ""
            reason = f"{len(row)} fields where the header has {len(header)}{several}"
            remedy = f"put quotes around fields that contain {separator!r}"
            fault = BadRow(f"{path}:{place}", reason, remedy, snippet_of(separator.join(row)[:400]))
        if fault is not None:
            settle(faults, fault)
            continue
        yield place, dict(zip(header, row, strict=True))


def _separator(path: Path, header: str) -> str:
    separator = "\t" if suffix_of(path) == ".tsv" else ","
    if separator in header:
        return separator
    return max(",\t;|", key=header.count)  # spreadsheets of many countries write ";" into .csv


def _unparsed(path: Path, start: int, last: int, error: csv.Error) -> BadRow:
    """The row from line `start` to `last` that is no CSV: inside open quotes, line ends do not end it."""
    reason = f"not {suffix_of(path)[1:].upper()} ({error})"
    if last > start:
        reason += f"; the quotes that open here reach line {last}"
    return BadRow(f"{path}:{start}", reason, 'write each " inside a quoted field twice, or save as .jsonl')


def _header(path: Path, line: int, names: list[str]) -> list[str]:
    stripped = [name.strip() for name in names]
    for name in stripped:
        if stripped.count(name) > 1:
            raise DataError(
                f"{path}:{line}: the header has the column {name!r} twice", "give every column its own name"
            )
    return stripped
