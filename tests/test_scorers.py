"""Scorers: against the libraries, against cases by hand, and on odd answers."""

import importlib.util
import time
from dataclasses import replace

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from graft import scorers
from graft.data.dialogue import Dialogue, Message
from graft.data.tasks import task_dialogues
from graft.errors import DataError, RecipeError, UsageError
from graft.scorers import SCORERS, default_scorer, fold, read_scorer, tokens

ENGLISH = [
    ("The cat sat on the mat.", "A cat is on the mat"),
    ("Friday", "friday."),
    ("I do not know, sorry!", "It is 3.5 km, isn't it?"),
    ("one two three four five six", "one two three four five six"),
    ("snake_case and e-mail", "snake case, and email"),
    ("nothing in common", "quite different words"),
]


def row(reference: str) -> Dialogue:
    return Dialogue((Message("user", "?"), Message("assistant", reference)), "1", "my.jsonl:7")


def grade(name: str, answer: str, reference: str) -> float:
    return read_scorer(name).items([answer], [row(reference)])[0]


# By hand ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("Friday", "Friday", 1),
        ("  friDAY.\n", "Friday", 1),
        ("a  b\n c", "A b C.", 1),
        ("3.5", "3.5", 1),
        ("35", "3.5", 0),
        ("", "Friday", 0),
        (".", ".", 1),
        ("", ".", 0),
        ("STRASSE", "straße", 1),
        ("e\u0301", "é", 1),
        ("東京", "東京", 1),
        ("on Friday", "Friday", 0),
    ],
)
def test_exact_match(answer, reference, score):
    assert grade("exact_match", answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("It was a Friday, then.", "friday", 1),
        ("I know", "no", 0),
        ("no, never", "No.", 1),
        ("113", "13", 0),
        ("it is (13)", "13", 1),
        ("私は東京にいる", "東京", 1),
        ("a+b = c", "+", 1),
        ("is it a.b*c?", "a.b*c", 1),
        ("is it axbxc?", "a.b*c", 0),
        ("", "x", 0),
        ("the grand  mother", "grand mother", 1),
    ],
)
def test_contains(answer, reference, score):
    assert grade("contains", answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("a b c", "a b c", 1),
        ("a a b", "a b b", 2 / 3),
        ("a b c d", "A, b!", 2 / 3),
        ("x", "y", 0),
        ("", "y", 0),
        ("?!", "?!", 1),
        ("?!", "!", 0),
        ("東京都", "東京", 0.8),
        ("हिन्दी भाषा", "हिन्दी", 2 / 3),
    ],
)
def test_token_f1(answer, reference, score):
    assert grade("token_f1", answer, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"a": [1, null]}', 1),
        (' "x"\n', 1),
        ("3", 1),
        ("", 0),
        ("{'a': 1}", 0),
        ('{"a": 1} and', 0),
        ('```json\n{"a": 1}\n```', 0),
        ("NaN", 0),
        ("[Infinity]", 0),
        ("[" * 100_000, 0),
        ("1" * 10_000, 0),
    ],
)
def test_json_valid(answer, score):
    assert grade("json_valid", answer, "") == score


def test_tokens_and_folding():
    assert tokens("Don't — naïve CAFÉ, 東京 3.5€!") == ["don", "t", "naïve", "café", "東", "京", "3", "5"]
    assert fold(" A\u00a0b. ") == "a b"
    assert tokens("") == tokens(" …🎉 ") == []


# Against the libraries --------------------------------------------------------------------------


def test_tokens_of_ascii_are_those_of_rouge_score():
    theirs = DefaultTokenizer()
    texts = [text for pair in ENGLISH for text in pair] + ["".join(map(chr, range(128))), "A__b\t\n c  -d"]
    for text in texts:
        assert tokens(text) == theirs.tokenize(text)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge(name):
    theirs = RougeScorer([name])
    found = read_scorer(name).items([answer for answer, _ in ENGLISH], [row(wanted) for _, wanted in ENGLISH])
    assert found == [theirs.score(wanted, answer)[name].fmeasure for answer, wanted in ENGLISH]
    assert len(set(found)) > 2


def test_rouge_by_hand():
    assert grade("rouge1", "the cat", "the big cat") == pytest.approx(0.8)
    assert grade("rouge2", "a b c", "a b d") == pytest.approx(0.5)
    assert grade("rougeL", "a c b", "a b c") == pytest.approx(2 / 3)
    assert RougeScorer(["rouge1"]).score("東京 です", "東京")["rouge1"].fmeasure == 0
    assert grade("rouge1", "東京", "東京 です") == pytest.approx(2 / 3)
    assert grade("rouge1", "был", "Был.") == 1


def test_bleu_and_chrf():
    answers, wanted = [answer for answer, _ in ENGLISH], [reference for _, reference in ENGLISH]
    rows = [row(reference) for reference in wanted]
    sentence = {"bleu": sacrebleu.sentence_bleu, "chrf": sacrebleu.sentence_chrf}
    whole = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}
    for name in sentence:
        found = read_scorer(name).items(answers, rows)
        theirs = [sentence[name](*pair).score / 100 for pair in zip(answers, ([text] for text in wanted), strict=True)]
        assert found == [min(1, score) for score in theirs]
        assert found[3] == pytest.approx(1)
        assert max(found) <= 1
        corpus = read_scorer(name).corpus(answers, rows)
        assert corpus == whole[name](answers, [wanted]).score / 100
        assert 0 < corpus < 1
        assert read_scorer(name).corpus(["one two three four"], [row("one two three four")]) == pytest.approx(1)


def test_corpus_figures_are_of_bleu_and_chrf_alone():
    told = {name for name, scorer in SCORERS.items() if name != "task" and scorer.corpus(["x"], [row("x")]) is not None}
    assert told == {"bleu", "chrf"}
    assert read_scorer("bleu").corpus([], []) is None


# Tasks and patterns -----------------------------------------------------------------------------


def test_task_and_default():
    rows = task_dialogues("task:family_relationships,calendar_arithmetic", "test", 10)
    assert default_scorer(rows).name == "task"
    assert default_scorer(rows).items([one.answer for one in rows], rows) == [1] * 10
    assert default_scorer(rows).items([""] * 10, rows) == [0] * 10
    assert default_scorer([*rows, row("x")]).name == default_scorer([]).name == "exact_match"
    with pytest.raises(DataError, match=r"my\.jsonl:7: no starter task made this row"):
        read_scorer("task").items(["x"], [row("x")])


def test_regex():
    scorer = read_scorer(r"regex:^\d+ (km|m)$")
    assert scorer.name == r"regex:^\d+ (km|m)$"
    assert scorer.items(["3 km", "3 cm", "", "x 3 m"], [row("")] * 4) == [1, 0, 0, 0]
    assert read_scorer("regex:b").items(["abc"], [row("")]) == [1]
    assert read_scorer("regex:(?i)B").items(["abc"], [row("")]) == [1]
    assert read_scorer("regex:x").items(["a" * 10_000 + "x"], [row("")]) == [0]
    assert read_scorer("regex:[[a]").items(["["], [row("")]) == [1]


@pytest.mark.parametrize("pattern", ["", "(", "[a", "(?P<n>a)(?P<n>b)", "a{99999999999}", "a" * 501, "(?<=a+)b"])
def test_bad_patterns(pattern):
    with pytest.raises(RecipeError) as caught:
        read_scorer(f"regex:{pattern}")
    assert "\n" not in str(caught.value)


def test_patterns_that_take_for_ever(monkeypatch):
    monkeypatch.setattr(scorers, "_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(
        RecipeError, match=r"regex:\(a\+\)\+b: the search in the answer to my\.jsonl:7 took more than 0\.3"
    ):
        read_scorer("regex:(a+)+b").items(["a" * 60], [row("")])
    assert time.monotonic() - start < 5


# Errors and odd answers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("exact", "no scorer 'exact', did you mean 'exact_match'?"),
        ("rougel", "did you mean 'rougeL'?"),
        ("regexp:a", "no scorer 'regexp:a', "),
        ("regex", "regex:PATTERN"),
        ("accuracy", "known: bleu, chrf, contains, exact_match"),
    ],
)
def test_unknown_names(name, phrase):
    with pytest.raises(RecipeError) as caught:
        read_scorer(name)
    assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package"), [("rouge1", "rouge_score"), ("chrf", "sacrebleu"), ("task", "reasoning_gym")]
)
def test_missing_packages_are_told_at_once(name, package, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(scorers, "find_spec", lambda wanted: None if wanted == package else find(wanted))
    with pytest.raises(
        UsageError, match=f"scorer {name} needs the package {package}, which is missing; pip install"
    ) as caught:
        read_scorer(name)
    assert ("[tasks]" if name == "task" else "[metrics]") in str(caught.value)


def test_rows_without_a_reference():
    compare = [name for name, scorer in SCORERS.items() if scorer.reads_reference]
    assert len(compare) == 8
    asked = replace(row("x"), messages=(Message("user", "x"),))
    for name in compare:
        for bad in (row(""), row(" \n"), asked):
            with pytest.raises(DataError, match=rf"my\.jsonl:7: no reference answer, which {name} compares with"):
                SCORERS[name].items(["x"], [bad])


def test_one_answer_for_each_row():
    with pytest.raises(ValueError, match="2 answers for 1 rows"):
        read_scorer("bleu").items(["x", "y"], [row("x")])
    assert read_scorer("bleu").items([], []) == []


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "task"])
def test_odd_answers(name):
    start = time.monotonic()
    odd = ["", " ", "\x00", "é", "🎉", "\ud800", "word " * 20_000, "x" * 100_000, "東" * 20_000, ".", "\u202eabc", "\\"]
    scores = SCORERS[name].items(odd, [row("the Cat sat é 東京.")] * len(odd))
    assert len(scores) == len(odd)
    assert all(0 <= score <= 1 for score in scores)
    assert time.monotonic() - start < 10
    if SCORERS[name].reads_reference:
        assert scores[0] == 0
