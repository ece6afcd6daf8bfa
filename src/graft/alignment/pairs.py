"""Preferences as token ids: two answers, each behind its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from graft.data.dialogue import Dialogue, Graded, Message, Preference
from graft.errors import DataError
from graft.rendering.render import Renderer
from graft.rendering.supervise import Preflight, Supervised, supervise


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers, the better one first. What asks for one row of ids gets the chosen answer."""

    chosen: Supervised
    rejected: Supervised
    place: str
    row: Preference

    @property
    def ids(self) -> Sequence[int]:
        """The chosen answer behind its prompt."""
        return self.chosen.ids

    @property
    def trained(self) -> Sequence[int]:
        """1 at the chosen answer's tokens."""
        return self.chosen.trained

    @property
    def prompt(self) -> int:
        """Tokens before the chosen answer."""
        return self.chosen.prompt

    def __len__(self) -> int:
        return max(len(self.chosen.ids), len(self.rejected.ids))


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer that was found good or not."""

    answer: Supervised
    good: bool
    place: str
    row: Graded

    @property
    def ids(self) -> Sequence[int]:
        """The answer behind its prompt."""
        return self.answer.ids

    @property
    def trained(self) -> Sequence[int]:
        """1 at the answer's tokens."""
        return self.answer.trained

    @property
    def prompt(self) -> int:
        """Tokens before the answer."""
        return self.answer.prompt

    def __len__(self) -> int:
        return len(self.answer.ids)


def sides(examples: Sequence[Pair | Judged]) -> list["Side"]:
    """The answers of some examples: all chosen ones, then the rejected ones, then those that were judged alone."""
    pairs = [example for example in examples if isinstance(example, Pair)]
    alone = [example for example in examples if isinstance(example, Judged)]
    chosen = [Side(pair.chosen, True, pair.place) for pair in pairs]
    rejected = [Side(pair.rejected, False, pair.place) for pair in pairs]
    return [*chosen, *rejected, *(Side(one.answer, one.good, one.place) for one in alone)]


@dataclass(frozen=True, slots=True)
class Side:
    """An answer behind its prompt, as what reads rows of ids takes it."""

    answer: Supervised
    good: bool
    place: str

    @property
    def ids(self) -> Sequence[int]:
        """Token ids."""
        return self.answer.ids

    @property
    def trained(self) -> Sequence[int]:
        """1 at the answer's tokens."""
        return self.answer.trained

    def __len__(self) -> int:
        return len(self.answer.ids)


def pair_examples(
    rows: Sequence[Preference], renderer: Renderer, max_length: int
) -> tuple[list[Pair], tuple[Preflight, Preflight]]:
    """Pairs of at most `max_length` tokens each, and what became of both sides. Pairs that lose a side are left out.

    Raises `DataError` for answers that are the same tokens.
    """
    better = [_dialogue(row.prompt, row.chosen, row) for row in rows]
    worse = [_dialogue(row.rejected_prompt or row.prompt, row.rejected, row) for row in rows]
    (first, told), (second, told_too) = (supervise(renderer, part, max_length) for part in (better, worse))
    chosen, rejected = ({example.row: example for example in part} for part in (first, second))
    pairs = []
    for number, row in enumerate(rows):
        if number in chosen and number in rejected:
            pair = Pair(chosen[number], rejected[number], row.place, row)
            if list(pair.chosen.ids) == list(pair.rejected.ids):
                raise DataError(f"{row.place}: chosen and rejected are the same tokens", "remove the row")
            pairs.append(pair)
    return pairs, (told, told_too)


def judged_examples(rows: Sequence[Graded], renderer: Renderer, max_length: int) -> tuple[list[Judged], Preflight]:
    """Single answers of at most `max_length` tokens, and what became of the rows."""
    kept, told = supervise(renderer, [_dialogue(row.prompt, row.completion, row) for row in rows], max_length)
    return [Judged(one, rows[one.row].good, one.place, rows[one.row]) for one in kept], told


def _dialogue(prompt: Sequence[Message], answer: Sequence[Message], row: Preference | Graded) -> Dialogue:
    """An answer behind its prompt, of which the answer alone is trained."""
    asked = (replace(turn, train=False) if turn.role == "assistant" else turn for turn in prompt)
    tools = row.tools if isinstance(row, Preference) else ()
    return Dialogue((*asked, *answer), row.id, row.place, tools)
