"""What one pass over the rows gathers: signs that single rows show, and counts."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from graft.curation import private, signs
from graft.curation.copies import Mark, mark_of
from graft.curation.findings import EXAMPLES, Example, View, snippet, view_of
from graft.curation.source import Item


@dataclass(frozen=True, slots=True)
class Sign:
    """Something a single row can show."""

    name: str
    """What findings and rules call it."""
    shown: Callable[[View], str | None]
    """What shows it, or None."""
    warns: float
    """The share of rows from which it is a warning, below it a note."""
    means: str
    """What it is."""
    advice: str
    """What to do."""


def on_whole(test: Callable[[str], str | None]) -> Callable[[View], str | None]:
    """A test of everything in a row."""
    return lambda view: test(view.whole)


def on_written(test: Callable[[str], str | None]) -> Callable[[View], str | None]:
    """A test of what the model learns to write."""
    return lambda view: next((found for text in view.written if (found := test(text))), None)


def on_answer(test: Callable[[str], str | None]) -> Callable[[View], str | None]:
    """A test of the answer, or of the text where there is no answer."""
    return lambda view: test(view.answer or view.prompt)


def _refusal(view: View) -> str | None:
    """Of dialogues only: a text may be about assistants."""
    return on_written(signs.refusal)(view) if view.roles else None


SIGNS: tuple[Sign, ...] = (
    Sign("empty", on_answer(signs.empty), 0, "the answer or text shows nothing", "drop these rows"),
    Sign(
        "placeholders",
        on_answer(signs.placeholder),
        0.01,
        "the answer or text is what often stands for a missing one",
        "look at them; `graft data clean --drop placeholders` drops them",
    ),
    Sign(
        "mojibake",
        on_whole(signs.mojibake),
        0,
        "text in UTF-8 was read as another encoding, so letters are broken",
        "`graft data clean` repairs what can be repaired",
    ),
    Sign(
        "special-tokens",
        on_whole(signs.special_token),
        0,
        "markers of chat templates stand in the text; Graft reads them as plain text",
        "drop them if an export left them there",
    ),
    Sign(
        "refusals",
        _refusal,
        0,
        "the answer begins by refusing, or by speaking of itself as a language model",
        "drop these rows unless the model shall learn it",
    ),
    Sign(
        "personal",
        on_whole(private.personal),
        0,
        "the text has e-mail or IP addresses, phone, account or card numbers, or keys",
        "`graft data clean --pii mask` replaces them",
    ),
    Sign("cut", on_written(signs.cut_off), 0.05, "the text to learn breaks off", "look for a limit in the export"),
    Sign("control", on_whole(signs.control), 0, "control characters stand in the text", "remove them"),
    Sign(
        "invisible",
        on_whole(signs.invisible),
        0.01,
        "characters without width split words",
        "remove them",
    ),
    Sign(
        "long-words",
        on_whole(signs.long_word),
        0.01,
        f"a word has {signs.LONG_WORD} characters or more: encoded data, or lost spaces",
        "drop these rows unless the model shall learn such data",
    ),
)
"""The signs of single rows, in the order of a report."""


@dataclass
class Survey:
    """What one pass over the rows has gathered."""

    marks: list[Mark] = field(default_factory=list)
    """What is kept of each row to compare it."""
    lengths: list[int] = field(default_factory=list)
    """Characters of each row."""
    found: dict[str, list[Example]] = field(default_factory=dict)
    """Examples by sign."""
    counts: Counter[str] = field(default_factory=Counter)
    """Rows by sign."""
    labels: Counter[str] = field(default_factory=Counter)
    """Rows by label."""
    label_places: dict[str, str] = field(default_factory=dict)
    """The first row of each label."""
    roles: Counter[str] = field(default_factory=Counter)
    """Turns by role."""
    turns: list[int] = field(default_factory=list)
    """Turns of each dialogue."""
    scripts: list[str | None] = field(default_factory=list)
    """The writing of each row, where it is known."""

    def see(self, item: Item, tests: Sequence[Sign]) -> None:
        """Take one row that could be read."""
        if item.row is None:
            return
        view = view_of(item.row)
        self.marks.append(mark_of(item.row, view))
        self.lengths.append(len(view.whole))
        self.scripts.append(signs.script(view.whole))
        if view.label is not None:
            self.labels[view.label] += 1
            self.label_places.setdefault(view.label, view.place)
        if view.roles:
            self.roles.update(view.roles)
            self.turns.append(len(view.roles))
        for sign in tests:
            if shown := sign.shown(view):
                self.counts[sign.name] += 1
                examples = self.found.setdefault(sign.name, [])
                if len(examples) < EXAMPLES:
                    examples.append(Example(view.place, f"{shown}: {snippet(private.masked(view.whole), shown)}"))
