"""Writing rows as JSONL, CSV or TSV, packed with gzip or not: whole or not at all, and the same bytes each time."""

import gzip
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from graft.errors import DataError, UsageError
from graft.files import unwritable

KINDS = (".jsonl", ".csv", ".tsv")
"""Endings of files that are written, each also with .gz behind it."""


def kind_of_target(path: Path) -> str:
    """One of `KINDS`, by the file's name; raises `UsageError` for another."""
    name = path.name.lower().removesuffix(".gz")
    for kind in KINDS:
        if name.endswith(kind):
            return kind
    raise UsageError(f"{path} is none of {', '.join(KINDS)} (each also with .gz)", "give the output another name")


def check_target(path: Path, inputs: Iterable[str], force: bool) -> None:
    """Raise `UsageError` unless `path` can be written: not an input, not there already unless `force`."""
    kind_of_target(path)
    for given in inputs:
        source = Path(given).expanduser()
        if path.exists() and source.exists() and path.samefile(source):
            raise UsageError(f"{path} is read as well", "write to another file")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a folder, pipe or device", "give the name of a file")
    if path.exists() and not force:
        raise UsageError(f"{path} is there already", "remove it, or replace it with --force")


def as_line(fields: Mapping[str, Any]) -> str:
    """A row as one line of JSON; values that JSON has no kind for (dates of Parquet files) become texts."""
    line = json.dumps(fields, ensure_ascii=False, default=str)
    return line if _is_text(line) else json.dumps(fields, default=str)  # half a surrogate pair needs its escape


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write rows, given as lines of JSON, in the kind that the name of `path` says.

    Raises `DataError` for CSV of rows that are not flat, `ResourceError` when the disk refuses.
    """
    kind = kind_of_target(path)
    with _whole(path) as file:
        if kind == ".jsonl":
            for line in lines:
                file.write(line + "\n")
            return
        rows = [json.loads(line) for line in lines]
        header = list(dict.fromkeys(key for row in rows for key in row))
        separator = "\t" if kind == ".tsv" else ","
        file.write(_table_line(header, separator))
        for row in rows:
            file.write(_table_line([_cell(row.get(key), key, path) for key in header], separator))


def _table_line(cells: Sequence[str], separator: str) -> str:
    """A line of a table. `csv.writer` of Python 3.11 leaves a lone CR without quotes, which no reader takes."""
    special = re.compile(f'["\r\n{separator}]')
    quoted = ['"' + cell.replace('"', '""') + '"' if special.search(cell) else cell for cell in cells]
    return (separator.join(quoted) or '""') + "\n"


def _cell(value: Any, key: str, path: Path) -> str:
    if isinstance(value, list | dict):
        raise DataError(f"{path}: {key!r} holds a list or an object, which a table has no place for", "write .jsonl")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not _is_text(value):
        raise DataError(f"{path}: {key!r} holds half a surrogate pair, which a table cannot", "write .jsonl")
    return "" if value is None else str(value)


@contextmanager
def _whole(path: Path) -> Iterator[IO[str]]:
    """A text file that takes the place of `path` when the block ends without an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as raw:
                # Without name and time in gzip's header the bytes are the same each time.
                packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix.lower() == ".gz" else None
                with io.TextIOWrapper(packed or raw, encoding="utf-8", newline="") as file:
                    yield file
                    file.flush()
                    if packed is not None:
                        packed.close()
                    raw.flush()
                    os.fsync(raw.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise unwritable(path, error) from None
