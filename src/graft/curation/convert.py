"""A source written anew: in another format, or divided into training, validation and test rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graft.curation.check import Watch
from graft.curation.findings import view_of
from graft.curation.source import open_source, share_read
from graft.curation.writing import as_line, check_target, kind_of_target, write_lines
from graft.data.formats import to_record
from graft.data.readers import FORMATS
from graft.errors import DataError, UsageError, nearest
from graft.reading.faults import BadRow
from graft.splits import group_near_equal, split_by_group

PARTS = ("train", "validation", "test")
"""The files of a split."""

_SHARES = "give two shares of 0 to 1 with a sum between 0 and 1"
_USUAL = {"dialogue": "messages", "text": "text", "preference": "preference"}
_USUAL |= {"graded": "unpaired-preference", "labelled": "classification"}


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    source: str
    """The source that was read."""
    target: str
    """The file that was written."""
    format: str
    """The format it was read as."""
    written: str
    """The format it was written in."""
    rows: int
    """Rows that were written."""
    faulty: tuple[tuple[str, str], ...]
    """(place, reason) of each row that could not be read or not be said in the other format."""


def convert(
    given: str,
    target: Path,
    to: str | None = None,
    columns: Mapping[str, str] | None = None,
    wanted: str | None = None,
    force: bool = False,
    watch: Watch | None = None,
) -> Converted:
    """Write the rows of a source in a format; without `to` in the usual one of its kind (messages for dialogues).

    Faulty rows are left out and named in the result. Raises `DataError` when no row is left, `UsageError` for an
    unknown format and a target that cannot be written.
    """
    if to is not None and to not in FORMATS:
        raise UsageError(f"no format {to!r}", nearest(to, FORMATS))
    tell = watch or (lambda what, share: None)
    check_target(target, [given], force)
    source = open_source(given, columns, wanted)
    written = to or _USUAL[source.unit]
    if kind_of_target(target) != ".jsonl" and written in ("messages", "sharegpt"):
        raise UsageError(f"{written} holds lists of turns, {target} is a table", "write .jsonl, or use --to alpaca")
    where = share_read(given)
    lines, faulty = [], []
    for number, item in enumerate(source.items):
        if number % 500 == 0:
            tell("reading", 0.9 * where(item.place))
        if item.row is None:
            continue
        try:
            lines.append(as_line(to_record(item.row, written)))
        except BadRow as bad:
            faulty.append((bad.place, bad.reason))
    faulty += [(fault.place, fault.reason) for fault in source.faults.rows]
    if not lines:
        place, reason = faulty[0]
        raise DataError(f"{place}: {reason}; no row of {len(faulty):,} can be written as {written}", "choose another")
    tell("writing", 0.9)
    write_lines(target, lines)
    return Converted(given, str(target), source.format, written, len(lines), tuple(faulty))


@dataclass(frozen=True)
class Divided:
    """What a split did."""

    source: str
    """The source that was read."""
    folder: str
    """The folder that was written."""
    rows: dict[str, int]
    """Rows of train, validation and test."""
    groups: int
    """Groups of rows with near-equal text or the same prompt, each in one part."""


def split(
    given: str,
    folder: Path,
    validation: float = 0.05,
    test: float = 0.15,
    columns: Mapping[str, str] | None = None,
    wanted: str | None = None,
    force: bool = False,
    watch: Watch | None = None,
) -> Divided:
    """Write train, validation and test.jsonl; neither the order of rows nor a seed matters.

    Near-equal rows stay together, and so do rows with the same prompt, whatever their answers. Shares are of all
    rows; 0 leaves a part out. Raises `DataError` for a faulty row and for a part without rows.
    """
    shares = {"validation": validation, "test": test}
    if not all(0 <= share < 1 for share in shares.values()) or not 0 < sum(shares.values()) < 1:
        raise UsageError(f"--val {validation:g} and --test {test:g} leave no training rows or nothing else", _SHARES)
    tell = watch or (lambda what, share: None)
    names = [name for name in PARTS if name == "train" or shares[name]]
    for name in PARTS:
        check_target(folder / f"{name}.jsonl", [given], force)
    source = open_source(given, columns, wanted)
    where = share_read(given)
    lines, texts, prompts = [], [], []
    for number, item in enumerate(source.items):
        if number % 500 == 0:
            tell("reading", 0.5 * where(item.place))
        if item.row is not None:
            lines.append(as_line(item.fields))
            view = view_of(item.row)
            texts.append(view.whole)
            prompts.append(view.prompt if view.roles else "")  # of a text, `prompt` is all of it
    if source.faults.count:
        what = f"{given}: {source.faults.count:,} rows cannot be read: {source.faults.first()}"
        raise DataError(what, "drop them with `graft data clean`")
    groups = group_near_equal(texts, progress=lambda share: tell("comparing", 0.5 + 0.4 * share), keys=prompts)
    fractions = {"train": 1 - sum(shares.values()), **{name: shares[name] for name in names[1:]}}
    parts = split_by_group(groups, fractions, texts)
    counts = {name: parts.count(name) for name in names}
    for name, count in counts.items():
        if not count:
            made = f"{len(lines)} rows in {len(set(groups))} groups of near-equal text or the same prompt"
            what = f"{given}: no row is left for {name}: {made}"
            raise DataError(what, "add rows, or leave out a part with --val 0 or --test 0")
    tell("writing", 0.9)
    for name in names:
        write_lines(folder / f"{name}.jsonl", [line for line, part in zip(lines, parts, strict=True) if part == name])
    if force:
        for name in set(PARTS) - set(names):
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
    return Divided(given, str(folder), counts, len(set(groups)))
