"""Cleaning data: rows that a check finds fault with are repaired or dropped, and every dropped row is kept beside.

The same input gives the same bytes, and cleaning what was cleaned changes nothing.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.curation import copies, private, signs
from graft.curation.check import Watch, marks_of
from graft.curation.copies import Mark, mark_of
from graft.curation.findings import view_of
from graft.curation.source import Item, Source, open_source, order_of, raw_rows, share_read
from graft.curation.survey import SIGNS
from graft.curation.writing import as_line, check_target, write_lines
from graft.data.formats import AnyRow, Recognized, read_row
from graft.errors import DataError, GraftError, UsageError, nearest
from graft.reading.faults import BadRow
from graft.reading.files import Record

RULES: Mapping[str, bool] = {
    "unreadable": True,
    "empty": True,
    "placeholders": False,
    "mojibake": True,
    "refusals": True,
    "duplicates": True,
    "near-duplicates": True,
    "overlap": True,
    "conflicts": False,
    "personal": False,
    "special-tokens": False,
    "cut": False,
    "control": False,
    "invisible": False,
    "long-words": False,
}
"""Every rule, and whether it drops rows unless it is told otherwise."""

PII = ("keep", "mask", "drop")
"""What can be done with personal data."""

_SIGNS = {sign.name: sign for sign in SIGNS}


@dataclass(frozen=True)
class Policy:
    """Which rules drop rows, and what else cleaning is asked for."""

    drop: frozenset[str] = frozenset(name for name, default in RULES.items() if default)
    """Rules that drop rows; the others let them pass."""
    pii: str = "keep"
    """Personal data: keep, mask or drop."""
    test: str | None = None
    """A file whose rows shall not be in the cleaned one."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field names to the file's."""
    format: str | None = None
    """The format, where it shall not be recognized."""


def policy(keep: Iterable[str] = (), drop: Iterable[str] = (), **more: Any) -> Policy:
    """The default rules without those of `keep` and with those of `drop`; `more` are fields of `Policy`.

    Raises `UsageError` for an unknown rule, one that is kept and dropped, and an unknown way with personal data.
    """
    keep, drop = set(keep), set(drop)
    for name in sorted(keep | drop):
        if name not in RULES:
            raise UsageError(f"no rule {name!r}", nearest(name, RULES))
        if name in keep & drop:
            raise UsageError(f"the rule {name!r} is to keep and to drop", "give one of them")
    if more.get("pii", "keep") not in PII:
        raise UsageError(f"--pii is {more['pii']!r}", nearest(str(more["pii"]), PII))
    if more.get("pii", "keep") == "keep" and "personal" in drop:
        more["pii"] = "drop"
    chosen = {name for name, default in RULES.items() if default} - keep | drop
    if more.get("pii") == "drop":
        chosen.add("personal")
    return Policy(drop=frozenset(chosen), **more)


@dataclass(frozen=True)
class Cleaned:
    """What cleaning did."""

    source: str
    """The file that was read."""
    target: str
    """The file that was written."""
    dropped_file: str
    """The file with the dropped rows; empty when none was dropped."""
    rows: int
    """Rows that were read, with those that are faulty."""
    kept: int
    """Rows that were written."""
    dropped: dict[str, int]
    """Rows dropped by rule."""
    repaired: int
    """Rows whose broken encoding was repaired."""
    masked: int
    """Rows whose personal data was masked."""
    personal: int
    """Rows with personal data that was kept as it is."""


@dataclass(slots=True)
class _Kept:
    """A row that has passed the rules for single rows; as a line it takes a fraction of the memory."""

    line: str
    mark: Mark


@dataclass
class _Work:
    """What one pass over the rows leaves: rows to compare, rows dropped, and counts."""

    kept: list[_Kept] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def drop(self, place: str, rule: str, reason: str, row: Any, like: str = "") -> None:
        """Take down a row that is left out."""
        told = {"place": place, "rule": rule, "reason": reason}
        self.dropped.append(told | ({"duplicates": like} if like else {}) | {"row": row})

    def by_rule(self) -> dict[str, int]:
        """Dropped rows by rule, the most frequent first."""
        return dict(Counter(told["rule"] for told in self.dropped).most_common())


def clean(
    given: str, target: Path, chosen: Policy | None = None, force: bool = False, watch: Watch | None = None
) -> Cleaned:
    """Read `given`, repair and drop rows, write `target` and, beside it, `target.dropped.jsonl`, each whole.

    Rows keep their fields and order. Raises `DataError` when no row is left, and `UsageError` for a target that
    exists (without `force`), that is the input or the test file, or of another kind than JSONL, CSV or TSV.
    """
    chosen, tell = chosen or Policy(), watch or (lambda what, share: None)
    beside = target.with_name(f"{target.name}.dropped.jsonl")
    for path in (target, beside):
        check_target(path, [given, *([chosen.test] if chosen.test else [])], force)
    source = open_source(given, chosen.columns, chosen.format)
    tested = marks_of(chosen.test, chosen.columns) if chosen.test else []
    work = _single_rows(source, chosen, share_read(given), tell)
    rows = len(work.kept) + len(work.dropped)
    while _compare(work, chosen, tested, tell):  # rows that stood between two others may have hidden that they are near
        pass
    if not work.kept:
        rules = ", ".join(f"{count:,} {name}" for name, count in work.by_rule().items())
        raise DataError(f"{given}: no row is left of {rows:,} ({rules})", "keep some of them with --keep RULE")
    work.dropped.sort(key=lambda told: order_of(told["place"]))
    tell("writing", 0.95)
    if work.dropped:
        write_lines(beside, [as_line(told) for told in work.dropped])
    elif force:
        beside.unlink(missing_ok=True)
    try:
        write_lines(target, [kept.line for kept in work.kept])
    except GraftError:
        beside.unlink(missing_ok=True)
        raise
    return Cleaned(
        source=given,
        target=str(target),
        dropped_file=str(beside) if work.dropped else "",
        rows=rows,
        kept=len(work.kept),
        dropped=work.by_rule(),
        repaired=work.counts["repaired"],
        masked=work.counts["masked"],
        personal=work.counts["personal"],
    )


# Single rows ----------------------------------------------------------------------------------------


def _single_rows(source: Source, chosen: Policy, where: Callable[[str], float], tell: Watch) -> _Work:
    """Repair, mask and judge each row by itself."""
    work = _Work()
    rules = [_SIGNS[rule] for rule in RULES if rule in _SIGNS and rule in chosen.drop]
    recognized = Recognized(source.format, source.unit, source.why, dict(chosen.columns))
    told: set[int] = set()  # faults, each an object of its own
    for number, item in enumerate(source.items):
        if number % 500 == 0:
            tell("reading", 0.5 * where(item.place))
        if item.row is None:
            assert item.fault is not None
            told.add(id(item.fault))
            work.drop(item.place, "unreadable", item.fault.reason, dict(item.fields))
            continue
        try:
            fields, row = _mended(item, recognized, chosen, work.counts)
        except BadRow as bad:  # nothing but masked text can be too little to train on
            work.drop(item.place, "unreadable", bad.reason, dict(item.fields))
            continue
        view = view_of(row)
        for sign in rules:
            if shown := sign.shown(view):
                work.drop(item.place, sign.name, shown, dict(item.fields))
                break
        else:
            work.counts["personal"] += private.personal(view.whole) is not None
            work.kept.append(_Kept(as_line(fields), mark_of(row, view)))
    others = [fault for fault in source.faults.rows if id(fault) not in told]
    raw = raw_rows(source.file, others, source.faults.raw)
    for fault in others:
        work.drop(fault.place, "unreadable", fault.reason, raw.get(fault.place, fault.snippet))
    if "unreadable" not in chosen.drop and source.faults.count:
        first = source.faults.first()
        raise DataError(f"{source.name}: {source.faults.count:,} rows cannot be read: {first}", "correct them")
    return work


def _mended(
    item: Item, recognized: Recognized, chosen: Policy, counts: Counter[str]
) -> tuple[Mapping[str, Any], AnyRow]:
    """The fields of a row with broken encodings repaired and personal data masked, and the row of them."""
    assert item.row is not None
    fields, changed = item.fields, False
    for name, wanted, mend in (
        ("repaired", "mojibake" in chosen.drop, signs.repaired),
        ("masked", chosen.pii == "mask", private.masked),
    ):
        if wanted:
            after = _each_text(fields, mend)
            counts[name] += after != fields
            changed, fields = changed or after != fields, after
    return fields, read_row(Record(dict(fields), item.place), recognized) if changed else item.row


def _each_text(value: Any, mend: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return mend(value)
    if isinstance(value, list):
        return [_each_text(inner, mend) for inner in value]
    return {key: _each_text(inner, mend) for key, inner in value.items()} if isinstance(value, Mapping) else value


# Rows beside each other -----------------------------------------------------------------------------


def _compare(work: _Work, chosen: Policy, tested: list[Mark], tell: Watch) -> bool:
    """Drop rows for what other rows say; whether near equality dropped any."""

    def leave(rule: str, found: Mapping[int, str], reason: str) -> None:
        for number, like in found.items():
            kept = work.kept[number]
            work.drop(kept.mark.place, rule, reason, json.loads(kept.line), like)
        work.kept = [kept for number, kept in enumerate(work.kept) if number not in found]

    def places(found: Mapping[int, int]) -> dict[int, str]:
        return {number: work.kept[first].mark.place for number, first in found.items()}

    def marks() -> list[Mark]:
        return [kept.mark for kept in work.kept]

    if "duplicates" in chosen.drop:
        leave("duplicates", places(copies.duplicates(marks())), "the same row stands before it")
    if "conflicts" in chosen.drop:
        leave("conflicts", places(copies.conflicts(marks())), "the same prompt or text has another answer before it")
    if not {"near-duplicates", "overlap"} & chosen.drop or not (tested or "near-duplicates" in chosen.drop):
        return False
    groups = copies.near_groups(marks(), tested, lambda share: tell("comparing", 0.5 + 0.4 * share))
    before = len(work.kept)
    shared = copies.overlap(marks(), tested, groups) if "overlap" in chosen.drop else {}
    known = {number: tested[other].place for number, (other, _) in shared.items()}
    groups = [group for number, group in enumerate(groups[:before]) if number not in known]
    leave("overlap", known, "the test file has its prompt or a text that is near equal")
    if "near-duplicates" in chosen.drop:
        leave("near-duplicates", places(copies.near_duplicates(marks(), groups)), "a near equal row stands before it")
    return 0 < len(work.kept) < before
