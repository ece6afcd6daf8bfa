"""Scorers of generated answers, by name: each gives an answer a number from 0 to 1."""

import importlib
import json
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NoReturn

from graft.data.dialogue import Dialogue
from graft.data.tasks import is_gradable, score_task
from graft.errors import DataError, RecipeError, UsageError, nearest
from graft.limits import time_limit

REGEX = "regex:"
LONGEST_PATTERN = 500
"""Characters of a regular expression."""
LONGEST_SEARCHED = 10_000
"""Characters of an answer that a regular expression looks at."""

_SECONDS = 5.0
"""Time for one search: a pattern such as (a+)+b takes time exponential in the answer's length."""
_ALONE = re.compile("([\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")
"""Letters of scripts without spaces between words (Thai, kana, Han): each is a token."""
_FORMATS = {"P", "S", "Z", "C"}
"""First letters of the Unicode categories that separate words: punctuation, symbols, spaces, controls."""


@dataclass(frozen=True)
class Scorer:
    """One way to grade answers: `one` an answer for its row, `whole` all answers together for all references."""

    name: str
    one: Callable[[str, Dialogue], float]
    reads_reference: bool = True
    """Whether rows need a reference answer."""
    whole: Callable[[list[str], list[str]], float] | None = None

    def items(self, answers: Sequence[str], rows: Sequence[Dialogue]) -> list[float]:
        """The score of each answer, in [0, 1]. Raises `DataError` for a row that cannot be scored."""
        self._check(answers, rows)
        return [min(1.0, max(0.0, float(self.one(*pair)))) for pair in zip(answers, rows, strict=True)]

    def corpus(self, answers: Sequence[str], rows: Sequence[Dialogue]) -> float | None:
        """The score of all answers together in [0, 1], for scorers whose corpus figure is no mean of the items'."""
        self._check(answers, rows)
        if self.whole is None or not rows:
            return None
        return min(1.0, self.whole(list(answers), [row.answer for row in rows]))

    def _check(self, answers: Sequence[str], rows: Sequence[Dialogue]) -> None:
        if len(answers) != len(rows):
            raise ValueError(f"{len(answers)} answers for {len(rows)} rows")
        for row in rows if self.reads_reference else ():
            if row.messages[-1].role != "assistant" or not row.answer.strip():
                raise DataError(
                    f"{row.place}: no reference answer, which {self.name} compares with",
                    "give the row one, or take json_valid or regex:PATTERN",
                )


def read_scorer(name: str) -> Scorer:
    """The scorer called `name`. Raises `RecipeError` for an unknown name or a bad pattern, and `UsageError` when the
    package behind it is missing.
    """
    if name.startswith(REGEX):
        return _regex(name)
    if name not in SCORERS:
        raise RecipeError(f"no scorer {name!r}, {nearest(name, [*SCORERS, REGEX + 'PATTERN'])}")
    package = _PACKAGES.get(name)
    if package and find_spec(package) is None:
        extra = "tasks" if name == "task" else "metrics"
        raise UsageError(
            f"scorer {name} needs the package {package}, which is missing", f"pip install 'graft-tuning[{extra}]'"
        )
    return SCORERS[name]


def default_scorer(rows: Sequence[Dialogue]) -> Scorer:
    """`task` when every row is as a starter task makes it, else `exact_match`: a column may just be called `task`."""
    return SCORERS["task" if rows and all(map(is_gradable, rows)) else "exact_match"]


def tokens(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation, in any script; on ASCII those of rouge-score."""
    text = unicodedata.normalize("NFC", text.lower())
    spaced = "".join(" " if unicodedata.category(sign)[0] in _FORMATS else sign for sign in text)
    return _ALONE.sub(r" \1 ", spaced).split()


def fold(text: str) -> str:
    """A text without differences of case, of white space and of a full stop at its end."""
    folded = " ".join(unicodedata.normalize("NFC", text).split()).casefold()
    return folded.removesuffix(".").rstrip() or folded


def _exact(answer: str, row: Dialogue) -> float:
    return float(fold(answer) == fold(row.answer))


def _contains(answer: str, row: Dialogue) -> float:
    """Whether the reference stands in the answer, as whole words."""
    wanted = fold(row.answer)
    before = r"(?<!\w)" if _in_word(wanted[0]) else ""
    after = r"(?!\w)" if _in_word(wanted[-1]) else ""
    return float(re.search(before + re.escape(wanted) + after, fold(answer)) is not None)


def _in_word(sign: str) -> bool:
    return sign.isalnum() and not _ALONE.match(sign)


def _token_f1(answer: str, row: Dialogue) -> float:
    """2PR / (P + R) over the tokens as multisets (SQuAD, Rajpurkar et al. 2016, but with articles)."""
    said, wanted = Counter(tokens(answer)), Counter(tokens(row.answer))
    if not said or not wanted:
        return _exact(answer, row)  # signs alone
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total())


class _Words:
    """`tokens` as rouge-score wants it; its own tokenizer drops all but a to z and digits."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)


def _rouge(kind: str) -> Callable[[str, Dialogue], float]:
    """F1 of ROUGE-N or ROUGE-L (Lin 2004), without stemming."""

    def score(answer: str, row: Dialogue) -> float:
        return float(_rouge_scorer(kind).score(row.answer, answer)[kind].fmeasure)

    return score


@lru_cache(maxsize=8)
def _rouge_scorer(kind: str) -> Any:
    module = importlib.import_module("rouge_score.rouge_scorer")
    return module.RougeScorer([kind], use_stemmer=False, tokenizer=_Words())


def _sentence_bleu(answer: str, row: Dialogue) -> float:
    """BLEU (Papineni et al. 2002) as sacrebleu has it, over the orders that a short answer has (effective order)."""
    return float(importlib.import_module("sacrebleu").sentence_bleu(answer, [row.answer]).score) / 100


def _corpus_bleu(answers: list[str], references: list[str]) -> float:
    """0 where no answer has four words: the corpus figure needs 4-grams."""
    return float(importlib.import_module("sacrebleu").corpus_bleu(answers, [references]).score) / 100


def _sentence_chrf(answer: str, row: Dialogue) -> float:
    """chrF2 (Popović 2015): F over character n-grams up to 6."""
    return float(importlib.import_module("sacrebleu").sentence_chrf(answer, [row.answer]).score) / 100


def _corpus_chrf(answers: list[str], references: list[str]) -> float:
    return float(importlib.import_module("sacrebleu").corpus_chrf(answers, [references]).score) / 100


def _json_valid(answer: str, row: Dialogue) -> float:
    """Whether the whole answer is one JSON value; NaN and Infinity are none."""
    try:
        json.loads(answer, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _task(answer: str, row: Dialogue) -> float:
    return score_task(row, answer)


def _regex(name: str) -> Scorer:
    pattern = name.removeprefix(REGEX)
    if not pattern or len(pattern) > LONGEST_PATTERN:
        raise RecipeError(f"scorer {REGEX}PATTERN: a pattern has 1 to {LONGEST_PATTERN} characters, not {len(pattern)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise RecipeError(f"scorer {name}: no regular expression of Python: {error}") from None

    def score(answer: str, row: Dialogue) -> float:
        try:
            with time_limit(_SECONDS):
                return float(compiled.search(answer[:LONGEST_SEARCHED]) is not None)
        except TimeoutError:
            raise RecipeError(
                f"scorer {name}: the search in the answer to {row.place} took more than {_SECONDS:g} s",
                "write the pattern without repeats inside repeats",
            ) from None

    return Scorer(name, score, reads_reference=False)


SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        Scorer("exact_match", _exact),
        Scorer("contains", _contains),
        Scorer("token_f1", _token_f1),
        Scorer("rouge1", _rouge("rouge1")),
        Scorer("rouge2", _rouge("rouge2")),
        Scorer("rougeL", _rouge("rougeL")),
        Scorer("bleu", _sentence_bleu, whole=_corpus_bleu),
        Scorer("chrf", _sentence_chrf, whole=_corpus_chrf),
        Scorer("json_valid", _json_valid, reads_reference=False),
        Scorer("task", _task, reads_reference=False),
    )
}
"""The scorers by name, but for `regex:PATTERN`."""

_PACKAGES = {
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), "rouge_score"),
    **dict.fromkeys(("bleu", "chrf"), "sacrebleu"),
    "task": "reasoning_gym",
}
