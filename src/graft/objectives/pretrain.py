"""Continued pretraining: every token of plain texts is predicted from those before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedTokenizerBase

from graft.data.load import Row, Unit
from graft.errors import DataError
from graft.model import Base
from graft.objectives.base import Report, Result, Say, silent
from graft.objectives.causal import Causal, row_figures
from graft.rendering.render import Renderer
from graft.routing import Entry


@dataclass(frozen=True, slots=True)
class Piece:
    """A text, or a piece of a long one, as ids."""

    ids: Sequence[int]
    place: str
    text: int
    """Which of the texts it is of, counted from 0."""

    @property
    def trained(self) -> Sequence[int]:
        """Every token but the first, which has none before it."""
        return [0, *[1] * (len(self.ids) - 1)]

    def __len__(self) -> int:
        return len(self.ids)


class Pretrain(Causal):
    """Plain texts, each ended by the end-of-text token; longer ones in pieces of max_length tokens.

    Quality is the share of a text's tokens that the model would have guessed, in the mean of the texts; loss and
    perplexity stand beside it.
    """

    name: ClassVar[str] = "pretrain"
    unit: ClassVar[Unit] = "text"

    @property
    def metric(self) -> str:
        """Share of tokens that are the likeliest."""
        return "next-token accuracy"

    def examples(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
        say: Say = silent,
    ) -> list[Piece]:
        """Texts as ids. Raises `DataError` when none is left."""
        renderer = Renderer(tokenizer)
        pieces = []
        short = 0
        for number, row in enumerate(rows):
            ids = renderer.text(row.text)
            # Pieces overlap by one token, so that each token but a text's first is predicted once.
            cut = [ids[start : start + max_length] for start in range(0, max(1, len(ids) - 1), max_length - 1)]
            short += len(ids) < 2
            pieces += [Piece(piece, row.place, number) for piece in cut if len(piece) > 1]
        if not pieces:
            raise DataError(f"none of {len(rows)} texts has two tokens", "give longer texts")
        tokens = sum(len(piece) for piece in pieces)
        say(f"{tokens:,} tokens of {len(rows):,} texts, in {len(pieces):,} pieces of at most {max_length:,}")
        if short:
            say(f"{short:,} texts of a single token train nothing")
        return pieces

    def evaluate(
        self,
        base: Base,
        examples: Sequence[Piece],
        entry: Entry,
        batch_size: int,
        report: Report | None = None,
        quick: bool = False,
    ) -> Result:
        """Next-token accuracy and loss."""
        figures = row_figures(base, examples, entry, batch_size, report)
        right: dict[int, int] = {}
        tokens: dict[int, int] = {}
        # The pieces of a long text are one row: they are not independent of each other.
        for piece, guessed, count in zip(examples, figures.right.tolist(), figures.tokens.tolist(), strict=True):
            right[piece.text] = right.get(piece.text, 0) + guessed
            tokens[piece.text] = tokens.get(piece.text, 0) + count
        each = [right[text] / tokens[text] for text in right]
        further = {"perplexity": figures.perplexity}
        return Result(sum(each) / len(each), figures.mean_loss, each, further, batch_size=figures.batch_size)
