"""Rows that say the same: exact and near duplicates, contradictions, and rows that another file has too."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from graft.curation.findings import View
from graft.data.dialogue import Dialogue, Graded, Preference
from graft.data.formats import AnyRow
from graft.splits import group_near_equal, normal_form

SHORT = 60
"""Letters and digits of an answer that has to be equal, not only near, for rows to be near duplicates."""

_FIGURES = re.compile(r"\d+|(?<=[\d\s])[-+*/^<>=×÷%](?=[\d\s])")
_NOT = """
    not no never none nobody nothing neither nor without cannot
    nicht kein keine keinen keiner keinem keines nie niemals nichts niemand ohne weder
    ne pas jamais aucun aucune rien sans
    ni nunca jamás nada nadie ningún ninguna ninguno sin não nem nenhum sem
    non mai nessun nessuno nessuna senza не нет ни без никогда
"""
_NUMBERS = """
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million once twice half last
    first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth
    ein eins eine zwei drei vier fünf sechs sieben acht neun zehn elf zwölf
    erste ersten erster erstes zweite zweiten zweiter zweites dritte dritten dritter drittes
    vierte vierten vierter fünfte fünften fünfter sechste sechsten letzte letzten
    un une deux trois quatre cinq sept huit neuf dix onze douze premier première deuxième troisième quatrième
    uno una dos tres cuatro cinco seis siete ocho nueve diez once doce primero primera segundo segunda tercero tercera
"""
_TELLING = frozenset((_NOT + _NUMBERS).split())
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_UNSPACED = re.compile("[不没沒無无非未]|ない|ません")


@dataclass(frozen=True, slots=True)
class Mark:
    """What is kept of a row to compare it with all others: digests of 16 bytes and the text."""

    place: str
    """`file:line`."""
    whole: bytes
    """Of everything the row teaches, and which turns bear loss; equal for exact duplicates."""
    prompt: bytes
    """Of the prompt, or the text where there is no answer, without regard to case and spaces."""
    question: bytes
    """Of what has one right answer: the prompt, with both answers of a preference, with a graded answer."""
    answer: bytes
    """Of the answer, label or verdict; empty where there is none."""
    kind: bytes
    """Of what near duplicates have to share exactly: label, roles, turns that bear loss, tools, figures and signs
    between them, negations, number words, capitalised words, a short answer."""
    same: bytes
    """Of all in `kind` but the capitalised words, and of every letter: equal for rows that differ in case only."""
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
    shape = (view.label or "", *view.roles, repr(_trained(row)), repr(getattr(row, "tools", ())))
    apart = (*shape, short if len(short) <= SHORT else "", *_figures(view.whole), *_telling(view.whole))
    return Mark(
        place=view.place,
        whole=_digest(view.prompt, view.answer, *shape),
        prompt=prompt,
        question=question,
        answer=answer,
        kind=_digest(*apart, *_names(view.whole)),
        same=_digest(*apart, normal_form(view.whole)),
        text=view.whole,
    )


def _trained(row: AnyRow) -> list[bool | None]:
    """What the file says of each turn's loss."""
    return [turn.train for turn in row.messages] if isinstance(row, Dialogue) else []


def _figures(text: str) -> list[str]:
    return _FIGURES.findall(text) if re.search(r"\d", text) else []


def _telling(text: str) -> list[str]:
    """Negations and number words in their order; "don't" counts as "not"."""
    found = [] if text.isascii() else _UNSPACED.findall(text)
    words = (word.replace("’", "'") for word in _WORD.findall(text.casefold()))
    return [*found, *(_negation(word) for word in words if word in _TELLING or word.endswith("n't"))]


def _negation(word: str) -> str:
    return "not" if word == "cannot" or word.endswith("n't") else word


def _names(text: str) -> list[str]:
    """Words with a capital, in their order: of "Ask Anna of NASA" all but "of". Case alone is told by `Mark.same`."""
    return [word.casefold() for word in _WORD.findall(text) if len(word) > 1 and word[0].isupper()]


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
    """The first row that has the same group and kind, or the same letters, for each row after it."""
    kinds: dict[tuple[int, bytes], int] = {}
    letters: dict[bytes, int] = {}
    found = {}
    for number, (group, mark) in enumerate(zip(groups, marks, strict=False)):
        earlier = letters.get(mark.same, kinds.get((group, mark.kind), number))
        letters.setdefault(mark.same, earlier)
        kinds.setdefault((group, mark.kind), earlier)
        if earlier != number:
            found[number] = earlier
    return found


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
