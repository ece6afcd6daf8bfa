"""Rows that say the same: exact and near duplicates, contradictions, and rows that another file has too."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from graft.curation.findings import View
from graft.data.dialogue import Graded, Preference
from graft.data.formats import AnyRow
from graft.splits import group_near_equal, normal_form

SHORT = 60
"""Letters and digits of an answer that has to be equal, not only near, for rows to be near duplicates."""

_FIGURES = re.compile(r"\d+|(?<=[\d\s])[-+*/^<>=×÷%](?=[\d\s])")


@dataclass(frozen=True, slots=True)
class Mark:
    """What is kept of a row to compare it with all others: digests of 16 bytes and the text."""

    place: str
    """`file:line`."""
    whole: bytes
    """Of everything the row teaches; equal for exact duplicates."""
    prompt: bytes
    """Of the prompt, or the text where there is no answer, without regard to case and spaces."""
    question: bytes
    """Of what has one right answer: the prompt, with both answers of a preference, with a graded answer."""
    answer: bytes
    """Of the answer, label or verdict; empty where there is none."""
    kind: bytes
    """Of what near duplicates have to share exactly: label, figures and signs between them, a short answer."""
    text: str
    """Prompt and answer, for near equality."""


def mark_of(row: AnyRow, view: View) -> Mark:
    """What is kept of a row."""
    prompt = _digest(_folded(view.prompt))
    question, answer = prompt, _digest(_folded(view.answer)) if view.answer else b""
    if isinstance(row, Preference):
        sides = [_folded("\n".join(turn.content for turn in side)) for side in (row.chosen, row.rejected)]
        question, answer = _digest(_folded(view.prompt), *sorted(sides)), _digest(sides[0])
    elif isinstance(row, Graded):
        question, answer = _digest(_folded(view.prompt), _folded(view.answer)), str(row.good).encode()
    elif view.label is not None:
        answer = _digest(view.label)
    short = normal_form(view.answer) if len(view.answer) <= 2 * SHORT else ""
    figures = "" if not re.search(r"\d", view.whole) else " ".join(_FIGURES.findall(view.whole))
    return Mark(
        place=view.place,
        whole=_digest(view.prompt, view.answer, view.label or "", *view.roles, repr(getattr(row, "tools", ()))),
        prompt=prompt,
        question=question,
        answer=answer,
        kind=_digest(view.label or "", figures, short if len(short) <= SHORT else "", *view.roles),
        text=view.whole,
    )


def duplicates(marks: Sequence[Mark]) -> dict[int, int]:
    """The row (number) that each exact duplicate repeats: the first of them."""
    first: dict[bytes, int] = {}
    return _later(first.setdefault(mark.whole, number) for number, mark in enumerate(marks))


def near_groups(
    marks: Sequence[Mark], others: Sequence[Mark] = (), progress: Callable[[float], None] | None = None
) -> list[int]:
    """The group of near-equal text of each mark and then of each of `others`."""
    return group_near_equal([*(mark.text for mark in marks), *(mark.text for mark in others)], progress=progress)


def near_duplicates(marks: Sequence[Mark], groups: Sequence[int]) -> dict[int, int]:
    """The first row of the same group, label, figures and short answer, for each row after it."""
    first: dict[tuple[int, bytes], int] = {}
    pairs = zip(groups, marks, strict=False)
    return _later(first.setdefault((group, mark.kind), number) for number, (group, mark) in enumerate(pairs))


def conflicts(marks: Sequence[Mark]) -> dict[int, int]:
    """The first row with the same question and another answer, for each row whose answer differs from it."""
    first: dict[bytes, int] = {}
    found = {}
    for number, mark in enumerate(marks):
        earlier = first.setdefault(mark.question, number) if mark.answer else number
        if marks[earlier].answer != mark.answer:
            found[number] = earlier
    return found


def overlap(marks: Sequence[Mark], others: Sequence[Mark], groups: Sequence[int]) -> dict[int, tuple[int, bool]]:
    """(row of `others`, whether the prompt is the same) for each row that is near equal to one there, or shares
    its prompt. `groups` are those of `near_groups` for both."""
    prompts = {mark.prompt: number for number, mark in reversed(list(enumerate(others)))}
    near: dict[int, int] = {}
    for number, group in enumerate(groups[len(marks) :]):
        near.setdefault(group, number)
    found = {}
    for number, mark in enumerate(marks):
        if mark.prompt in prompts:
            found[number] = prompts[mark.prompt], True
        elif groups and groups[number] in near:
            found[number] = near[groups[number]], False
    return found


def _later(firsts: Iterable[int]) -> dict[int, int]:
    return {number: first for number, first in enumerate(firsts) if first != number}


def _digest(*parts: str) -> bytes:
    joined = "\0".join(part.replace("\0", "\0\0") for part in parts)
    return blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
