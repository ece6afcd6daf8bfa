"""Which format a file is in, told by the keys of its first rows, and its rows."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path

from graft.data.readers import FORMATS, AnyRow, given_of
from graft.data.turns import fold
from graft.data.writers import to_record
from graft.errors import DataError, nearest
from graft.reading.faults import BadRow, Faults, settle
from graft.reading.files import Record, iterate_records

__all__ = ["FORMATS", "AnyRow", "Recognized", "read_row", "read_rows_of", "recognize", "to_record"]

SAMPLE = 100
"""Rows from whose keys the format is told."""

UNITS = tuple(dict.fromkeys(known.unit for known in FORMATS.values()))
"""What rows can be."""

_CHAT = ("messages", "sharegpt", "alpaca", "prompt-completion")
_BEATEN = {
    "preference": set(FORMATS) - {"preference"},
    "unpaired-preference": {"prompt-completion", "classification", "text"},
    "classification": {"text"},
} | {name: {"classification", "text"} for name in _CHAT}
"""Formats that a format leaves behind, since their keys are common as further columns."""

_USUAL = {
    "messages": ("dialogue", "dialog", "chat", "turns"),
    "conversations": ("dialogue", "dialog", "chat", "turns"),
    "instruction": ("question", "query", "problem", "user", "human"),
    "input": ("context",),
    "output": ("response", "answer", "solution", "assistant", "reply", "target"),
    "prompt": ("question", "query", "problem", "inputs"),
    "completion": ("response", "answer", "solution", "targets"),
    "text": ("content", "document", "sentence", "review", "premise"),
    "text_pair": ("sentence2", "hypothesis"),
    "chosen": ("accepted", "preferred", "positive", "winner"),
    "rejected": ("dispreferred", "negative", "loser"),
    "label": ("labels", "class", "category", "sentiment", "target"),
}
"""Names that other data sets use, offered when a key is missing."""


@dataclass(frozen=True, slots=True)
class Recognized:
    """The format of a file."""

    name: str
    """A key of `FORMATS`."""
    unit: str
    """What its rows are: dialogue, text, preference, graded or labelled."""
    why: str
    """One sentence with the keys that told it, for users."""
    columns: Mapping[str, str]
    """Our names mapped to the file's, as the recipe gives them."""


def recognize(records: Sequence[Record], columns: Mapping[str, str], wanted: str | None = None) -> Recognized:
    """The format of rows by the keys of the first 100: each votes for the format whose needed keys it fills in.

    `wanted` narrows the choice to a format or a unit. Raises `DataError` when no format or more than one fits.
    """
    choice = _choice(columns, wanted)
    sample = records[:SAMPLE]
    if not sample:
        raise DataError("no rows to tell the format from", "give a file with at least one row")
    votes = Counter(_fitting(record, columns, choice, filled=True) for record in sample)
    del votes[()]
    if not votes:  # every row lacks a value: the keys alone decide
        votes = Counter(_fitting(record, columns, choice, filled=False) for record in sample)
        del votes[()]
    if not votes:
        raise _unknown(sample, columns, choice, wanted)
    best, count = votes.most_common(1)[0]
    if len(best) > 1:
        needs = " and ".join(f"{name} ({_needs(name)})" for name in best)
        one = FORMATS[best[0]].needs[0]
        raise DataError(
            f"{sample[0].place}: the rows could be {needs}",
            f"say which keys count, as in `columns: {{{one}: {columns.get(one, one)}}}`, or remove the others",
        )
    _check_columns(sample, columns)
    keys = ", ".join(repr(columns.get(key, key)) for key in _read_keys(sample, best[0], columns))
    share = "" if count == len(sample) else f" ({count} of the first {len(sample)})"
    why = f"read as {best[0]}, since its rows{share} have {keys}"
    return Recognized(best[0], FORMATS[best[0]].unit, why, dict(columns))


def _choice(columns: Mapping[str, str], wanted: str | None) -> tuple[str, ...]:
    """The formats that have every key of `columns` and are what is wanted."""
    if wanted is not None and wanted not in FORMATS and wanted not in UNITS:
        raise DataError(f"no format {wanted!r}", nearest(wanted, FORMATS))
    known = {key for format in FORMATS.values() for key in format.keys} | {"id", "task"}
    for key in columns:
        if key not in known:
            raise DataError(f"columns: no format has the key {key!r}", nearest(key, known))
    own = set(columns) - {"id", "task"}
    names = [name for name, known in FORMATS.items() if wanted in (None, name, known.unit) and own <= set(known.keys)]
    if not names:
        what = "one format" if wanted is None else f"{wanted} rows"
        raise DataError(f"columns: {', '.join(sorted(own))} are not keys of {what}", "correct `columns`")
    return tuple(names)


def _fitting(record: Record, columns: Mapping[str, str], choice: Sequence[str], filled: bool) -> tuple[str, ...]:
    """The formats whose needed keys a record has, without those that another one beats."""
    found = []
    for name in choice:
        present = _present(record, name, columns, filled)
        needs = set(FORMATS[name].needs)
        if name == "sharegpt" and "conversation" in present:
            needs = {"conversation"}
        own = set(columns) & set(FORMATS[name].needs)
        if needs <= present and own <= present:
            found.append(name)
    beaten = {loser for name in found for loser in _BEATEN.get(name, ())}
    return tuple(name for name in found if name not in beaten)


def _present(record: Record, name: str, columns: Mapping[str, str], filled: bool) -> set[str]:
    given = given_of(record, FORMATS[name].keys, columns)
    if filled:
        return {key for key, value in given.values.items() if value != ""}
    return {key for key, own in given.names.items() if own in record.fields}


def _read_keys(sample: Sequence[Record], name: str, columns: Mapping[str, str]) -> list[str]:
    """The keys of a format that the rows have, in the format's order."""
    present: set[str] = set()
    for record in sample:
        present |= _present(record, name, columns, filled=False)
    return [key for key in FORMATS[name].keys if key in present]


def _needs(name: str) -> str:
    return ", ".join(FORMATS[name].needs)


def _check_columns(sample: Sequence[Record], columns: Mapping[str, str]) -> None:
    """Raise `DataError` for a name in `columns` that no row has."""
    keys = list(dict.fromkeys(key for record in sample for key in record.fields))
    folded = {fold(key) for key in keys}
    for key, own in columns.items():
        if fold(own) not in folded:
            raise DataError(
                f"{sample[0].place.rpartition(':')[0]}: `columns` has {key}: {own}, which no row has",
                nearest(own, [key[:40] for key in keys[:20]]),
            )


def _unknown(
    sample: Sequence[Record], columns: Mapping[str, str], choice: Sequence[str], wanted: str | None
) -> DataError:
    """The error for rows of no format, with the nearest one."""
    keys = list(dict.fromkeys(key for record in sample for key in record.fields))
    listed = ", ".join(repr(key[:40]) for key in keys[:8]) + (", …" if len(keys) > 8 else "")
    seen = f"{sample[0].place.rpartition(':')[0]}: the rows have {listed or 'no keys'}"
    _check_columns(sample, columns)
    others = [name for name in FORMATS if name not in choice]
    fits = [name for record in sample[:10] for name in _fitting(record, columns, others, filled=True)]
    if wanted is not None and fits:
        return DataError(f"{seen}, which is {fits[0]}; {wanted} is needed: {_table(choice)}", _guess(keys, choice))
    return DataError(f"{seen}, which no format has: {_table(choice)}", _guess(keys, choice))


def _table(choice: Sequence[str]) -> str:
    return ", ".join(f"{name} needs {_needs(name).replace(', ', ' + ')}" for name in choice)


def _guess(keys: Sequence[str], choice: Sequence[str]) -> str:
    """A setting of `columns` that would make some format fit, from near and usual names."""
    folded = {fold(key): key for key in reversed(keys)}
    for name in sorted(choice, key=lambda name: -len(FORMATS[name].needs)):
        pairs: dict[str, str] = {}
        for key in FORMATS[name].keys:
            if key in folded:
                pairs[key] = folded[key]
                continue
            optional = key in FORMATS[name].optional
            near = get_close_matches(key, folded, n=1, cutoff=0.75) if not optional else []
            near += [usual for usual in _USUAL.get(key, ()) if usual in folded]
            own = next((folded[found] for found in near if folded[found] not in pairs.values()), None)
            if own is not None:
                pairs[key] = own
            elif not optional:
                break
        else:
            told = ", ".join(f"{key}: {own}" for key, own in pairs.items() if key != own)
            return f"name the right ones, as in `columns: {{{told}}}`"
    return f"name the right ones, as in `columns: {{{FORMATS[choice[-1]].needs[0]}: NAME}}`"


def read_row(record: Record, recognized: Recognized) -> AnyRow:
    """The row of a record; raises `BadRow` with its place, the reason and a snippet."""
    known = FORMATS[recognized.name]
    return known.read(given_of(record, known.keys, recognized.columns))


def read_rows_of(
    path: Path, columns: Mapping[str, str], faults: Faults | None = None, wanted: str | None = None
) -> tuple[Recognized, Iterator[AnyRow]]:
    """The format of a file and its rows, one by one; bad rows are added to `faults`, or raised without it.

    Raises `DataError` for a file that cannot be read, has no good row among the first, or is in no format.
    """
    records = iterate_records(path, faults)
    sample = list(islice(records, SAMPLE))
    if not sample and faults is not None:
        raise DataError(f"{path}: none of the {faults.count:,} rows can be read: {faults.first()}", "correct the file")
    recognized = recognize(sample, columns, wanted)
    return recognized, _rows(chain(sample, records), recognized, faults)


def _rows(records: Iterator[Record], recognized: Recognized, faults: Faults | None) -> Iterator[AnyRow]:
    for record in records:
        try:
            row = read_row(record, recognized)
        except BadRow as bad:
            settle(faults, bad)
            continue
        yield row
