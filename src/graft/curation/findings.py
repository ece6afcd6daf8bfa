"""What a check finds: findings with examples, rows as a check sees them, and the report that holds them."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from graft.data.dialogue import Dialogue, Message, Preference
from graft.data.formats import AnyRow
from graft.data.rows import Row

Severity = Literal["error", "warning", "note"]

EXAMPLES = 5
"""The most examples a finding keeps."""

_SNIPPET = 100


@dataclass(frozen=True, slots=True)
class Example:
    """One row that a finding is about."""

    place: str
    """`file:line`."""
    snippet: str
    """What was found there, in one short line; personal data is masked."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of trouble, with the rows it was found in."""

    name: str
    """What `graft data clean --drop` and `--keep` call it."""
    count: int
    """Rows it was found in."""
    share: float
    """`count` as a share of all rows, from 0 to 1."""
    severity: Severity
    """error: the file cannot be used as it is; warning: training will likely suffer; note: worth knowing."""
    means: str
    """What it is, in one sentence."""
    advice: str
    """What to do about it."""
    examples: tuple[Example, ...] = ()
    """Up to five rows."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long rows are, in characters or tokens."""

    unit: str
    """"characters" or "tokens"; "tokens without a chat template" where dialogues are counted as texts."""
    p50: int
    """Half of the rows are at most this long."""
    p95: int
    """95 % of the rows are at most this long."""
    longest: int
    """The longest row."""
    histogram: tuple[tuple[int, int], ...]
    """(upper bound, rows up to it and above the bound before); bounds double."""


@dataclass(frozen=True)
class Report:
    """The answer of a check."""

    source: str
    """The file, starter data or task that was read."""
    file: str
    """The file behind it, as places name it."""
    format: str
    """The format it was recognized as."""
    why: str
    """By what it was recognized."""
    unit: str
    """"dialogue", "text", "preference", "graded" or "labelled"."""
    rows: int
    """Rows that could be read."""
    lengths: tuple[Lengths, ...]
    """In characters, and in tokens where a model was given."""
    labels: dict[str, int]
    """Rows of each label, the most frequent first; empty where rows have none."""
    roles: dict[str, int]
    """Turns of each role; empty where rows are no dialogues."""
    turns: tuple[int, int]
    """The fewest and the most turns of a dialogue; (0, 0) where rows are none."""
    findings: tuple[Finding, ...]
    """Errors first, then warnings, then notes."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that make the file unusable as it is."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def finding(self, name: str) -> Finding | None:
        """The finding of a name, if there is one."""
        return next((finding for finding in self.findings if finding.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class View:
    """A row of any kind as checks see it."""

    place: str
    """`file:line`."""
    prompt: str
    """What is given to the model: the turns before the answer; the text of a text or labelled row."""
    answer: str
    """What it is to learn to write: the last turn, both answers of a preference; empty for labelled rows."""
    label: str | None
    """The label, where there is one."""
    roles: tuple[str, ...]
    """The role of each turn, empty for texts."""
    written: tuple[str, ...]
    """Every text that the model learns to write: all turns of the assistant, or the text itself."""

    @property
    def whole(self) -> str:
        """Everything in the row, one text after the other."""
        return f"{self.prompt}\n{self.answer}" if self.prompt and self.answer else self.prompt or self.answer


def view_of(row: AnyRow) -> View:
    """A row as checks see it."""
    if isinstance(row, Row):
        text = row.text if row.text_pair is None else f"{row.text}\n{row.text_pair}"
        return View(row.place, text, "", row.label, (), (text,) if row.label is None else ())
    if isinstance(row, Dialogue):
        said = tuple(turn.content for turn in row.messages if turn.role == "assistant")
        if not row.prompt:  # a plain text
            return View(row.place, row.answer, "", None, (), (row.answer,))
        roles = tuple(turn.role for turn in row.messages)
        return View(row.place, _joined(row.prompt), _joined(row.messages[-1:]), None, roles, said)
    if isinstance(row, Preference):
        answers = (_joined(row.chosen), _joined(row.rejected))
        roles = tuple(turn.role for turn in (*row.prompt, *row.chosen))
        return View(row.place, _joined(row.prompt), "\n".join(answers), None, roles, answers[:1])
    answer = _joined(row.completion)
    roles = tuple(turn.role for turn in (*row.prompt, *row.completion))
    return View(row.place, _joined(row.prompt), answer, str(row.good).lower(), roles, (answer,) if row.good else ())


def _joined(turns: Sequence[Message]) -> str:
    return "\n".join(turn.content + "".join(f"\n{call}" for call in turn.tool_calls) for turn in turns)


def snippet(text: str, at: str = "") -> str:
    """A line of at most 100 characters of a text, around `at` where that is in it."""
    start = max(0, text.find(at) - _SNIPPET // 3) if at and len(text) > _SNIPPET else 0
    piece = re.sub(r"\s+", " ", text[start : start + 2 * _SNIPPET]).strip()
    plain = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in piece)
    plain = ("…" if start else "") + plain
    return plain if len(plain) <= _SNIPPET and start + 2 * _SNIPPET >= len(text) else plain[: _SNIPPET - 1] + "…"


def lengths_of(unit: str, given: Sequence[int]) -> Lengths:
    """Quantiles and a histogram of lengths; `given` is not empty."""
    ordered = sorted(given)
    last = len(ordered) - 1
    bounds: dict[int, int] = {}
    for length in ordered:
        bound = 1 << max(4, (length - 1).bit_length() if length else 0)
        bounds[bound] = bounds.get(bound, 0) + 1
    filled = range(min(bounds).bit_length() - 1, max(bounds).bit_length())
    histogram = tuple((1 << power, bounds.get(1 << power, 0)) for power in filled)
    return Lengths(unit, ordered[last // 2], ordered[int(last * 0.95)], ordered[last], histogram)
