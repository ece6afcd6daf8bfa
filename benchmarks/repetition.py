"""Measures of what a model writes: repetition inside a text, runs of words of training rows, variety, intervals."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

RUN_LENGTH = 8
"""Words in a row that count as a training row's own."""
DRAWS = 10_000
"""Resamples of a bootstrap."""
FIGURES = {
    "held_loss": ("held_loss",),
    "train_loss": ("train_loss",),
    "repeated_3": ("held-out", "repeated_3"),
    "repeated_4": ("held-out", "repeated_4"),
    "repeated_4_to_end": ("held-out", "repeated_4_to_end"),
    "doubled": ("doubled",),
    "ended": ("held-out", "ended"),
    "copied": ("held-out", "copied"),
    "copied_when_prompted": ("training", "copied"),
    "longest": ("held-out", "longest"),
    "longest_when_prompted": ("training", "longest"),
    "distinct": ("sampled", "distinct"),
    "variety": ("sampled", "variety"),
}
"""Where each figure stands in the measurements of one training."""


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


def doubled(text: str) -> bool:
    """Whether a word stands twice or more in a row."""
    return any(one == other for one, other in pairwise(words(text)))


def runs_of(rows: Sequence[str], length: int = RUN_LENGTH) -> set[tuple[str, ...]]:
    """All runs of `length` words of the rows; none reaches from one row into the next."""
    return {run for row in rows for run in ngrams(words(row), length)}


def copied(text: str, known: set[tuple[str, ...]], length: int = RUN_LENGTH) -> bool:
    """Whether a text holds one of the runs of `runs_of`."""
    return not known.isdisjoint(runs_of([text], length))


def longest_run(text: str, rows: Sequence[str]) -> int:
    """Most words in a row that a text shares with any one of the rows."""
    most = 0
    while copied(text, runs_of(rows, most + 1), most + 1):
        most += 1
    return most


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


def values_of(measured: dict[str, Any], figure: str) -> list[float]:
    """The values of a figure by prompt or text."""
    found: Any = measured
    for key in FIGURES[figure]:
        found = found[key]
    return list(found)


def summary(measured: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """From the measurements of each condition and seed: `conditions`, the figures of each, and `differences`, of
    `copies` minus each other condition on the same prompts or texts.
    """
    conditions, differences = {}, {}
    for condition, seeds in measured.items():
        conditions[condition] = {name: _told([values_of(seed, name) for seed in seeds]) for name in FIGURES}
        if condition == "copies":
            continue
        if condition == "base":  # measured once, for all seeds
            seeds = seeds * len(measured["copies"])
        differences[condition] = {}
        for name in FIGURES:
            pairs = zip(measured["copies"], seeds, strict=False)  # spread has the first seed only
            gaps = [np.subtract(values_of(copies, name), values_of(other, name)) for copies, other in pairs]
            differences[condition][name] = _told(gaps)
    return {"conditions": conditions, "differences": differences}


def _told(values: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    return {"value": bootstrap(values), "seeds": [float(np.mean(each)) for each in values]}
