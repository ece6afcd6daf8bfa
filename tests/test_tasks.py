"""Starter tasks: the same rows everywhere, splits without common questions, right answers, patient grading."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import numpy
import pytest
from reasoning_gym import create_dataset
from reasoning_gym.factory import DATASETS
from reasoning_gym.graphs.family_relationships import FamilyRelationshipsConfig

from graft.data import tasks
from graft.data.dialogue import Dialogue, Message
from graft.data.load import DataConfig, rows_of
from graft.data.tasks import REFUSED, SIZES, Split, is_gradable, is_task, read_source, score_task, task_dialogues
from graft.data.writers import to_record
from graft.errors import DataError, UsageError
from graft.scorers import default_scorer

FAMILY, CALENDAR = "task:family_relationships", "task:calendar_arithmetic"
SPLITS = get_args(Split)
PYTHONPATH = str(Path(tasks.__file__).parents[2])


def questions(rows: list[Dialogue]) -> list[str]:
    return [row.messages[0].content for row in rows]


# Sources ----------------------------------------------------------------------------------------


def test_sources():
    assert [is_task(source) for source in (FAMILY, "tasks.jsonl", "./task:x", "task:")] == [True, False, False, True]
    read = read_source("task:gcd, lcm,gcd:size=7:seed=0")
    assert (read.names, read.sizes, read.seed) == (("gcd", "lcm"), {"train": 7, "validation": 7, "test": 7}, 0)
    assert (read_source("task:gcd").sizes, read_source("task:gcd").seed) == (SIZES, 1)
    assert read_source("task:gcd:size=5000").sizes == SIZES | {"train": 5000}
    assert read_source("task:gcd:size=200").sizes == {"train": 200, "validation": 100, "test": 200}
    assert read_source("task:gcd:test=900:size=2:validation=3").sizes == {"train": 2, "validation": 3, "test": 900}


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ("task:family_relationship", "no starter task 'family_relationship', did you mean 'family_relationships'?"),
        ("task:", "no starter task '', known: "),
        ("task:gcd,", "no starter task ''"),
        ("task:gcd:sizes=3", "unknown option 'sizes', did you mean 'size'?"),
        ("task:gcd:size", "size is a whole number from 1 to 200000, not ''"),
        ("task:gcd:size=0", "size is a whole number from 1"),
        ("task:gcd:size=1e3", "not '1e3'"),
        ("task:gcd:size=٣", "not '٣'"),
        ("task:gcd:size=9999999999999999999999", "size is a whole number"),
        ("task:gcd:test=x", "test is a whole number from 1 to 200000, not 'x'"),
        ("task:gcd:seed=1:seed=2", "seed stands twice"),
        ("task:gcd:seed=-1", "seed is a whole number from 0 to 2000, not '-1'"),
        ("task:puzzle24", "'puzzle24' is no starter task: its verifier runs answers as Python code"),
        ("task:gcd,rush_hour", "'rush_hour' is no starter task: its questions come without an answer"),
    ],
)
def test_bad_sources(source, phrase):
    with pytest.raises(DataError) as caught:
        task_dialogues(source, "train")
    assert str(caught.value).startswith(source + ": ")
    assert phrase in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setattr(tasks, "_registry", tasks._registry.__wrapped__)
    with pytest.raises(UsageError, match=r"reasoning_gym, which is missing; pip install 'graft-tuning\[tasks\]'"):
        task_dialogues(FAMILY, "train")


def test_importing_graft_does_not_import_it():
    code = (
        "import sys, graft.data.tasks, graft.scorers; sys.exit(bool({'reasoning_gym', 'sacrebleu'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": PYTHONPATH}).returncode == 0


# Rows -------------------------------------------------------------------------------------------


def test_rows():
    rows = task_dialogues(f"{FAMILY}:seed=3", "test", 20)
    assert len(rows) == 20
    for row in rows:
        name, base, index = row.id.split("-")
        assert (name, base, row.task) == ("family_relationships", "3000000", name)
        assert row.place == f"task:{name}:{index}"
        assert [message.role for message in row.messages] == ["user", "assistant"]
        item = create_dataset(name, seed=int(base), size=1)[int(index)]
        assert (item["question"], item["answer"]) == (row.messages[0].content, row.answer)
        assert json.loads(json.dumps(row.fields)) == row.fields
        assert score_task(row, row.answer) == 1


def test_sizes():
    assert (
        {split: len(task_dialogues(FAMILY, split)) for split in SPLITS}
        == SIZES
        == {
            "train": 1200,
            "validation": 100,
            "test": 300,
        }
    )
    assert len(task_dialogues(f"{FAMILY}:size=30", "test")) == 30
    assert len(task_dialogues(f"{FAMILY}:size=30", "test", 9)) == 9


def test_no_question_is_in_two_splits():
    for source in (FAMILY, CALENDAR):
        found = [questions(task_dialogues(source, split, 400)) for split in SPLITS]
        assert [len(set(part)) for part in found] == [400] * 3
        assert len(set().union(*found)) == 1200
    other_seeds = {
        question for seed in (2, 3, 9) for question in questions(task_dialogues(f"{CALENDAR}:seed={seed}", "test"))
    }
    train = set(questions(task_dialogues(CALENDAR, "train", 4000)))
    assert len(other_seeds) > 600
    assert not other_seeds & train


def test_a_smaller_size_is_the_start_of_a_larger_one():
    assert task_dialogues(FAMILY, "train", 50) == task_dialogues(FAMILY, "train", 80)[:50]


def test_seeds_are_unrelated():
    first, second = (set(questions(task_dialogues(f"{FAMILY}:seed={seed}", "train", 300))) for seed in (1, 2))
    assert len(first & second) < 10


def test_tasks_take_turns():
    rows = task_dialogues("task:gcd,lcm,leg_counting:size=11", "train")
    assert [row.task for row in rows] == ["gcd", "lcm", "leg_counting"] * 3 + ["gcd", "lcm"]
    assert [row.task for row in task_dialogues("task:gcd,lcm", "train", 1)] == ["gcd"]
    assert [row for row in rows if row.task == "lcm"] == task_dialogues("task:lcm", "train", 4)


def test_exhausted(monkeypatch):
    class Few:
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"question": f"question {index % 40}", "answer": "1", "metadata": {}}

    monkeypatch.setattr(tasks, "_generator", lambda *_: Few())
    counts = []
    for split in SPLITS:
        with pytest.raises(
            DataError, match=r"task:gcd has about \d+ different questions for \w+, 41 are asked"
        ) as caught:
            task_dialogues("task:gcd", split, 41)
        counts.append(int(re.findall(r"about (\d+)", str(caught.value))[0]))
        assert len(task_dialogues("task:gcd", split, counts[-1])) == counts[-1]
    assert sum(counts) == 40
    assert min(counts) > 0


@pytest.mark.parametrize(
    "item", [{"question": "?", "answer": None}, {"question": "?", "answer": " "}, {"question": "", "answer": "1"}, {}]
)
def test_items_that_are_none(item, monkeypatch):
    monkeypatch.setattr(tasks, "_generator", lambda *_: [item])
    with pytest.raises(DataError, match="task:gcd:0: a question without an answer"):
        task_dialogues("task:gcd", "train", 1)


def test_generator_that_fails(monkeypatch):
    monkeypatch.setattr(tasks, "_generator", lambda *_: [])
    with pytest.raises(DataError, match=r"task:gcd:0: the question cannot be generated \(list index out of range\)"):
        task_dialogues("task:gcd", "train", 1)


# The same everywhere ----------------------------------------------------------------------------

STABLE = sorted(set(DATASETS) - set(REFUSED))
SLOW = {"futoshiki", "zebra_puzzles", "sokoban", "group_anagrams", "figlet_font", "sudoku", "polynomial_equations"}
SLOW |= {"jugs", "game_of_life", "game_of_life_halting", "advanced_geometry", "list_functions"}
DIGEST = """
import hashlib, random, sys
import numpy
from graft.data.tasks import task_dialogues
random.seed(int(sys.argv[1])); numpy.random.seed(int(sys.argv[1]))
for name in sys.argv[2].split(","):
    rows = task_dialogues("task:" + name, "test", 3)
    print(name, hashlib.sha256(repr(rows).encode()).hexdigest())
"""


def digests(names: list[str], seed: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONHASHSEED": str(seed)}
    command = [sys.executable, "-c", DIGEST, str(seed), ",".join(names)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def agree(names: list[str]) -> None:
    outputs = [digests(names, seed).communicate()[0].split() for seed in (1, 2)]
    assert outputs[0] == outputs[1]
    assert outputs[0][::2] == names


def test_rows_depend_on_no_hash_seed_and_no_random_state():
    agree([name for name in STABLE if name not in SLOW])


@pytest.mark.faults
def test_rows_of_slow_tasks_depend_on_no_hash_seed():
    agree(sorted(SLOW))


def test_list_of_the_refused_is_of_this_version():
    assert set(DATASETS) > set(REFUSED)
    assert len(STABLE) == 82


def test_global_random_numbers_go_on():
    random.seed(5)
    numpy.random.seed(5)
    wanted = random.random(), numpy.random.rand()
    random.seed(5)
    numpy.random.seed(5)
    task_dialogues("task:word_sorting,rotten_oranges,needle_haystack", "train", 6)
    assert (random.random(), numpy.random.rand()) == wanted


# Right answers ----------------------------------------------------------------------------------


def relation(question: str, one: str, other: str) -> str:
    """What `one` is to `other`, read off the question's story; genders go by the first names."""
    couples, parents = set(), {}
    for sentence in question.partition("\n")[0].rstrip(".").split(". "):
        if married := re.fullmatch(r"(\w+) is married to (\w+)", sentence):
            couple = married.groups()
            couples |= {couple, couple[::-1]}
        else:
            names = sentence.partition(" called ")[2]
            parents |= {name: set(couple) for name in re.split(r", | and ", names)}
    grand = {name: set().union(*(parents.get(parent, set()) for parent in own)) for name, own in parents.items()}
    woman = one in FamilyRelationshipsConfig().female_names
    assert woman != (one in FamilyRelationshipsConfig().male_names)
    found = [
        pair
        for pair, holds in {
            ("mother", "father"): one in parents.get(other, ()),
            ("daughter", "son"): other in parents.get(one, ()),
            ("wife", "husband"): (one, other) in couples,
            ("sister", "brother"): one in parents and parents[one] == parents.get(other),
            ("grandmother", "grandfather"): one in grand.get(other, ()),
        }.items()
        if holds
    ]
    assert len(found) == 1, question
    return found[0][0 if woman else 1]


def test_families_are_told_right():
    rows = task_dialogues(FAMILY, "test", 300)
    for row in rows:
        about = row.fields["entry"]["metadata"]
        asked = row.messages[0].content
        assert row.answer == relation(asked, about["person1"], about["person2"]), asked
        end = asked.rpartition("\n")[2]
        assert end.index(about["person1"]) < end.index(about["person2"])
    assert set(Counter(row.answer for row in rows)) >= {"mother", "son", "wife", "brother", "grandfather"}


DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def calendar(question: str, about: dict[str, Any]) -> str | None:
    """The answer by Python's calendar; None for a kind that is not checked."""
    kind = about["task"]
    if kind == "is_leap_year":
        year = about["year"]
        return "Yes" if year % 4 == 0 and (year % 100 != 0 or year % 400 == 0) else "No"
    if kind == "weekday_of_date":
        return DAYS[date.fromisoformat(about["target_date"]).weekday()]
    if kind == "weekday_offset":
        return DAYS[(date.fromisoformat(about["start_date"]) + timedelta(about["offset_days"])).weekday()]
    if kind == "count_business_days":
        start, end = date.fromisoformat(about["start_date"]), date.fromisoformat(about["end_date"])
        return str(sum((start + timedelta(day)).weekday() < 5 for day in range((end - start).days + 1)))
    return None


def test_calendars_are_told_right():
    rows = task_dialogues(CALENDAR, "test", 500)
    checked: Counter[str] = Counter()
    for row in rows:
        asked, about = row.messages[0].content, row.fields["entry"]["metadata"]
        wanted = calendar(asked, about)
        if wanted is not None:
            assert row.answer == wanted, asked
            checked[about["task"]] += 1
        dates = re.findall(rf"({'|'.join(DAYS)}), (\w+ \d+, \d+)", asked)
        for day, told in dates:
            assert DAYS[datetime.strptime(told, "%B %d, %Y").weekday()] == day, asked
        checked["dates"] += len(dates)
    assert len(checked) == 5
    assert min(checked.values()) > 20


# Grading ----------------------------------------------------------------------------------------


def test_grades():
    row = task_dialogues(FAMILY, "test", 1)[0]
    scores = [score_task(row, answer) for answer in (row.answer, f"  {row.answer.upper()}\n", "cousin", "", "   ")]
    assert scores == [1, 1, 0, 0, 0]
    leap = next(row for row in task_dialogues(CALENDAR, "test") if row.answer == "Yes")
    assert [score_task(leap, answer) for answer in ("yes", "No", "Yes, it is")] == [1, 0, 0]


def test_some_verifiers_give_a_part_for_a_near_miss():
    rows = task_dialogues(CALENDAR, "test")
    day = next(row for row in rows if row.answer == "Friday")
    assert score_task(day, "Monday") == 0.1
    counts = [row for row in rows if row.fields["entry"]["metadata"]["task"] == "count_business_days"]
    number = next(row for row in counts if int(row.answer) > 10)
    assert 0.5 < score_task(number, str(int(number.answer) + 1)) < 1


@pytest.mark.parametrize(
    "answer", ["x", "9**9**9", "(1,2", "-", "None", "[]", '{"a":1}', "\x00", "é" * 50, "1" * 9_999, "٣"]
)
def test_odd_answers(answer):
    rows = task_dialogues(f"task:{','.join(sorted(set(STABLE) - SLOW))}", "train", len(STABLE) - len(SLOW))
    assert len({row.task for row in rows}) == 70
    start = time.monotonic()
    for row in rows:
        assert 0 <= score_task(row, answer) <= 1
    assert time.monotonic() - start < 10


class Verifier:
    def __init__(self, result: Any) -> None:
        self.result = result

    def score_answer(self, answer: str, entry: dict[str, Any]) -> Any:
        entry["answer"] = "altered"
        while self.result == "spin":
            pass
        return self.result


@pytest.mark.parametrize(
    ("result", "score"), [(1, 1), (0.25, 0.25), (7, 1), (-1, 0), (float("nan"), 0), (None, 0), ("a", 0), ("spin", 0)]
)
def test_odd_verifiers(result, score, monkeypatch):
    row = task_dialogues("task:gcd", "test", 1)[0]
    assert score_task(row, "1") in (0, 1)  # the item is made
    monkeypatch.setattr(tasks, "_generator", lambda *_: Verifier(result))
    monkeypatch.setattr(tasks, "_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGALRM)
    for _ in range(2):  # what a verifier alters is a copy
        assert score_task(row, "1") == score
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


ROW = Dialogue((Message("user", "?"), Message("assistant", "1")), "1", "my.jsonl:7")
MADE = replace(task_dialogues("task:gcd", "test", 1)[0], place="my.jsonl:7")


def with_answer(row: Dialogue, answer: str) -> Dialogue:
    return replace(row, messages=(*row.prompt, Message("assistant", answer)))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ROW, "no starter task made this row"),
        (replace(ROW, task="gcd"), "no starter task made this row"),
        (replace(ROW, task="qa", id="qa-1000000-3"), "no starter task 'qa'"),
        (replace(MADE, task="lcm"), "no starter task made this row"),
        (replace(MADE, task=None), "no starter task made this row"),
        (replace(MADE, id="gcd-1000001-3"), "gcd has no gcd-1000001-3"),
        (replace(MADE, id="gcd-999999000000-3"), "gcd has no"),
        (replace(MADE, id="gcd-1000000-1000000"), "gcd has no"),
        (replace(MADE, id=MADE.id + "0"), "the question or answer is not the one of gcd-"),
        (with_answer(MADE, "no number"), "the question or answer is not the one of gcd-"),
        (replace(MADE, messages=(Message("user", "?"), MADE.messages[1])), "the question or answer is not"),
        (replace(ROW, task="countdown", id="countdown-1000000-3"), "runs answers as Python code"),
    ],
)
def test_rows_of_other_origin(row, reason):
    with pytest.raises(DataError, match=rf"my\.jsonl:7: .*({reason})"):
        score_task(row, "1")
    assert not is_gradable(row)


HOSTILE = "open({path!r}, 'w') or ['1']"


@pytest.mark.parametrize("name", ["number_sorting", "bitwise_arithmetic"])
def test_nothing_of_a_file_is_run(name, tmp_path):
    """Their verifiers call eval on the answer and on the problem of the entry."""
    path = tmp_path / "run"
    code = HOSTILE.format(path=str(path))
    entry = {"question": "?", "answer": code, "metadata": {"problem": code}}
    row = task_dialogues(f"task:{name}", "test", 1)[0]
    for bad in (
        replace(ROW, task=name, fields={"entry": entry}),
        replace(ROW, task=name, id=row.id, fields={"entry": entry}),
        with_answer(replace(row, fields={"entry": entry}), code),
    ):
        with pytest.raises(DataError):
            score_task(bad, "1")
    altered = replace(row, fields={"entry": entry})
    assert [score_task(altered, row.answer), score_task(altered, code)] == [1, 0]
    assert not path.exists()


def test_stored_rows_are_graded(tmp_path):
    """Two rows of every task but the slow ones, written and read again; their items are made in another order."""
    names = sorted(set(STABLE) - SLOW)
    rows = task_dialogues(f"task:{','.join(names)}:seed=3", "test", 2 * len(names))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(to_record(row, "messages")) + "\n" for row in rows))
    stored = rows_of(str(path), DataConfig(train=str(path)), "dialogue")
    assert len(stored) == 140
    assert [score_task(row, row.answer) for row in reversed(stored)] == [1] * 140
    system = [replace(row, messages=(Message("system", "Be brief."), *row.messages)) for row in stored]
    assert default_scorer(stored).name == default_scorer(system).name == "task"
    assert default_scorer([*stored, ROW]).name == "exact_match"
    assert default_scorer([replace(ROW, task="summary")]).name == "exact_match"


def test_answers_too_long_are_wrong():
    row = task_dialogues("task:gcd", "test", 1)[0]
    assert score_task(row, row.answer + " " * 20_000) == 1
    assert score_task(row, row.answer + "0" * 20_000) == 0
