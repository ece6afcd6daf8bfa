"""Starter tasks: questions that reasoning_gym generates, with a verifier that grades answers.

A source `task:NAME`, or `task:NAME,OTHER:size=2000:test=500:seed=7`, stands where a data file can. A question belongs
to one split by its own hash, so no question of one split is in another, whatever sizes and seeds are asked for.
"""

import importlib
import json
import random
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from io import StringIO
from typing import Any, Literal

from graft.data.dialogue import Dialogue, Message
from graft.errors import DataError, UsageError, nearest
from graft.limits import time_limit

PREFIX = "task:"
Split = Literal["train", "validation", "test"]
SIZES: dict[Split, int] = {"train": 1200, "validation": 100, "test": 300}
"""Questions of each split where the source does not say."""
SEED = 1
MAX_SIZE = 200_000
MAX_SEED = 2_000

_QUARTERS: tuple[Split, ...] = ("train", "train", "validation", "test")
"""The split of a question by its hash. Even shares, since some tasks have few questions."""
_SPAN = 1_000_000
"""Item i of seed s is item i of reasoning_gym's seed s * 1,000,000, whose seeds n and n + 1 share all but one item."""
_PATIENCE = 1_000
"""Draws without a fresh question after which a generator is exhausted."""
_LONGEST = 10_000
"""Characters of an answer beyond which it counts as wrong; the longest right ones have some 3,000."""
_ID = re.compile(r"(?P<name>[a-z0-9_]+)-(?P<base>[0-9]{1,12})-(?P<index>[0-9]{1,9})", re.ASCII)
"""The id of a row: task, seed and index."""
_SECONDS = 5.0
"""Time for grading one answer."""

_RUNS_ANSWERS = "its verifier runs answers as Python code"
_UNSTABLE = "its questions differ from one Python process to the next"
_NO_ANSWER = "its questions come without an answer"
_CLOSED = "its own answers do not pass its verifier once they were stored"
_FIXED = "its questions are made for one size only"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("binary_matrix", "countdown", "intermediate_integration"), _RUNS_ANSWERS),
    **dict.fromkeys(("polynomial_multiplication", "puzzle24", "simple_integration"), _RUNS_ANSWERS),
    **dict.fromkeys(("n_queens", "spiral_matrix", "string_insertion"), _RUNS_ANSWERS),
    **dict.fromkeys(("codeio", "isomorphic_strings", "knight_swap", "ransom_note"), _UNSTABLE),
    **dict.fromkeys(("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"), _NO_ANSWER),
    **dict.fromkeys(("arc_agi", "gsm_symbolic", "rearc"), _CLOSED),
    **dict.fromkeys(("acre", "composite", "word_ladder"), _FIXED),
}
"""Tasks of reasoning_gym that cannot be starter tasks, and why."""


@dataclass(frozen=True, slots=True)
class Source:
    """A source string, read: names of tasks, questions of each split, the seed."""

    names: tuple[str, ...]
    sizes: Mapping[Split, int]
    seed: int


def is_task(source: str) -> bool:
    """Whether a source names starter tasks and no file."""
    return source.startswith(PREFIX)


def read_source(source: str) -> Source:
    """The parts of a source string.

    `size` is that of the training split; the others have at most so many questions, and at most those of `SIZES` unless
    `validation` or `test` says more. Raises `DataError` for an unknown task or option, or a bad number.
    """
    names, _, options = source.removeprefix(PREFIX).partition(":")
    given: dict[str, int] = {}
    limits = {"seed": (0, MAX_SEED), **dict.fromkeys(("size", "validation", "test"), (1, MAX_SIZE))}
    for option in filter(None, options.split(":")):
        key, _, value = option.partition("=")
        if key not in limits:
            raise DataError(f"{source}: unknown option {key!r}, {nearest(key, limits)}")
        if key in given:
            raise DataError(f"{source}: {key} stands twice")
        low, high = limits[key]
        if not (value.isascii() and value.isdigit() and len(value) < 10 and low <= int(value) <= high):
            raise DataError(f"{source}: {key} is a whole number from {low} to {high}, not {value!r}")
        given[key] = int(value)
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in found:
        _check_name(name, source)
    size = given.get("size", SIZES["train"])
    sizes: dict[Split, int] = {split: given.get(split, min(size, most)) for split, most in SIZES.items()}
    return Source(found, sizes | {"train": size}, given.get("seed", SEED))


def task_dialogues(source: str, split: Split, size: int | None = None) -> list[Dialogue]:
    """The rows of one split: the user asks, the assistant gives the reference answer.

    `size` goes before what the source says (`read_source`); rows of several tasks take turns. A row is always
    the same for its source and split. Its id is `NAME-SEED-INDEX`, where reasoning_gym gives the item again under
    that seed and index. Raises `DataError` for a bad source or a task with too few different questions.
    """
    read = read_source(source)
    total = size or read.sizes[split]
    shares = [total // len(read.names) + (place < total % len(read.names)) for place in range(len(read.names))]
    drawn = [_draw(name, read.seed, split, share) for name, share in zip(read.names, shares, strict=True)]
    return [rows[place] for place in range(max(shares)) for rows in drawn if place < len(rows)]


def score_task(dialogue: Dialogue, answer: str) -> float:
    """What the task's verifier gives for an answer, in [0, 1]; some give a part for a near miss.

    The question is generated again from the row's id: verifiers run parts of what they are handed as Python code, so
    nothing that stands in a file reaches them but the answer, and no verifier of a starter task runs that. Answers are
    stripped. Odd ones at which the verifier raises or takes more than 5 s count 0; time is limited in the main thread
    only. Raises `DataError` for a row that no starter task made, and for one that was altered.
    """
    name, item = _made(dialogue)
    answer = answer.strip()
    if not answer or len(answer) > _LONGEST:
        return 0.0
    verifier = _generator(name, SEED)
    try:
        with _quietly(), time_limit(_SECONDS):
            score = float(verifier.score_answer(answer, json.loads(item)))
    except Exception:  # verifiers parse answers, and fail as they like at what is none
        return 0.0
    return min(1.0, max(0.0, score)) if score == score else 0.0  # not a number: 0


def is_gradable(dialogue: Dialogue) -> bool:
    """Whether `score_task` can grade answers to a row: it is as its starter task makes it."""
    try:
        _made(dialogue)
    except DataError:
        return False
    return True


def _made(dialogue: Dialogue) -> tuple[str, str]:
    """The task of a row, and its item as JSON, generated again from the row's id; `DataError` if they are not alike."""
    remedy = "score it with exact_match, say"
    task = dialogue.task
    found = _ID.fullmatch(dialogue.id)
    if task is None or found is None or found["name"] != task:
        raise DataError(f"{dialogue.place}: no starter task made this row: its id is not of {task or 'a task'}", remedy)
    _check_name(task, dialogue.place)
    base, index = int(found["base"]), int(found["index"])
    if base % _SPAN or base > MAX_SEED * _SPAN or index >= _SPAN:
        raise DataError(f"{dialogue.place}: no starter task made this row: {task} has no {dialogue.id}", remedy)
    item = _again(task, base, index)
    made = json.loads(item)
    asked = [message.content.strip() for message in dialogue.messages if message.role != "system"]
    if asked != [made["question"].strip(), made["answer"].strip()]:
        raise DataError(f"{dialogue.place}: the question or answer is not the one of {dialogue.id}", remedy)
    return task, item


@lru_cache(maxsize=4096)
def _again(name: str, base: int, index: int) -> str:
    """An item as JSON. A row is graded many times in a run, and some take 0.1 s to generate."""
    with _quietly():
        return json.dumps(_item(_generator(name, base), name, index))


def _draw(name: str, seed: int, split: Split, count: int) -> list[Dialogue]:
    """The first `count` different questions of one task whose hash puts them into `split`."""
    rows: list[Dialogue] = []
    if not count:
        return rows
    base = seed * _SPAN
    seen: set[str] = set()
    last = 0  # where the newest fresh question was
    with _quietly():
        generator = _generator(name, base)
        for index in range(_SPAN):
            item = _item(generator, name, index)
            question = item["question"].strip()
            if _is_wrong(item, name):
                continue
            if question not in seen and _split_of(question) == split:
                seen.add(question)
                last = index
                rows.append(_row(item, question, name, base, index))
                if len(rows) == count:
                    return rows
            if index - last >= _PATIENCE:
                break
    raise DataError(
        f"{PREFIX}{name} has about {len(rows):,} different questions for {split}, {count:,} are asked for",
        f"give size={max(1, len(rows))}, or another task beside it",
    )


def _item(generator: Any, name: str, index: int) -> dict[str, Any]:
    """One item as it would be read from JSON: with a question, an answer and what the verifier needs."""
    try:
        item: dict[str, Any] = json.loads(json.dumps(generator[index]))
    except Exception as error:  # a generator's own fault, whatever it is
        raise DataError(f"{PREFIX}{name}:{index}: the question cannot be generated ({error})", "take another") from None
    if not isinstance(item.get("answer"), str) or not item["answer"].strip() or not item["question"].strip():
        raise DataError(f"{PREFIX}{name}:{index}: a question without an answer", "take another task")
    return item


def _is_wrong(item: Mapping[str, Any], name: str) -> bool:
    """Whether reasoning_gym 0.1.25 answers a question wrongly, or asks another one than it answers.

    Of X, whose spouse is a child of Y, it says that X is Y's parent-in-law, and it calls X a niece where Y is a woman.
    Business days that run into the next year are asked for with the first year at both ends.
    """
    about = item.get("metadata", {})
    if name == "family_relationships":
        return about.get("relationship") in ("mother-in-law", "father-in-law", "niece", "nephew")
    if name == "calendar_arithmetic" and about.get("task") == "count_business_days":
        return str(about["start_date"])[:4] != str(about["end_date"])[:4]
    return False


def _row(item: dict[str, Any], question: str, name: str, base: int, index: int) -> Dialogue:
    return Dialogue(
        messages=(Message("user", question), Message("assistant", item["answer"].strip())),
        id=f"{name}-{base}-{index}",
        place=f"{PREFIX}{name}:{index}",
        task=name,
        fields={"entry": item},
    )


def _split_of(question: str) -> Split:
    return _QUARTERS[sha256(question.encode()).digest()[0] % len(_QUARTERS)]


def _check_name(name: str, source: str) -> None:
    if name in REFUSED:
        raise DataError(f"{source}: {name!r} is no starter task: {REFUSED[name]}", "take another task")
    known = _registry().DATASETS
    if name not in known:
        usable = set(known) - set(REFUSED)
        near = [other for other in sorted(usable) if name and (name in other or other in name)]
        told = f"did you mean {near[0]!r}?" if near else nearest(name, usable)
        raise DataError(f"{source}: no starter task {name!r}, {told}")


@lru_cache(maxsize=64)
def _generator(name: str, seed: int) -> Any:
    """reasoning_gym's data set: its items by index, and the verifier."""
    return _registry().create_dataset(name, seed=seed, size=_SPAN)


@lru_cache(maxsize=1)
def _registry() -> Any:
    """The module with reasoning_gym's tasks by name."""
    try:
        with _quietly():
            importlib.import_module("reasoning_gym")
            return importlib.import_module("reasoning_gym.factory")
    except ImportError:
        raise UsageError(
            "starter tasks need the package reasoning_gym, which is missing", "pip install 'graft-tuning[tasks]'"
        ) from None


@contextmanager
def _quietly() -> Iterator[None]:
    """Generators and verifiers print nothing, warn of nothing and leave the global random numbers as they were."""
    numpy = importlib.import_module("numpy")
    before, arrays = random.getstate(), numpy.random.get_state()
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(before)
        numpy.random.set_state(arrays)
