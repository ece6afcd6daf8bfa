"""The running batch: rows join and leave at every token, each through its own adapter.

Prompts are read in passes of their own, of a bounded number of tokens, between the steps of the rows that run. A row is
let in only when the keys and values of all rows, with every token that they may still get, fit the memory given: they
stand in one block of [rows, columns], so what counts is the number of rows times the longest of them.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from graft.decoding import BLOCK, Decoder
from graft.errors import GraftError
from graft.model import Base
from graft.routing import Route
from graft.sampling import GREEDY, Draws, Sampling, choose_each

_SHARE = 8
"""Ended rows leave, and waiting ones join, when they are one row in so many: each copies the keys and values once."""
STRIDE = 16
"""What the columns of a pass over prompts are a multiple of. Matrix products in bf16 keep a kernel for each number of
rows that they meet, on CPUs for ever (0.3 MB each, torch 2.13): with any number a batch of a tiny model grew by 24 MB a
second.
"""
_PATIENCE = 4
"""Steps after which waiting rows join however few they are."""

Ending = Literal["stop", "length", "unsound"]
"""What ended a row: a stop id or stop string, a limit, or scores that are no numbers."""


class Unsound(GraftError):
    """Scores that are no numbers, of which no answer can be made: weights are damaged, or too large for the format."""


@dataclass(frozen=True)
class Token:
    """One token of an answer."""

    id: int
    logprob: float = 0.0
    """The logarithm of its share, before temperature and top_p; 0 where it was not asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, the best first."""


@dataclass(eq=False)
class Row:
    """One answer to be written."""

    prompt: Sequence[int]
    max_tokens: int
    """Tokens at most, 1 or more."""
    stop_ids: frozenset[int] = frozenset()
    sampling: Sampling = GREEDY
    number: int = 0
    """Which of several answers to one prompt: with the seed it decides the draws."""
    top_logprobs: int | None = None
    """How many likeliest tokens to tell with each token; None tells no shares at all."""
    entry: str | None = None
    """The attached adapter that it goes through, set when it is let in at the latest."""
    virtual: int = 0
    """Columns that the adapter's virtual tokens take."""
    ids: list[int] = field(default_factory=list)
    """Tokens so far, without the stop id."""
    ending: Ending | None = None
    """What ended it; None while it goes on."""
    cancelled: bool = False
    """Whether nobody waits for it any more."""

    def __post_init__(self) -> None:
        self.draws = Draws(self.sampling.seed, self.number)

    @property
    def columns(self) -> int:
        """Columns of its own that it may come to, with the room by which they grow."""
        return len(self.prompt) + self.max_tokens + BLOCK

    def take(self, token: int) -> None:
        """Note the next token, which may end the row."""
        if token in self.stop_ids:
            self.ending = "stop"
            return
        self.ids.append(token)
        if len(self.ids) >= self.max_tokens:
            self.ending = "length"

    def end(self, ending: Ending) -> None:
        """End it from outside: a stop string was written, or there is nothing to go on with."""
        self.ending = ending


@dataclass(eq=False)
class _Reading:
    """Rows whose prompts are being read."""

    rows: list[Row]
    decoder: Decoder
    rest: list[int]
    """What is left of the prompt behind the piece that the decoder reads next, where there is one row."""
    done: bool = False
    """Whether all is read, and the rows have their first token."""


class Batch:
    """Rows that are written together.

    `capacity` bounds keys and values, in columns of one row (`bytes_per_column` each). `admit` is asked before a row is
    let in and sees to its adapter; it says False where that has to wait.
    """

    def __init__(
        self,
        base: Base,
        capacity: int,
        *,
        max_rows: int = 64,
        chunk: int = 512,
        admit: Callable[[Row], bool] = lambda row: True,
    ) -> None:
        self.base, self.capacity, self.chunk, self.admit = base, capacity, chunk, admit
        self.max_rows = max_rows
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        """Rows in the order of the decoder's batch; some may have ended."""
        self._decoder: Decoder | None = None
        self._reading: _Reading | None = None
        self._waited = 0
        self._tight = False
        base.model.eval()

    def add(self, row: Row) -> None:
        """Let a row wait for its turn. It must fit alone: see `fits`."""
        self.waiting.append(row)

    def fits(self, row: Row) -> bool:
        """Whether a row can ever be let in."""
        return _columns([row]) <= self.capacity

    @property
    def held(self) -> list[Row]:
        """Rows that hold keys and values, ended ones that have not left yet among them."""
        return self.running + (self._reading.rows if self._reading else [])

    @property
    def live(self) -> list[Row]:
        """Those that go on."""
        return [row for row in self.held if _goes(row)]

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.waiting or self.held)

    @property
    def used(self) -> int:
        """Columns of keys and values that are promised, of `capacity`."""
        return _columns(self.live)

    def step(self) -> list[tuple[Row, Token]]:
        """Write one token of every running row and read one piece of waiting prompts; gives the tokens written.

        A row that ends with its stop id gets that as its last token here, but not among its `ids`.
        """
        return self.write() + self.read()

    @torch.no_grad()
    def write(self) -> list[tuple[Row, Token]]:
        """One token of every running row, those whose prompts have been read among them."""
        if self._reading is not None and self._reading.done:
            self._join(self._reading)
        self._sweep()
        if self._decoder is None:
            return []
        with self.base.route(self._decoder.route):
            scores = self._decoder.scores()
        return _choose(self.running, scores, self._decoder)

    @torch.no_grad()
    def read(self) -> list[tuple[Row, Token]]:
        """One piece of the prompts of waiting rows, and their first token behind the last piece."""
        if self._reading is None:
            self.waiting = deque(row for row in self.waiting if _goes(row))
            self._begin()
        reading = self._reading
        if reading is None or reading.done:
            return []
        if not any(_goes(row) for row in reading.rows):
            self._reading = None
            return []
        with self.base.route(reading.decoder.route):
            scores = reading.decoder.scores()
        if reading.rest:
            reading.decoder.feed(reading.rest[: self.chunk])
            reading.rest = reading.rest[self.chunk :]
            return []
        reading.done = True
        return _choose(reading.rows, scores, reading.decoder)

    def abandon(self, reading: bool = False) -> list[Row]:
        """Drop all rows that hold keys and values, or those whose prompts are read, after a step that failed; gives
        the rows that had not ended. Added again, they go on where they were.
        """
        held = self._reading.rows if self._reading else []
        rows = [row for row in held if _goes(row)] if reading else self.live
        self._reading = None
        if not reading:
            self.running, self._decoder = [], None
        return rows

    def _begin(self) -> None:
        """Choose the waiting rows whose prompts are read next, where it is time for that."""
        live = self.live
        if not self.waiting:
            return
        if live and len(self.waiting) * _SHARE < len(live) and self._waited < _PATIENCE:
            self._waited += 1
            return
        self._waited = 0
        rows: list[Row] = []
        longest = 0
        while self.waiting and len(live) + len(rows) < self.max_rows:
            row = self.waiting[0]
            longest = max(longest, len(row.prompt) + len(row.ids))
            if rows and longest * (len(rows) + 1) > self.chunk:
                break
            if _columns([*live, *rows, row]) > self.capacity:
                break
            if not self.admit(row):
                self._tight = True
                break
            rows.append(self.waiting.popleft())
        rows = sorted((row for row in rows if _goes(row)), key=_place)  # `admit` may have ended one
        if not rows:
            return
        prompts = [[*row.prompt, *row.ids] for row in rows]
        rest: list[int] = []
        if len(rows) == 1:  # the first piece is the odd one, since it can be padded
            begin = (len(prompts[0]) - 1) % self.chunk + 1
            prompts, rest = [prompts[0][:begin]], prompts[0][begin:]
        columns = -(-max(map(len, prompts)) // STRIDE) * STRIDE
        decoder = Decoder(self.base, prompts, Route.of([row.entry for row in rows], self.base.device), True, columns)
        self._reading = _Reading(rows, decoder, rest)

    def _join(self, reading: _Reading) -> None:
        """Put rows whose prompts are read beside the running ones, and drop those that have ended."""
        together = self.running + reading.rows
        places = [place for place, row in enumerate(together) if _goes(row)]
        places.sort(key=lambda place: _place(together[place]))
        if not places:
            self.running, self._decoder = [], None
        elif self._decoder is None:
            self._decoder = reading.decoder
            self._decoder.arrange(places)
        else:
            self._decoder.arrange(places, reading.decoder)
        self.running, self._reading = [together[place] for place in places], None

    def _sweep(self) -> None:
        """Let ended rows leave: when they are many, hold columns that nobody counts on, or an adapter in a full
        memory."""
        if self._decoder is None:
            return
        places = [place for place, row in enumerate(self.running) if _goes(row)]
        if not places:
            self.running, self._decoder = [], None
            return
        ended = len(self.running) - len(places)
        beyond = self._decoder.mask.shape[1] + BLOCK > max(self.running[place].columns for place in places)
        if ended and (ended * _SHARE >= len(self.running) or beyond or self._tight):
            self._decoder.arrange(places)
            self.running = [self.running[place] for place in places]
        self._tight = False


def _goes(row: Row) -> bool:
    return row.ending is None and not row.cancelled


def _place(row: Row) -> str:
    """Rows of one adapter stand beside each other: routing then takes slices."""
    return row.entry or ""


def _columns(rows: Sequence[Row]) -> int:
    """Columns of the block that holds these rows to their end: virtual tokens stand in front of the longest."""
    widest = max((row.virtual for row in rows), default=0)
    return len(rows) * (widest + max((row.columns for row in rows), default=0))


def _choose(rows: Sequence[Row], scores: Tensor, decoder: Decoder) -> list[tuple[Row, Token]]:
    """The next token of every row that goes on; all of them go into the decoder. A row whose best score is no number
    ends with none."""
    sound = scores.amax(dim=-1).isfinite().tolist()
    tokens = choose_each(scores, [row.sampling for row in rows], [row.draws for row in rows])
    going = [_goes(row) for row in rows]
    told = _shares(rows, scores, tokens)
    written = []
    for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
        if going[place] and not sound[place]:
            row.end("unsound")
        elif going[place]:
            row.take(token)
            written.append((row, told.get(place, Token(token))))
    decoder.add(tokens, torch.tensor([_goes(row) for row in rows], device=tokens.device))
    return written


def _shares(rows: Sequence[Row], scores: Tensor, tokens: Tensor) -> dict[int, Token]:
    """Tokens with their shares, by place, of the rows that want them."""
    wanted = [place for place, row in enumerate(rows) if row.top_logprobs is not None]
    if not wanted:
        return {}
    shares = scores[wanted].float().log_softmax(dim=-1)
    best, ids = shares.topk(max(1, *(rows[place].top_logprobs or 0 for place in wanted)))
    found = {}
    for index, place in enumerate(wanted):
        count = rows[place].top_logprobs or 0
        top = tuple(zip(ids[index, :count].tolist(), best[index, :count].tolist(), strict=True))
        token = int(tokens[place])
        found[place] = Token(token, float(shares[index, token]), top)
    return found


def bytes_per_column(base: Base) -> int:
    """Bytes that the keys and values of one position take."""
    size = base.model.dtype.itemsize
    return sum(2 * site.kv_heads * site.head_dim * size for site in base.select("attention"))
