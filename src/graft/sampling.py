"""Which token follows, from the scores of all: the best one, or one that is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from graft.errors import UsageError

_NUCLEUS = 256
"""Candidates that top-p sorts at first; the whole vocabulary only when they hold too little of the probability."""
_DRAWS = 64
"""Random numbers of a row that are made at once."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its scores. Raises `UsageError` for values outside their ranges."""

    temperature: float = 0.0
    """Scores are divided by it; 0 takes the best token, always."""
    top_p: float = 1.0
    """Nucleus: the fewest best tokens that hold this share of the probability (Holtzman et al. 2020)."""
    top_k: int = 0
    """How many best tokens are candidates; 0 for all."""
    repetition_penalty: float = 1.0
    """Positive scores of tokens that the row has already are divided by it, negative ones multiplied (Keskar et al.
    2019)."""
    seed: int = 0
    """With a row's number it decides all its draws, whatever batch the row is in."""

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0 <= self.temperature < float("inf"), "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        for name, (fits, allowed) in limits.items():
            if not fits:
                raise UsageError(f"{name} is {getattr(self, name)}, it must be {allowed}")


GREEDY = Sampling()
"""The best token, always."""


class Chooser:
    """Chooses the next token of each row of a batch, step by step.

    `prompts` are the rows' ids, and `numbers` their numbers among all rows of a call: they decide the draws.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> None:
        self.sampling = sampling
        self.rows = [list(prompt) for prompt in prompts] if sampling.repetition_penalty != 1 else []
        self.seen: Tensor | None = None
        self.sources = [numpy.random.default_rng([sampling.seed, number]) for number in numbers]
        self.draws = torch.empty(len(numbers), 0)
        self.step = 0

    def choose(self, scores: Tensor) -> Tensor:
        """The next tokens [rows] for scores [rows, vocabulary]."""
        if self.sampling.repetition_penalty != 1:
            scores = self._penalized(scores)
        if self.sampling.temperature == 0:
            tokens = scores.argmax(dim=-1)
        else:
            if self.step % _DRAWS == 0:
                drawn = [source.random(_DRAWS, dtype=numpy.float32) for source in self.sources]
                self.draws = torch.from_numpy(numpy.stack(drawn)).to(scores.device)
            tokens = _draw(scores, [self.sampling] * len(scores), self.draws[:, self.step % _DRAWS, None])
        self.step += 1
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the rows at these places."""
        self.sources = [self.sources[place] for place in places]
        self.draws = self.draws[list(places)]
        if self.seen is not None:
            self.seen = self.seen[list(places)]

    def _penalized(self, scores: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
            for row, ids in enumerate(self.rows):
                self.seen[row, ids] = True
        penalty = self.sampling.repetition_penalty
        return torch.where(self.seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


class Draws:
    """The random numbers of one row: the same that `Chooser` takes for a row of this number."""

    def __init__(self, seed: int, number: int) -> None:
        self._source = numpy.random.default_rng([seed, number])
        self._made: list[float] = []

    def next(self) -> float:
        """The next number from 0 to 1."""
        if not self._made:
            self._made = self._source.random(_DRAWS, dtype=numpy.float32)[::-1].tolist()
        return self._made.pop()


def choose_each(scores: Tensor, samplings: Sequence[Sampling], draws: Sequence[Draws]) -> Tensor:
    """The next tokens [rows] for scores [rows, vocabulary], each row with settings and random numbers of its own.

    No row's token depends on the others. Penalties for repetition are left out: they need all tokens of a row.
    """
    tokens = scores.argmax(dim=-1)
    kinds: dict[tuple[int, int | None], list[int]] = {}
    for row, sampling in enumerate(samplings):
        if sampling.temperature > 0:
            # A nucleus is sought for one row at a time. Together, a row with a wide one would have all rows sorted, and
            # equal scores, common in bf16, then come in another order: 5 % of the tokens of its neighbours changed.
            kinds.setdefault((sampling.top_k, row if sampling.top_p < 1 else None), []).append(row)
    for rows in kinds.values():
        numbers = torch.tensor([[draws[row].next()] for row in rows], device=scores.device)
        tokens[rows] = _draw(scores[rows], [samplings[row] for row in rows], numbers)
    return tokens


def _draw(scores: Tensor, samplings: Sequence[Sampling], draws: Tensor) -> Tensor:
    """Tokens [rows] for numbers [rows, 1] from 0 to 1: where the number falls when the candidates' shares are laid end
    to end. The rows' settings have one top_k, and all a top_p below 1 or none.
    """
    first = samplings[0]
    temperature, top_p = (
        torch.tensor(values, device=scores.device, dtype=torch.float)[:, None]
        for values in ([one.temperature for one in samplings], [one.top_p for one in samplings])
    )
    # Less the best score first: divided by a small temperature, scores exceed what a float holds.
    scores = (scores.float() - scores.float().amax(dim=-1, keepdim=True)) / temperature.clamp(min=1e-37)
    ids: Tensor | None = None
    if 0 < first.top_k < scores.shape[-1]:
        scores, ids = scores.topk(first.top_k)
    shares = scores.softmax(dim=-1)
    if first.top_p < 1:
        if ids is None:
            shares, ids = _best(shares, top_p)
        shares = shares.masked_fill(shares.cumsum(dim=-1) - shares >= top_p, 0.0)
    ends = shares.cumsum(dim=-1)
    whole = ends[:, -1:]
    # The second condition keeps a number that is rounded up to the whole from passing the last candidate.
    places = ((ends <= draws * whole) & (ends < whole)).sum(dim=-1, keepdim=True)
    return (places if ids is None else ids.gather(1, places))[:, 0]


def _best(shares: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Shares and ids of the best tokens, in order, that hold at least `top_p` in every row.

    Sorting 32 rows of 49,152 shares takes longer than a step of a small model.
    """
    if shares.shape[-1] > _NUCLEUS:
        best, ids = shares.topk(_NUCLEUS)
        if bool((best.sum(dim=-1) >= top_p[:, 0]).all()):
            return best, ids
    best, ids = shares.sort(dim=-1, descending=True)
    return best, ids
