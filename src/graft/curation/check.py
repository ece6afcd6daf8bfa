"""Checking data: one pass over the rows, and a report of what would spoil training or its result."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graft.curation import copies, private, signs
from graft.curation.copies import Mark, mark_of
from graft.curation.findings import EXAMPLES, Example, Finding, Lengths, Report, Severity, lengths_of, snippet, view_of
from graft.curation.labels import label_findings
from graft.curation.source import Source, open_source, order_of, share_read
from graft.curation.survey import SIGNS, Sign, Survey, on_whole
from graft.data.formats import AnyRow
from graft.errors import DataError

Watch = Callable[[str, float], None]
"""Told what is being done and the share that is done."""


@dataclass(frozen=True)
class Options:
    """What a check is asked for beside the source."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Field names to the file's."""
    format: str | None = None
    """The format, where it shall not be recognized."""
    model: str | None = None
    """A model whose tokenizer counts tokens: a starter, a folder or a hub id."""
    max_length: int = 1024
    """Tokens a row may have, with `model`."""
    test: str | None = None
    """A file whose rows shall not be in this one."""
    sample: int | None = None
    """Only the first this many rows are read."""


def check(given: str, options: Options | None = None, watch: Watch | None = None) -> Report:
    """Read a file, starter data or task source once, and report what was found.

    The rows' texts are held in memory for comparison, everything else is a running count.
    Raises `DataError` for a source that is missing, of no known format, or has no row at all.
    """
    options, tell = options or Options(), watch or (lambda what, share: None)
    tokenizer = _tokenizer(options)
    tests = _tests(tokenizer)
    tested = marks_of(options.test, options.columns) if options.test else []
    source = open_source(given, options.columns, options.format)
    survey = Survey()
    where = share_read(given)
    kept: list[AnyRow] = []
    for number, item in enumerate(source.items):
        if options.sample is not None and number >= options.sample:
            break
        survey.see(item, tests)
        if tokenizer is not None and item.row is not None:
            kept.append(item.row)
        if number % 500 == 0:
            tell("reading", 0.5 * where(item.place))
    findings = [_unreadable(source, len(survey.marks)), *_sign_findings(survey, tests)]
    findings += _copy_findings(survey, tested, options.test or "", tell)
    findings += [_piled(survey), _outliers(survey)]
    findings += label_findings(survey.labels, survey.label_places) if source.unit == "labelled" else []
    lengths = [lengths_of("characters", survey.lengths)] if survey.lengths else []
    if tokenizer is not None and kept:
        from graft.curation.tokens import token_findings

        more, counted = token_findings(tokenizer, kept, options.max_length, tell)
        findings += more
        lengths.append(counted)
    return _report(source, survey, lengths, findings)


def _report(source: Source, survey: Survey, lengths: list[Lengths], findings: Iterable[Finding | None]) -> Report:
    order: tuple[Severity, ...] = ("error", "warning", "note")
    found = [finding for finding in findings if finding is not None]
    return Report(
        source=source.name,
        file=source.file,
        format=source.format,
        why=source.why,
        unit=source.unit,
        rows=len(survey.marks),
        lengths=tuple(lengths),
        labels=dict(survey.labels.most_common()),
        roles=dict(survey.roles.most_common()),
        turns=(min(survey.turns), max(survey.turns)) if survey.turns else (0, 0),
        findings=tuple(sorted(found, key=lambda finding: order.index(finding.severity))),
    )


def marks_of(given: str, columns: Mapping[str, str], wanted: str | None = None) -> list[Mark]:
    """The marks of every row of a source that can be read; used for the other file of an overlap.

    The format of the file that is checked need not be that of the other, so `wanted` may be left out; columns apply
    where the other file has them. Raises `DataError` for a row that cannot be read, since it could not be compared.
    """
    try:
        source = open_source(given, columns, wanted)
    except DataError:
        if not columns:
            raise
        source = open_source(given, {}, wanted)
    marks = [mark_of(item.row, view_of(item.row)) for item in source.items if item.row is not None]
    if source.faults.count:
        raise DataError(f"{given}: {source.faults.count:,} rows cannot be read: {source.faults.first()}", "correct it")
    return marks


# Findings -------------------------------------------------------------------------------------------


def _unreadable(source: Source, rows: int) -> Finding | None:
    faults = source.faults
    if not faults.count:
        return None
    examples = tuple(
        Example(fault.place, fault.reason + (f": {private.masked(fault.snippet)}" if fault.snippet else ""))
        for fault in sorted(faults.rows, key=lambda fault: order_of(fault.place))[:EXAMPLES]
    )
    means = "rows cannot be read" if rows else "no row can be read"
    advice = "correct or drop them; `graft data clean` drops them" if rows else "check the format or `--column`"
    return Finding("unreadable", faults.count, faults.count / (rows + faults.count), "error", means, advice, examples)


def _sign_findings(survey: Survey, tests: Sequence[Sign]) -> Iterator[Finding]:
    for sign in tests:
        count = survey.counts[sign.name]
        if count:
            share = count / len(survey.marks)
            severity: Severity = "warning" if share >= sign.warns else "note"
            yield Finding(sign.name, count, share, severity, sign.means, sign.advice, tuple(survey.found[sign.name]))


def _copy_findings(survey: Survey, tested: Sequence[Mark], test: str, tell: Watch) -> Iterator[Finding]:
    marks = survey.marks
    if not marks:
        return
    same = copies.duplicates(marks)
    if len(same) == len(marks) - 1 and same:
        means = "all rows are the same"
        yield Finding("identical", len(marks), 1.0, "error", means, "check the export", _pairs(marks, marks, same))
    groups = copies.near_groups(marks, tested, lambda share: tell("comparing", 0.5 + 0.3 * share))
    near = {row: first for row, first in copies.near_duplicates(marks, groups).items() if row not in same}
    torn = copies.conflicts(marks)
    labelled = bool(survey.labels)
    first = "`graft data clean` keeps the first"
    near_means = "rows are 80 % equal to another, with the same figures, negations, names and short answer"
    torn_means = "the same text has different labels" if labelled else "the same prompt has different answers"
    decide = "decide which is right; `graft data clean --drop conflicts` keeps the first"
    yield from _pair_finding("duplicates", marks, same, "rows repeat another row exactly", first)
    yield from _pair_finding("near-duplicates", marks, near, near_means, first)
    yield from _pair_finding("conflicts", marks, torn, torn_means, decide, always=labelled)
    if tested:
        yield from _overlap(marks, tested, copies.overlap(marks, tested, groups), test)


def _pair_finding(
    name: str, marks: Sequence[Mark], found: Mapping[int, int], means: str, advice: str, always: bool = False
) -> Iterator[Finding]:
    """A finding about rows and the earlier ones they are like: a warning from 1 % of the rows, or `always`."""
    if found:
        share = len(found) / len(marks)
        severity: Severity = "warning" if always or share >= 0.01 else "note"
        yield Finding(name, len(found), share, severity, means, advice, _pairs(marks, marks, found))


def _overlap(
    marks: Sequence[Mark], tested: Sequence[Mark], found: Mapping[int, tuple[int, bool]], test: str
) -> Iterator[Finding]:
    """Rows that the test file has too: an error when half of the test rows are known."""
    if not found:
        return
    prompts = {mark.prompt for mark in marks}
    known = sum(mark.prompt in prompts for mark in tested)
    exact = sum(same for _, same in found.values())
    means = f"{exact:,} rows have a prompt or text of {test}, {len(found) - exact:,} are near equal to one"
    advice = f"results on it would be too good; `graft data clean --test {test}` drops them"
    severity: Severity = "error" if known >= 0.5 * len(tested) else "warning"
    pairs = _pairs(marks, tested, {row: other for row, (other, _) in found.items()})
    yield Finding("overlap", len(found), len(found) / len(marks), severity, means, advice, pairs)


def _pairs(marks: Sequence[Mark], others: Sequence[Mark], found: Mapping[int, int]) -> tuple[Example, ...]:
    return tuple(
        Example(marks[row].place, f"as {others[first].place}: {snippet(private.masked(marks[row].text))}")
        for row, first in list(found.items())[:EXAMPLES]
    )


def _piled(survey: Survey) -> Finding | None:
    """The longest rows all having one length, as a limit in characters leaves them."""
    distinct = {mark.text: mark.place for mark in survey.marks}
    longest = max(map(len, distinct), default=0)
    piled = [(text, place) for text, place in distinct.items() if len(text) == longest]
    if longest < 100 or len(piled) < max(5, 0.01 * len(distinct)):
        return None
    examples = tuple(Example(place, f"…{snippet(private.masked(text[-60:]))}") for text, place in piled[:EXAMPLES])
    means = f"{len(piled):,} texts have exactly {longest:,} characters, and none has more: a limit cut them"
    return Finding(
        "piled-up", len(piled), len(piled) / len(survey.marks), "warning", means, "export them whole", examples
    )


def _outliers(survey: Survey) -> Finding | None:
    """Rows in another writing than nine tenths of the file."""
    counts = Counter(script for script in survey.scripts if script)
    main, most = counts.most_common(1)[0] if counts else ("", 0)
    odd = [row for row, script in enumerate(survey.scripts) if script and script != main]
    if not odd or most < 0.9 * counts.total() or counts.total() < 20:
        return None
    examples = tuple(
        Example(survey.marks[row].place, f"{survey.scripts[row]}: {snippet(private.masked(survey.marks[row].text))}")
        for row in odd[:EXAMPLES]
    )
    share = len(odd) / len(survey.marks)
    means = f"most rows are written in {main}, these are not"
    return Finding("script", len(odd), share, "note", means, "drop them if they are not meant to be here", examples)


def _tokenizer(options: Options) -> Any:
    if options.model is None:
        return None
    from graft.model import load_tokenizer

    return load_tokenizer(options.model)


def _tests(tokenizer: Any) -> tuple[Sign, ...]:
    """The signs, with the tokens of a model's own among the special ones."""
    if tokenizer is None:
        return SIGNS
    from graft.curation.tokens import special_tokens

    own = sorted(token for token in special_tokens(tokenizer).values() if len(token) > 3)
    if not own:
        return SIGNS
    pattern = re.compile("|".join(map(re.escape, own)))
    with_own = on_whole(lambda text: signs.special_token(text, pattern))
    return tuple(
        Sign(sign.name, with_own, sign.warns, sign.means, sign.advice) if sign.name == "special-tokens" else sign
        for sign in SIGNS
    )
