"""Preferences as token ids: two answers, each behind its prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from graft.data.dialogue import Dialogue, Graded, Message, Preference
from graft.errors import DataError
from graft.rendering.render import Renderer
from graft.rendering.supervise import Supervised, supervise


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

    @property
    def prompt(self) -> int:
        """Tokens before the answer."""
        return self.answer.prompt

    def __len__(self) -> int:
        return len(self.answer.ids)


def read_answers(
    rows: Sequence[Preference | Graded], renderer: Renderer, max_length: int, say: Callable[[str], None]
) -> list[Pair | Judged]:
    """Pairs, then answers that were judged alone, of at most `max_length` tokens each. `say` is told what became of
    each side; pairs that lose one are left out.

    Raises `DataError` for answers of a pair that are the same tokens, and where too many rows would train nothing.
    """
    pairs = [row for row in rows if isinstance(row, Preference)]
    alone = [row for row in rows if isinstance(row, Graded)]
    given = {
        "chosen": [_dialogue(row.prompt, row.chosen, row) for row in pairs],
        "rejected": [_dialogue(row.rejected_prompt or row.prompt, row.rejected, row) for row in pairs],
        "answers": [_dialogue(row.prompt, row.completion, row) for row in alone],
    }
    found: dict[str, dict[int, Supervised]] = {side: {} for side in given}
    for side, dialogues in given.items():
        if dialogues:
            kept, told = supervise(renderer, dialogues, max_length)
            for line in told.lines():
                say(f"{side}: {line}")
            told.check()
            found[side] = {example.row: example for example in kept}
    both = sorted(found["chosen"].keys() & found["rejected"].keys())
    joined = [Pair(found["chosen"][row], found["rejected"][row], pairs[row].place, pairs[row]) for row in both]
    for pair in joined:
        if list(pair.chosen.ids) == list(pair.rejected.ids):
            raise DataError(f"{pair.place}: chosen and rejected are the same tokens", "remove the row")
    return [*joined, *(Judged(one, alone[row].good, one.place, alone[row]) for row, one in found["answers"].items())]


def _dialogue(prompt: Sequence[Message], answer: Sequence[Message], row: Preference | Graded) -> Dialogue:
    """An answer behind its prompt, of which the answer alone is trained."""
    asked = (replace(turn, train=False) if turn.role == "assistant" else turn for turn in prompt)
    tools = row.tools if isinstance(row, Preference) else ()
    return Dialogue((*asked, *answer), row.id, row.place, tools)
