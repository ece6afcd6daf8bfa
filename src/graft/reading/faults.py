"""Rows that cannot be used: what is wrong with them, and how many of them a run puts up with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.errors import DataError

_SHOWN = 60
"""Characters of a row that an error shows."""


class BadRow(DataError):
    """One row that cannot be used: its `place` (`file:line`), the `reason`, and a short `snippet` of it.

    `raw` may be set to the row as it stands in the file, where that is not its line.
    """

    def __init__(self, place: str, reason: str, remedy: str = "correct or remove the row", snippet: str = "") -> None:
        super().__init__(f"{place}: {reason}" + (f": {snippet}" if snippet else ""), remedy)
        self.place = place
        self.reason = reason
        self.snippet = snippet
        self.raw = ""


@dataclass(frozen=True, slots=True)
class Fault:
    """One row that was left out."""

    place: str
    """`file:line`, or `file:line[number]` for the elements of a JSON array that begin on one line."""
    reason: str
    """What is wrong, in one clause."""
    snippet: str = ""
    """Some characters of the row, as Python writes them."""


class Faults:
    """The bad rows of one file, which are left out as long as they are few.

    Raises `DataError` for a share outside 0 to 1.
    """

    def __init__(self, share: float, keep: int = 100_000, whole: bool = False) -> None:
        if not 0 <= share <= 1:
            raise DataError(f"the share of bad rows is {share}, allowed are 0 to 1", "0 allows none")
        self.share = share
        """The largest share of bad rows that `check` lets pass."""
        self.keep = keep
        """The most faults that are kept in memory; `count` goes on."""
        self.whole = whole
        """Whether `raw` is kept."""
        self.raw: dict[str, str] = {}
        """The row as it stands in the file, by place, where that is not its line."""
        self.rows: list[Fault] = []
        """The faults in the order they were found, `keep` at most."""
        self.count = 0
        """How many there are, whether kept or not."""

    def add(self, place: str, reason: str, snippet: str = "", raw: str = "") -> Fault:
        """Take down one bad row; what is taken down."""
        fault = Fault(place, reason, snippet)
        self.count += 1
        if len(self.rows) < self.keep:
            self.rows.append(fault)
            if self.whole and raw:
                self.raw[place] = raw
        return fault

    def check(self, path: Path, total_rows: int) -> None:
        """Raise `DataError` when more than `share` of all rows of the file, good and bad ones, are bad."""
        if self.count <= self.share * total_rows:
            return
        allowed = f"at most {self.share:.2%} may be" if self.share else "none may be"
        raise DataError(f"{path}: {self.count:,} of {total_rows:,} rows are bad, {allowed}: {self.first()}", _REMEDY)

    def first(self) -> str:
        """The first three faults in one line."""
        told = [f"line {fault.place.rpartition(':')[2]}: {fault.reason}" for fault in self.rows[:3]]
        return "; ".join([*told, "…"] if self.count > len(told) else told)


_REMEDY = "correct or remove them, or allow a larger share (skip_bad_rows)"


def settle(faults: Faults | None, bad: BadRow) -> None:
    """Take down a bad row, or raise it where none is allowed."""
    if faults is None:
        raise bad
    faults.add(bad.place, bad.reason, bad.snippet, bad.raw)


def snippet_of(text: str, at: int = 0) -> str:
    """Some 60 characters around the position `at` as Python writes them: one line, nothing invisible."""
    start = max(0, at - _SHOWN * 2 // 3)
    piece = text[start : start + _SHOWN]
    left, right = "…" if start else "", "…" if start + _SHOWN < len(text) else ""
    shown = repr(left + piece + right)
    return shown if len(shown) <= 2 * _SHOWN else repr(left + piece[: _SHOWN // 3] + "…")


def kind_of(value: Any) -> str:
    """What a JSON value is, in words, with the value when it is short."""
    names = {type(None): "null", bool: "a truth value", str: "a text", list: "a list", dict: "an object"}
    name = names.get(type(value), "a number")
    if value is None:
        return name
    # The repr of a text of 20 MB, or of a list of many, is not made only to be found too long.
    if isinstance(value, str | list | dict) and len(value) > 40:
        return name
    shown = repr(value)
    return name if len(shown) > 40 else f"{name} ({shown})"
