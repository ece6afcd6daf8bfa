"""Rows of JSON: one object per line, or one array of objects."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.errors import DataError
from graft.reading.faults import BadRow, Faults, kind_of, settle, snippet_of
from graft.reading.lines import AS_JSONL, text_of

MAX_WHOLE = 500_000_000
"""Bytes of the largest JSON array, which has to be held as a whole."""

MAX_DEPTH = 100
"""The deepest nesting of a JSON value."""


class _FaultError(ValueError):
    """What is wrong with a JSON text that the parser itself would accept."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _FaultError(f"the key {twice[:40]!r} stands twice in one object, once is allowed")
    return record


def _constant(literal: str) -> Any:
    raise _FaultError(f"{literal[:40]} is no JSON value, allowed are finite numbers and null")


def _number(literal: str) -> float:
    value = float(literal)
    return _constant(literal) if value in (float("inf"), float("-inf")) else value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_number)
_LENIENT = json.JSONDecoder(parse_float=str, parse_int=str)
"""Finds the end of a value that `_DECODER` refuses."""


def _decode(path: Path, text: str, start: int, line: int) -> tuple[Any, int]:
    """The JSON value at `start`, which is on line `line`, and the position after it; raises `BadRow`."""
    place = f"{path}:{line}"
    try:
        value, end = _DECODER.raw_decode(text, start)
        deep = _is_deep(value, text, start, end)
    except json.JSONDecodeError as error:
        below = text.count("\n", start, error.pos)
        reason = "the JSON is cut off" if _is_cut(error, text) else f"not JSON ({error.msg})"
        remedy = f"correct or remove the row; {AS_JSONL}"
        raise BadRow(f"{path}:{line + below}", reason, remedy, snippet_of(text, error.pos)) from None
    except RecursionError:
        deep = True
    except ValueError as error:
        raise BadRow(place, str(error), snippet=snippet_of(text, start)) from None
    if deep:
        reason = f"the JSON is nested too deep, {MAX_DEPTH} levels are allowed"
        raise BadRow(place, reason, f"flatten the row; {AS_JSONL}", snippet_of(text, start))
    return value, end


def parse_json(text: str) -> Any:
    """One JSON value; raises `ValueError` for what is refused in files too: doubled keys, NaN, deep nesting."""
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise _FaultError("nested too deep") from None
    if _is_deep(value, text, 0, len(text)):
        raise _FaultError("nested too deep")
    return value


def _is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the text ends before the value does."""
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")


def _is_deep(value: Any, text: str, start: int, end: int) -> bool:
    """Whether a value that was read from `text` has more than `MAX_DEPTH` levels."""
    if text.count("[", start, end) + text.count("{", start, end) <= MAX_DEPTH:
        return False
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [child for children in inner for child in children]
    return bool(level)


def _fields(path: Path, line: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRow(f"{path}:{line}", f"{kind_of(value)} where an object is expected", AS_JSONL)
    fields: dict[str, Any] = value
    return fields


def jsonl_rows(
    path: Path, lines: Iterator[tuple[int, bytes]], faults: Faults | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, fields) of every object that has a line of its own."""
    for number, line in lines:
        try:
            text = text_of(path, number, line).strip()
            if not text:
                continue
            value, end = _decode(path, text, 0, number)
            if text[end:].strip():
                reason = "more than one JSON value on the line"
                raise BadRow(f"{path}:{number}", reason, AS_JSONL, snippet_of(text, end))
            fields = _fields(path, number, value)
        except BadRow as bad:
            settle(faults, bad)
            continue
        yield number, fields


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where an element of an array begins."""

    line: int
    number: int
    """Of the element in the file, from 1."""
    beside: bool
    """Whether the element before begins on the same line."""

    def name(self, followed: bool = False) -> str:
        """`line`, or `line[number]` where another element begins on it, before this one or after (`followed`)."""
        return f"{self.line}[{self.number}]" if self.beside or followed else str(self.line)


def array_rows(
    path: Path, lines: Iterator[tuple[int, bytes]], faults: Faults | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, fields) of every object of an array; what follows a fault is read if the fault's end is certain.

    Where several elements begin on one line, each has its number behind the line: `1[3]`.
    """
    text, line = _whole(path, lines)
    position, wanted = text.index("[") + 1, "]"
    number, before = 0, 0
    while True:
        start = _skip(text, position)
        line += text.count("\n", position, start)
        if text.startswith("]", start) and wanted != "value":
            break
        spot = _Spot(line, number + 1, line == before)
        if wanted == ",":
            if not text.startswith(",", start):
                cut = start >= len(text)
                what = "the JSON array is cut off" if cut else "a comma is missing"
                place, remedy = f"{path}:{spot.name()}", f"correct the file; {AS_JSONL}"
                settle(faults if cut else None, BadRow(place, what, remedy, snippet_of(text, start)))
                return
            position, wanted = start + 1, "value"
            continue
        fields, end = _element(path, text, start, spot, faults)
        if fields is not None:
            yield spot.name(_followed(text, start, end)), fields
        if end is None:
            return
        number, before = number + 1, line
        line, wanted, position = line + text.count("\n", start, end), ",", end
    if text[start + 1 :].strip():
        raise DataError(f"{path}:{line}: text after the end of the JSON array", AS_JSONL)


def _element(
    path: Path, text: str, start: int, spot: _Spot, faults: Faults | None
) -> tuple[dict[str, Any] | None, int | None]:
    """One record of an array, None when it is bad, and the position after it, None when the file is cut off there."""
    end = None
    try:
        value, end = _decode(path, text, start, spot.line)
        return _fields(path, spot.line, value), end
    except BadRow as bad:
        cut = False
        if end is None:
            try:
                end = _LENIENT.raw_decode(text, start)[1]
            except json.JSONDecodeError as error:
                cut = _is_cut(error, text)
            except RecursionError:
                pass
        if bad.place == f"{path}:{spot.line}":  # not a line below, where what is no JSON was found
            bad = BadRow(f"{path}:{spot.name(_followed(text, start, end))}", bad.reason, bad.remedy, bad.snippet)
        bad.raw = text[start:end]
        settle(faults if cut or end is not None else None, bad)
        return None, end


def _followed(text: str, start: int, end: int | None) -> bool:
    """Whether the element from `start` to `end` has another behind it that begins on the same line."""
    comma = _skip(text, end) if end is not None else len(text)
    after = _skip(text, comma + 1)
    return text.startswith(",", comma) and text[after : after + 1] not in ("", "]") and "\n" not in text[start:after]


def _whole(path: Path, lines: Iterator[tuple[int, bytes]]) -> tuple[str, int]:
    """The text of a JSON array from its first line that is not blank, and the number of that line."""
    texts, size, first = [], 0, 0
    for number, line in lines:
        first = first or number
        size += len(line)
        if size > MAX_WHOLE:
            raise DataError(f"{path}:{number}: a JSON array of more than {MAX_WHOLE // 10**6} MB", AS_JSONL)
        texts.append(text_of(path, number, line))
    return "".join(texts), first


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
