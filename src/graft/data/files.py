"""Records of data files: JSONL, JSON arrays, CSV and TSV, every fault named by file and line.

The content decides between JSONL and a JSON array, whatever the file is called.
"""

import codecs
import csv
import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

from graft.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
MAX_LINE = 20_000_000
"""Bytes of the longest line that is read; a file without line ends would otherwise fill the memory."""

MAX_WHOLE = 500_000_000
"""Bytes of the largest file that has to be held as a whole: a JSON array or UTF-16."""

_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip archive", b"PAR1": "Parquet", b"BZh": "bzip2"}
_AS_JSONL = "write one JSON object per line (.jsonl)"


@dataclass(frozen=True, slots=True)
class Record:
    """The fields of one row and its place, `file:line`."""

    fields: dict[str, Any]
    place: str


def read_records(path: Path) -> list[Record]:
    """All rows of a data file; raises `DataError` for the first fault."""
    check_file(path)
    before = path.stat()
    try:
        records = list(_records(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "check its permissions") from None
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{path} changed while it was read", "run again when nothing writes to it")
    if not records:
        raise DataError(f"{path} has no rows", "give a file with at least one row")
    return records


def check_file(path: Path) -> None:
    """Raise `DataError` unless `path` is a plain file of a known kind; opens nothing."""
    allowed = ", ".join(SUFFIXES)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(f"{path} is a link to a missing file", "restore the file or the link") from None
        raise DataError(f"{path}: no such data file", _neighbours(path)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", "check its path and permissions") from None
    if stat.S_ISDIR(mode):
        raise DataError(f"{path} is a folder", f"give one file in it ({allowed})")
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is a pipe or device", f"give a plain file ({allowed})")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path} ends in {path.suffix or 'nothing'!r}, allowed are {allowed}",
            "convert it or correct its name",
        )


def _neighbours(path: Path) -> str:
    """What could have been meant instead of the missing `path`."""
    try:
        names = [item.name for item in path.parent.iterdir() if item.suffix.lower() in SUFFIXES]
    except OSError:
        return f"the folder {path.parent} does not exist either: check the path"
    close = get_close_matches(path.name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {path.parent / close[0]}?"
    listed = ", ".join(sorted(names)[:5]) or "none"
    return f"check the path; data files in {path.parent}: {listed}"


def _records(path: Path) -> Iterator[Record]:
    lines = _lines(path)
    first = next((line for line in lines if line[1].strip()), None)
    if first is None:
        return iter(())
    lines = chain([first], lines)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _from_csv(path, lines, first[1])
    if first[1].lstrip().startswith("["):
        return _from_array(path, lines)
    return _from_jsonl(path, lines)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line with its end) of a text in UTF-8 or, with a byte order mark, UTF-16."""
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        for magic, kind in _PACKED.items():
            if start.startswith(magic):
                raise DataError(f"{path}:1: the file is {kind}", f"unpack or convert it: {_AS_JSONL}")
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            yield from _utf16_lines(path, file.read(MAX_WHOLE + 1))
            return
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            _check_line(path, number, len(line), b"\0" in line)
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
                raise DataError(
                    f"{path}:{number}: {byte} is not UTF-8",
                    "save the file as UTF-8, for example with iconv",
                ) from None
            yield number, text


def _utf16_lines(path: Path, content: bytes) -> Iterator[tuple[int, str]]:
    if len(content) > MAX_WHOLE:
        raise DataError(f"{path}: UTF-16 of more than {MAX_WHOLE // 10**6} MB", "save the file as UTF-8")
    try:
        text = content.decode("utf-16")
    except UnicodeDecodeError as error:
        line = content[: error.start].decode("utf-16", "ignore").count("\n") + 1
        raise DataError(f"{path}:{line}: damaged UTF-16 ({error.reason})", "save the file as UTF-8") from None
    pieces = text.split("\n")
    for number, piece in enumerate(pieces, start=1):
        _check_line(path, number, len(piece), "\0" in piece)
        if piece or number < len(pieces):
            yield number, piece + "\n"


def _check_line(path: Path, number: int, length: int, has_nul: bool) -> None:
    if length > MAX_LINE:
        raise DataError(f"{path}:{number}: a line of more than {MAX_LINE // 10**6} MB, the most allowed", _AS_JSONL)
    if has_nul:
        raise DataError(f"{path}:{number}: a NUL byte, so this is no text", "save the file as UTF-8 without NUL bytes")


class _FaultError(ValueError):
    """What is wrong with a JSON text that the parser itself would accept."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _FaultError(f"the key {twice!r} stands twice in one object, once is allowed")
    return record


def _constant(literal: str) -> Any:
    raise _FaultError(f"{literal} is no JSON value, allowed are finite numbers and null")


def _number(literal: str) -> float:
    value = float(literal)
    return _constant(literal) if value in (float("inf"), float("-inf")) else value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_number)


def _decode(path: Path, text: str, start: int, line: int) -> tuple[Any, int]:
    """The JSON value at `start`, which is on line `line`, and the position after it."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        at = line + text.count("\n", start, error.pos)
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        what = "the JSON is cut off" if cut else f"not JSON ({error.msg})"
        raise DataError(f"{path}:{at}: {what}", f"correct or remove the row; {_AS_JSONL}") from None
    except RecursionError:
        raise DataError(f"{path}:{line}: the JSON is nested too deep", f"flatten the row; {_AS_JSONL}") from None
    except ValueError as error:
        raise DataError(f"{path}:{line}: {error}", "correct or remove the row") from None


def _record(path: Path, line: int, value: Any) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{path}:{line}: {kind_of(value)} where an object is expected", _AS_JSONL)
    return Record(value, f"{path}:{line}")


def _from_jsonl(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Record]:
    for number, line in lines:
        text = line.strip()
        if not text:
            continue
        value, end = _decode(path, text, 0, number)
        if text[end:].strip():
            raise DataError(f"{path}:{number}: more than one JSON value on the line", _AS_JSONL)
        yield _record(path, number, value)


def _from_array(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Record]:
    if path.stat().st_size > MAX_WHOLE:
        raise DataError(f"{path}: a JSON array of more than {MAX_WHOLE // 10**6} MB", _AS_JSONL)
    number, first = next(lines)
    text = first + "".join(line for _, line in lines)
    position, line, wanted = text.index("[") + 1, number, "]"
    while True:
        start = _skip(text, position)
        line += text.count("\n", position, start)
        if text.startswith("]", start) and wanted != "value":
            break
        if wanted == ",":
            if not text.startswith(",", start):
                what = "the JSON array is cut off" if start >= len(text) else "a comma is missing"
                raise DataError(f"{path}:{line}: {what}", f"correct the file; {_AS_JSONL}")
            position, wanted = start + 1, "value"
            continue
        value, position = _decode(path, text, start, line)
        yield _record(path, line, value)
        line, wanted = line + text.count("\n", start, position), ","
    if text[start + 1 :].strip():
        raise DataError(f"{path}:{line}: text after the end of the JSON array", _AS_JSONL)


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _from_csv(path: Path, lines: Iterator[tuple[int, str]], header_line: str) -> Iterator[Record]:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    if separator not in header_line:  # spreadsheets of many countries write ";" into .csv
        separator = max(",\t;|", key=header_line.count)
    last = 0

    def texts() -> Iterator[str]:
        nonlocal last
        for last, line in lines:  # noqa: B007, the row reader asks where the parser has got to
            yield line

    reader = csv.reader(texts(), delimiter=separator, strict=True)
    header: list[str] = []
    start = 1
    try:
        for row in reader:
            start, place = last + 1, start
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = _header(path, last, row)
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}:{place}: {len(row)} fields where the header has {len(header)}",
                    f"put quotes around fields that contain {separator!r}",
                )
            yield Record(dict(zip(header, row, strict=True)), f"{path}:{place}")
    except csv.Error as error:
        raise DataError(
            f"{path}:{start}: not {path.suffix[1:].upper()} ({error})",
            'write each " inside a quoted field twice, or save as .jsonl',
        ) from None


def _header(path: Path, line: int, names: list[str]) -> list[str]:
    stripped = [name.strip() for name in names]
    for name in stripped:
        if stripped.count(name) > 1:
            raise DataError(
                f"{path}:{line}: the header has the column {name!r} twice", "give every column its own name"
            )
    return stripped


def kind_of(value: Any) -> str:
    """What a JSON value is, in words, with the value when it is short."""
    names = {type(None): "null", bool: "a truth value", str: "a text", list: "a list", dict: "an object"}
    name = names.get(type(value), "a number")
    shown = repr(value)
    return name if value is None or len(shown) > 40 else f"{name} ({shown})"
