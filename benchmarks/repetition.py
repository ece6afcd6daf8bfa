"""Measures of what a model writes: repetition inside a text, runs of words of training rows, variety, intervals."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

RUN_LENGTH = 8
"""Words in a row that count as a training row's own."""
DRAWS = 10_000
"""Resamples of a bootstrap."""


def ngrams(items: Sequence[Any], n: int) -> list[tuple[Any, ...]]:
    """All runs of n items, in order; none where there are fewer."""
    return [tuple(items[start : start + n]) for start in range(len(items) - n + 1)]


def repeated(ids: Sequence[int], n: int) -> float:
    """Share of the n-grams of `ids` that stand before in it: 1 - distinct / all (seq-rep-n of Welleck et al. 2020,
    arXiv 1908.04319); 0 for fewer than two n-grams.
    """
    grams = ngrams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def words(text: str) -> list[str]:
    """The words of a text without regard to case and punctuation."""
    return re.findall(r"\w+(?:['’]\w+)*", text.casefold())


def runs_of(rows: Sequence[str], length: int = RUN_LENGTH) -> set[tuple[str, ...]]:
    """All runs of `length` words of the rows; none reaches from one row into the next."""
    return {run for row in rows for run in ngrams(words(row), length)}


def copied(text: str, known: set[tuple[str, ...]], length: int = RUN_LENGTH) -> bool:
    """Whether a text holds one of the runs of `runs_of`."""
    return not known.isdisjoint(runs_of([text], length))


def variety(texts: Sequence[str], n: int = 4) -> float:
    """Share of the n-grams of words of several texts that are different ones; 1 where no text is that long."""
    grams = [gram for text in texts for gram in ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def bootstrap(values: Sequence[Sequence[float]]) -> list[float]:
    """Mean of values [seeds, items] and the 2.5 and 97.5 % points of the mean over items drawn with replacement.

    Items are prompts or texts. How far seeds lie apart is not in it: their own means are kept beside.
    """
    each = np.asarray(values, dtype=float).mean(axis=0)
    drawn = np.random.default_rng(1).integers(0, len(each), size=(DRAWS, len(each)))
    low, high = np.quantile(each[drawn].mean(axis=1), [0.025, 0.975])
    return [float(each.mean()), float(low), float(high)]
