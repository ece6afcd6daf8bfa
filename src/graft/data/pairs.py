"""Pairs of answers made of starter data: right and wrong answers to tasks, and texts that people rated.

`task:NAME` gives each question with its right answer and the right answer to another question, which is wrong here.
`rated:movie-reviews` gives texts with the mean rating of 20 people: to learn from them as dialogues, each is a review
that is asked to be continued; as preferences, two of them whose ratings are far apart.
"""

from collections.abc import Sequence

from graft.data.dialogue import Dialogue, Graded, Message, Preference
from graft.data.tasks import score_task
from graft.errors import DataError
from graft.reading.files import Record
from graft.splits import hash_of

RATED = "rated:"
"""Begins the name of a source of rated texts."""

GAP = 1.5
"""Ratings of a pair differ by this at least, on a scale from -4 to 4: people agree which of the two is kinder."""

OFTEN = 4
"""Pairs that a text is in at most when it is trained on; in an evaluation each is in one, so that pairs are
independent."""

_GIVEN = 4
"""Words of a text that stand in its prompt."""


def continued(record: Record) -> Dialogue | None:
    """A rated text as a dialogue: its first words asked to be continued, the rest as the answer. None for a text that
    is too short."""
    words = str(record.fields["text"]).split()
    if len(words) < 2 * _GIVEN:
        return None
    asked = f"Continue this film review: {' '.join(words[:_GIVEN])}"
    turns = (Message("user", asked), Message("assistant", " ".join(words[_GIVEN:])))
    return Dialogue(turns, str(record.fields["id"]), record.place, fields={"rating": float(record.fields["rating"])})


def rated_pairs(rows: Sequence[Dialogue], often: int = 1, gap: float = GAP) -> list[Preference]:
    """Pairs of rated dialogues whose ratings differ by `gap` at least, each row in at most `often` of them.

    The rows go round in an order that their texts decide, and in every round each meets the first row that is left and
    far enough from it. The prompts of a pair differ.
    """
    found: list[Preference] = []
    seen: set[tuple[str, str]] = set()
    for turn in range(often):
        waiting = sorted(rows, key=lambda row: hash_of(f"{turn}/{row.id}/{row.answer}"))
        while waiting:
            first = waiting.pop(0)
            for place, second in enumerate(waiting):
                low, high = sorted((first, second), key=_rating)
                if _rating(high) - _rating(low) >= gap and (high.id, low.id) not in seen:
                    del waiting[place]
                    seen.add((high.id, low.id))
                    found.append(_pair(high, low))
                    break
    return found


def _rating(row: Dialogue) -> float:
    return float(row.fields["rating"])


def _pair(high: Dialogue, low: Dialogue) -> Preference:
    return Preference(
        high.prompt, high.messages[-1:], low.messages[-1:], f"{high.id}>{low.id}", high.place,
        rejected_prompt=low.prompt, gap=_rating(high) - _rating(low),
    )  # fmt: skip


def task_pairs(rows: Sequence[Dialogue]) -> list[Preference]:
    """Each question of a task with its right answer and with one that its checker refuses: that of the next row, in
    the order of the rows, whose answer is wrong here. Raises `DataError` where there is none."""
    found = []
    for number, row in enumerate(rows):
        others = (rows[(number + step) % len(rows)] for step in range(1, len(rows)))
        wrong = next((other for other in others if _differs(other, row) and score_task(row, other.answer) < 1), None)
        if wrong is None:
            raise DataError(f"{row.place}: no other row has an answer that is wrong here", "give more rows")
        found.append(Preference(row.prompt, row.messages[-1:], wrong.messages[-1:], row.id, row.place, dialogue=row))
    return found


def _differs(other: Dialogue, row: Dialogue) -> bool:
    return other.answer.strip() != row.answer.strip()


def graded_pairs(rows: Sequence[Graded]) -> list[Preference]:
    """Pairs of a good and a bad answer to one prompt; the prompts that have only one kind are left out."""
    by_prompt: dict[tuple[Message, ...], dict[bool, list[Graded]]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, {True: [], False: []})[row.good].append(row)
    found = []
    for prompt, kinds in by_prompt.items():
        for good, bad in zip(kinds[True], kinds[False], strict=False):
            if good.completion != bad.completion:
                found.append(Preference(prompt, good.completion, bad.completion, good.id, good.place))
    return found


def text_of_pair(row: Preference | Graded) -> str:
    """All that a row says, as one text."""
    answers: tuple[Message, ...] = row.completion if isinstance(row, Graded) else (*row.chosen, *row.rejected)
    return "\n".join(message.content for message in (*row.prompt, *answers))
