"""From dialogues to examples that fit: what is cut, what is lost, and a report of both before training.

An answer and its end of turn are never cut. A dialogue that is too long loses its oldest exchanges, then the beginning
of its last question, and is rendered again each time, so every example is one that the template writes.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from graft.data.dialogue import Dialogue, Message
from graft.errors import DataError
from graft.rendering.render import Rendered, Renderer, Train

MAX_LOST = 0.05
"""Share of rows that may be lost before training is refused."""

MIN_ENDED = 0.99
"""Share of the kept rows that have to teach where an answer ends."""

TOO_LONG = "answer longer than max_length"
NO_ANSWER = "empty answer"
UNTRAINED = "every turn marked as not to be trained"
REFUSED = "refused by the template"


@dataclass(frozen=True, slots=True)
class Supervised:
    """An example: 4 bytes for each id and one for each mark of the mask."""

    ids: "array[int]"
    """Token ids, at most max_length."""
    trained: bytearray
    """1 for each id that bears loss, else 0."""
    place: str
    """The row's `file:line`."""
    id: str
    """The row's id."""
    cut: int
    """Tokens that were removed to fit max_length; none of them is of an answer that is left."""
    prompt: int
    """Tokens before the last supervised turn: what a model is given to answer it."""
    ended: bool
    """Whether every supervised turn has its end-of-turn token supervised."""
    row: int
    """Which of the dialogues it is made of, counted from 0."""


@dataclass
class Preflight:
    """What became of the rows, gathered before training."""

    max_length: int
    """Tokens that an example may have."""
    template: str
    """The template's name in words."""
    rows: int = 0
    """Rows that were read."""
    trained: "array[int]" = field(default_factory=lambda: array("i"))
    """Supervised tokens of each row that was kept."""
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    """Tokens of each rendered row before anything was cut."""
    needed: "array[int]" = field(default_factory=lambda: array("i"))
    """For each row lost for its length, the tokens it has when everything is cut that may be."""
    lost: dict[str, list[str]] = field(default_factory=dict)
    """The places of the rows that were lost, by reason."""
    cut: list[str] = field(default_factory=list)
    """The places of the rows that were cut."""
    cut_tokens: int = 0
    """Tokens removed from the rows that were cut."""
    ended: int = 0
    """Kept rows in which every supervised turn has its end-of-turn token supervised."""
    refusal: str = ""
    """What the template said of the first row that it refused."""

    def keep(self, dialogue: Dialogue, trained: int, cut: int, ended: bool) -> None:
        """Count a row with its supervised tokens, the tokens cut from it, and whether its answers end."""
        self.trained.append(trained)
        self.ended += ended
        if cut:
            self.cut.append(dialogue.place)
            self.cut_tokens += cut

    @property
    def kept(self) -> int:
        """Rows that became examples."""
        return len(self.trained)

    @property
    def tokens(self) -> int:
        """Supervised tokens of all rows."""
        return sum(self.trained)

    @property
    def ended_share(self) -> float:
        """Share of the kept rows that teach where an answer ends; 1 without rows."""
        return self.ended / self.kept if self.kept else 1.0

    def lines(self) -> list[str]:
        """The report in a user's words, one fact a line."""
        told = [f"{self.kept:,} of {self.rows:,} rows kept: {self.tokens:,} supervised tokens"]
        if self.kept:
            low, middle, high = (quantile(self.trained, share) for share in (0.05, 0.5, 0.95))
            told[0] += f" (a row has {middle:,}; {low:,} to {high:,} in 90 % of the rows)"
        if self.lengths:
            middle, high, longest = (quantile(self.lengths, share) for share in (0.5, 0.95, 1.0))
            told.append(
                f"rows have {middle:,} tokens (p95 {high:,}, longest {longest:,}); max_length={self.max_length}"
            )
        if self.cut:
            told.append(
                f"{len(self.cut):,} of {self.rows:,} rows cut to max_length={self.max_length}: {self.cut_tokens:,} "
                f"tokens of old exchanges and long questions removed, last answers whole, first {self.cut[0]}"
            )
        if self.lost:
            told.append(self._losses())
        if self.ended_share < 1:
            told.append(f"{self.kept - self.ended:,} of {self.kept:,} kept rows do not teach where an answer ends")
        return told

    def _losses(self) -> str:
        """The lost rows and their reasons in one line."""
        reasons = []
        for reason, places in self.lost.items():
            told = f"{len(places):,} {reason}"
            if reason == TOO_LONG:
                told += f"={self.max_length} (p95 {quantile(self.needed, 0.95):,}; use {self.advice():,} or more)"
            if reason == REFUSED:
                told += f" ({self.refusal})"
            reasons.append(f"{told}, first {places[0]}")
        count = sum(len(places) for places in self.lost.values())
        return f"{count:,} of {self.rows:,} rows have 0 trained tokens: {'; '.join(reasons)}"

    def advice(self) -> int:
        """A max_length, in steps of 128, that 95 % of the rows lost for their length would fit."""
        return -(-quantile(self.needed, 0.95) // 128) * 128

    def check(self, allow_dropped: bool = False) -> None:
        """Raise `DataError` if too much is lost to train on what is left without a word from the user."""
        if not self.kept:
            raise DataError(self._losses() if self.lost else "no rows to train on", self._remedy(False))
        if self.rows - self.kept > MAX_LOST * self.rows and not allow_dropped:
            raise DataError(f"{self._losses()}; up to {MAX_LOST:.0%} may be lost", self._remedy(True))
        if self.ended_share < MIN_ENDED:
            raise DataError(
                f"{self.template} ends {self.kept - self.ended:,} of {self.kept:,} rows without a special token, so a "
                f"model trained on them would not stop; {MIN_ENDED:.0%} have to end with one",
                "use a template whose end of turn is a special token of this tokenizer; alpaca and vicuna end with eos",
            )

    def _remedy(self, droppable: bool) -> str:
        ways = {
            TOO_LONG: f"raise max_length to {self.advice() if self.needed else self.max_length}",
            NO_ANSWER: "fill in or remove the rows without an answer",
            UNTRAINED: "let a turn of each row be trained",
            REFUSED: "correct these rows or choose another chat_template",
        }
        told = [way for reason, way in ways.items() if reason in self.lost] or ["give rows with answers"]
        return "; ".join(told) + (", or set allow_dropped: true to train on the rest" if droppable else "")


_NOTHING = Rendered([], [], 0, 0, [])


def quantile(values: Sequence[int], share: float) -> int:
    """The smallest of `values` that at least `share` of them do not exceed; 0 without values."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(len(ordered) * share * 1000) // 1000) - 1)] if ordered else 0


def supervise(
    renderer: Renderer,
    dialogues: Iterable[Dialogue],
    max_length: int,
    train: Train = "assistant",
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Supervised], Preflight]:
    """Examples of at most `max_length` tokens and what became of the rows; `progress` is told the rows done.

    Rows that cannot become an example are in the report, by reason. Raises `UsageError` for a template that misbehaves.
    """
    report = Preflight(max_length, renderer.name)
    examples = []
    for dialogue in dialogues:
        report.rows += 1
        example = _example(renderer, dialogue, max_length, train, report)
        if example is not None:
            examples.append(example)
        if progress is not None:
            progress(report.rows)
    return examples, report


def _example(
    renderer: Renderer, dialogue: Dialogue, max_length: int, train: Train, report: Preflight
) -> Supervised | None:
    def render(messages: Sequence[Message]) -> Rendered:
        if dialogue.plain and not renderer.template:
            return renderer.pair("".join(message.content for message in messages[:-1]), messages[-1].content)
        return renderer.render(messages, dialogue.tools, train)

    def length(messages: Sequence[Message]) -> int:
        plain = dialogue.plain and not renderer.template
        return len(render(messages).ids) if plain else renderer.length(messages, dialogue.tools)

    reason, before = "", 0
    fitted = _NOTHING
    try:
        if _answers(dialogue.messages, train):
            before = length(dialogue.messages)
            fitted = _fit(dialogue.messages, render, length, before, max_length)
            report.lengths.append(before)
            reason = "" if _learns(dialogue.messages, train) else UNTRAINED
        else:
            reason = NO_ANSWER
    except DataError as error:
        report.refusal = report.refusal or error.message
        reason = REFUSED
    if not reason and (len(fitted.ids) > max_length or not any(fitted.trained)):
        report.needed.append(len(fitted.ids))
        reason = TOO_LONG
    if reason:
        report.lost.setdefault(reason, []).append(dialogue.place)
        return None
    cut = before - len(fitted.ids)
    ended = fitted.ended == fitted.turns
    report.keep(dialogue, sum(fitted.trained), cut, ended)
    ids, trained = array("i", fitted.ids), bytearray(fitted.trained)
    return Supervised(ids, trained, dialogue.place, dialogue.id, cut, fitted.starts[-1], ended, report.rows - 1)


def _learns(messages: Sequence[Message], train: Train) -> bool:
    """Whether any turn is to be learned from."""
    spoken = [message for message in messages if message.role == "assistant"]
    unmarked = spoken if train == "assistant" else spoken[-1:]
    marks = [message.train or (message.train is None and message in unmarked) for message in spoken]
    return train == "all" or any(marks)


def _answers(messages: Sequence[Message], train: Train) -> bool:
    """Whether the assistant says or calls anything in the turns to learn from; those marked otherwise count too."""
    spoken = [message for message in messages if message.role == "assistant"]
    if train == "last":
        spoken = [message for message in spoken[:-1] if message.train] + spoken[-1:]
    return any(message.content.strip() or message.tool_calls for message in spoken)


def _fit(
    messages: Sequence[Message],
    render: Callable[[Sequence[Message]], Rendered],
    length: Callable[[Sequence[Message]], int],
    whole: int,
    limit: int,
) -> Rendered:
    """The rendering with the least removed that has at most `limit` tokens, or the shortest one there can be.

    What is removed is found by `length`, which takes less time than `render`. `whole` is the length of all messages.
    """
    questions = [number for number, message in enumerate(messages) if message.role == "user"]
    if whole <= limit or not questions:
        return render(messages)
    head, last = tuple(messages[: questions[0]]), questions[-1]

    def later(dropped: int) -> Sequence[Message]:
        return [*head, *messages[questions[dropped] :]]

    if length(later(len(questions) - 1)) <= limit:
        kept = _most(1, len(questions), lambda number: length(later(len(questions) - number)) <= limit)
        return render(later(len(questions) - kept))
    content = messages[last].content

    def shortened(kept: int) -> Sequence[Message]:
        return [*head, replace(messages[last], content=content[len(content) - kept :]), *messages[last + 1 :]]

    if len(content) < 2 or length(shortened(1)) > limit:
        return render(shortened(1))
    return render(shortened(_most(1, len(content), lambda kept: length(shortened(kept)) <= limit)))


def _most(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `high` that fits, as `low` does. From `low` upwards: small ones are tried faster."""
    step = 1
    while low + step < high and fits(low + step):
        low, step = low + step, step * 2
    high = min(high, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
