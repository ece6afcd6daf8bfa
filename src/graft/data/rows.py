"""Rows: the text and label of each record, checked value by value."""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from graft.reading.faults import BadRow, Faults, kind_of, settle
from graft.reading.files import Record

FIELDS = ("text", "text_pair", "label", "id")
"""The fields of a row that a column can stand for; all other columns are ignored."""

_USUAL = {
    "text": ("sentence", "content", "review", "input", "sentence1", "premise"),
    "text_pair": ("sentence2", "hypothesis"),
    "label": ("labels", "class", "category", "target", "sentiment"),
}
"""Names that other data sets use, offered when a column is missing."""


@dataclass(frozen=True, slots=True)
class Row:
    """One example. `place` is its `file:line`, for errors; `id` is the file's own or the line number."""

    text: str
    text_pair: str | None
    label: str | None
    id: str
    place: str


def make_rows(
    records: Sequence[Record], columns: Mapping[str, str], need_label: bool, faults: Faults | None = None
) -> list[Row]:
    """The rows of a file's records; `columns` maps our names to the file's.

    The first record decides whether there are pairs and labels; `need_label` demands labels. A record without a needed
    field or with a value that is no text or label is added to `faults`, or raised as `BadRow` without it.
    """
    names = {field: columns.get(field, field) for field in FIELDS}
    expected = {field for field in FIELDS if field in columns or names[field] in records[0].fields}
    expected |= {"text", "label"} if need_label else {"text"}
    rows = []
    for record in records:
        try:
            for field in FIELDS[:3]:
                if (names[field] in record.fields) != (field in expected):
                    raise _missing(record, field, names[field], field in expected)
            rows.append(make_row(record, names, expected))
        except BadRow as bad:
            settle(faults, bad)
    return rows


def make_row(record: Record, names: Mapping[str, str], expected: Container[str]) -> Row:
    """The row of one record; `names` maps our names to the record's, `expected` are those that are read.

    Raises `BadRow` for a value that is no text or label.
    """
    values = {field: record.fields.get(names.get(field, field)) for field in FIELDS}
    pair = text_value(values["text_pair"], names["text_pair"], record.place) if "text_pair" in expected else None
    return Row(
        text=text_value(values["text"], names["text"], record.place),
        text_pair=pair,
        label=_label(values["label"], names["label"], record.place) if "label" in expected else None,
        id=id_of(values["id"], record.place),
        place=record.place,
    )


def id_of(given: Any, place: str) -> str:
    """The row's own id when it is a text or a whole number, else the line of its place."""
    own = isinstance(given, str | int) and not isinstance(given, bool) and given != ""
    return check_text(str(given), "id", place) if own else place.rpartition(":")[2]


def _missing(record: Record, field: str, name: str, expected: bool) -> BadRow:
    """The error for a row without a column that it should have, or with one that the first row lacks."""
    if not expected:
        return BadRow(
            record.place,
            f"the row has {name!r}, the first row has none",
            f"give {name!r} in all rows or in none",
        )
    present = list(record.fields)
    folded = {column.strip().casefold(): column for column in reversed(present)}
    likely = get_close_matches(name.casefold(), folded, n=1, cutoff=0.75)
    likely += [usual for usual in _USUAL[field] if usual in folded]
    guess = folded[likely[0]] if likely else "NAME"
    listed = ", ".join(repr(column) for column in present[:8]) + (", …" if len(present) > 8 else "")
    return BadRow(
        record.place,
        f"no column {name!r}, the row has {listed or 'none'}",
        f"name the right one, as in `columns: {{{field}: {guess}}}`",
    )


def text_value(value: Any, column: str, place: str) -> str:
    """`value` as it is; raises `BadRow` unless it is text that a tokenizer can take, and not blank."""
    if not isinstance(value, str):
        raise BadRow(place, f"{column!r} is {kind_of(value)}, allowed is a text", "correct the row")
    if not value.strip():
        raise BadRow(place, f"{column!r} is empty", "fill in or remove the row")
    return check_text(value, column, place)


def check_text(value: str, column: str, place: str) -> str:
    """`value` as it is; raises `BadRow` for NUL and for half a surrogate pair, which no tokenizer takes."""
    if "\0" in value:
        raise BadRow(place, f"{column!r} contains a NUL character", "remove it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            place,
            f"{column!r} has half a surrogate pair at position {error.start + 1}",
            "correct the row; such text comes from cutting an emoji in two",
        ) from None
    return value


def _label(value: Any, column: str, place: str) -> str:
    """The label as text: 1, 1.0, "1" and " 1.0" are all "1"; true is "true"."""
    allowed = "allowed are words, whole numbers, true and false"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float) and float(value).is_integer():
        return str(int(value))
    text = value.strip() if isinstance(value, str) else None
    if text == "":
        raise BadRow(place, f"{column!r} is empty, {allowed}", "fill in or remove the row")
    if text is None or text.casefold() == "nan":
        raise BadRow(place, f"{column!r} is {kind_of(value)}, {allowed}", "correct or remove the row")
    whole = re.fullmatch(r"([+-]?\d+)\.0+", text)
    return text_value(whole.group(1) if whole else text, column, place)
