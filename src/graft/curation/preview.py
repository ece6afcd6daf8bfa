"""Rows as a model sees them: decoded token by token from the ids that training would use."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graft.curation.findings import view_of
from graft.curation.source import open_source
from graft.curation.tokens import special_tokens
from graft.data.dialogue import Dialogue, Graded, Preference
from graft.data.formats import AnyRow
from graft.data.rows import Row
from graft.errors import DataError, UsageError, nearest
from graft.rendering.render import Renderer, Train
from graft.rendering.supervise import supervise

_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

TRAIN: tuple[Train, ...] = ("assistant", "last", "all")
"""What can bear loss."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A token, or the few that make one character, as text."""

    text: str
    """What the tokens decode to."""
    tokens: int
    """How many tokens it is."""
    kind: Literal["special", "plain"]
    """Whether it is a control token of the template or the tokenizer; the same letters in a message are plain."""
    trained: bool
    """Whether it bears loss."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A row of a preview."""

    place: str
    """`file:line`."""
    pieces: tuple[Piece, ...]
    """Its tokens; empty when the row would be lost."""
    tokens: int
    """All of its tokens."""
    trained: int
    """Tokens that bear loss."""
    cut: int
    """Tokens removed so that it fits."""
    further: int = 0
    """Tokens of a long text that become further pieces in pretraining."""
    lost: str = ""
    """Why the row would train nothing, empty when it does."""


def preview(
    given: str,
    model: str,
    rows: int = 3,
    max_length: int = 1024,
    train: str = "assistant",
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
    wanted: str | None = None,
) -> list[Shown]:
    """The first rows of a source through the tokenizer of `model`, whose weights are not read.

    Dialogues are rendered and cut as in training, preferences and graded answers as the dialogue with the (chosen)
    answer; texts as in pretraining; of labelled rows the tokens of the text are shown, none of them trained.
    Raises `DataError` when the first rows are all faulty, `UsageError` for an unknown way to train.
    """
    if train not in TRAIN:
        raise UsageError(f"--train is {train!r}", nearest(train, TRAIN))
    from graft.model import load_tokenizer

    source = open_source(given, columns, wanted)
    tokenizer = load_tokenizer(model)
    renderer: Renderer | None = None
    shown: list[Shown] = []
    for item in source.items:
        if len(shown) == rows:
            break
        if item.row is None:
            continue
        dialogue = _dialogue(item.row)
        if dialogue is None:
            shown.append(_text(tokenizer, item.row, max_length))
            continue
        renderer = renderer or Renderer(tokenizer, template)
        shown.append(_rendered(tokenizer, renderer, dialogue, max_length, train))
    if not shown:
        raise DataError(f"{given}: none of the rows can be read: {source.faults.first()}", "see `graft data check`")
    return shown


def _dialogue(row: AnyRow) -> Dialogue | None:
    """The turns that a row is trained on, None for rows that are texts."""
    if isinstance(row, Preference):
        return Dialogue((*row.prompt, *row.chosen), row.id, row.place, row.tools)
    if isinstance(row, Graded):
        return Dialogue((*row.prompt, *row.completion), row.id, row.place)
    return row if isinstance(row, Dialogue) and (row.prompt or row.plain) else None


def _rendered(tokenizer: Any, renderer: Renderer, dialogue: Dialogue, max_length: int, train: Train) -> Shown:
    kept, report = supervise(renderer, [dialogue], max_length, train)
    if not kept:
        return Shown(dialogue.place, (), 0, 0, 0, lost=report.lines()[-1])
    ids, trained = kept[0].ids, kept[0].trained
    pieces = tuple(_pieces(tokenizer, ids, trained))
    return Shown(dialogue.place, pieces, len(ids), sum(trained), kept[0].cut)


def _text(tokenizer: Any, row: AnyRow, max_length: int) -> Shown:
    """A text or labelled row: the text's tokens, of which pretraining learns all but the first."""
    learnt = not (isinstance(row, Row) and row.label is not None)
    if learnt:
        ids = Renderer(tokenizer).text(view_of(row).whole)
    elif isinstance(row, Row) and row.text_pair is not None:
        ids = tokenizer(row.text, row.text_pair, verbose=False)["input_ids"]
    else:
        ids = tokenizer(view_of(row).whole, verbose=False)["input_ids"]
    fitted, beyond = ids[:max_length], max(0, len(ids) - max_length)
    trained = [learnt and number > 0 for number in range(len(fitted))]
    pieces = tuple(_pieces(tokenizer, fitted, trained))
    cut, further = (0, beyond) if learnt else (beyond, 0)
    return Shown(row.place, pieces, len(fitted), sum(trained), cut, further=further)


def _pieces(tokenizer: Any, ids: Sequence[int], trained: Sequence[int]) -> Iterator[Piece]:
    """Tokens as text, those of one character together.

    Each is decoded after the one before it, since decoders drop the space in front of a first word.
    """

    def text(start: int, end: int) -> str:
        return str(
            tokenizer.decode(list(ids[start:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    special = special_tokens(tokenizer)
    before, start = 0, 0
    for end in range(1, len(ids) + 1):
        alone = end - start == 1 and ids[start] in special
        known = "" if alone or start == 0 or ids[start - 1] in special else text(before, start)
        whole = text(before if known else start, end)
        unfinished = whole.endswith("\ufffd") and end - start < 4 and end < len(ids) and not alone
        if unfinished and ids[end] not in special and trained[end] == trained[start]:
            continue
        piece = whole[len(known) :] if whole.startswith(known) else text(start, end)
        yield Piece(piece, end - start, "special" if alone else "plain", bool(trained[start]))
        before, start = start, end


def visible(text: str) -> str:
    """`text` with control characters but tab and line ends, and those that turn the writing direction, as escapes."""
    return _HIDDEN.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def marked(shown: Shown) -> str:
    """A row without colours: trained stretches stand in ⟦ ⟧, control tokens in ‹ ›."""
    out, inside = [], False
    for piece in shown.pieces:
        if piece.trained != inside:
            out.append("⟦" if piece.trained else "⟧")
            inside = piece.trained
        out.append(f"‹{piece.text}›" if piece.kind == "special" else visible(piece.text))
    return "".join(out) + ("⟧" if inside else "")
