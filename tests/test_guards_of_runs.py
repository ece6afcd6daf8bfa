"""Detectors and the guard of a run: each planted fault is found, and healthy runs are left alone."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import curves
import pytest
import tiny
import tiny_chat
from test_run import RATES, SHORTER

from graft.data.load import read_rows
from graft.diagnosis.advice import assignments, diff
from graft.diagnosis.curve import Curve, Evaluation, Facts, Finding
from graft.diagnosis.diagnose import DETECTORS, STOPPING, diagnose
from graft.diagnosis.guard import LONGEST_TEXT, Row, RunGuard, rows_of, write_rows
from graft.diagnosis.rates import bearable
from graft.diagnosis.runs import read_run
from graft.errors import GuardError
from graft.methods.base import methods
from graft.model import load_tokenizer
from graft.objectives.classify import Classify
from graft.run import execute

SLOW = pytest.mark.slow
STOPS = {
    "not finite", "loss exactly 0", "no gradient", "diverged", "no descent", "margin does not move",
    "reward is constant",
}  # fmt: skip
TRUE_OF_REAL = {
    ("all-methods/longlora-seed2", "overfit"),  # its evaluation loss rises from 0.43 to 0.68
    ("family-methods/bottleneck-learning_rate-0.001-seed1", "still learning"),  # 0.337 to 0.117, quality 66.7 to 93.3 %
}
"""What is found in the stored curves, and is so."""


def names(found: list[Finding]) -> set[str]:
    return {finding.name for finding in found}


def watch(curve: Curve) -> list[str]:
    """What a guard says to a curve that is told to it step by step. Raises `GuardError` where it stops."""
    said: list[str] = []
    guard = RunGuard(replace(curve.facts, state=None), said.append)
    evaluations = {one.number: one for one in curve.evaluations}
    for step in curve.steps:
        guard.may_step(step.number, step.loss, step.norm or 0.0, lambda: [Row("rows.jsonl:1", "text")])
        guard.after_step(step)
        if step.number in evaluations:
            guard.after_evaluation(evaluations[step.number])
    return said


@pytest.mark.parametrize("name", curves.PLANTED)
def test_a_planted_fault_is_found(name):
    found = {finding.name: finding for finding in diagnose(curves.PLANTED[name]())}
    assert name in found
    finding = found[name]
    assert any(sign.isdigit() for sign in finding.evidence) or finding.name == "not compiled"
    assert finding.stops == (name in STOPS)
    if name not in ("failed", "stopped"):  # their cause is what the run said
        assert finding.causes


def test_every_detector_has_a_planted_fault():
    found_by = {
        detect: {finding.name for name in curves.PLANTED if (finding := detect(curves.PLANTED[name]())) is not None}
        for detect in DETECTORS
    }
    assert len(found_by) == len(DETECTORS) >= 25
    assert [detect.__name__ for detect, found in found_by.items() if not found] == []
    assert set().union(*found_by.values()) == set(curves.PLANTED)


def test_made_up_healthy_runs_are_left_alone():
    for seed in range(20):
        assert diagnose(curves.healthy(seed)) == []
        assert watch(curves.healthy(seed)) == []


def test_made_up_healthy_alignment_is_left_alone():
    draw = random.Random(4)
    runs = [curves.policy(count, 1, "grpo") for count in (40, 60, 200)]
    runs += [curves.policy(count, 4, "ppo") for count in (60, 160, 400)]
    runs += [curves.preferences(lambda step: 0.02 * step + draw.uniform(-0.1, 0.1) * (step > 0)) for _ in range(5)]
    # Solved: one answer to each prompt, and it is the right one.
    solved = curves.policy(entropy=lambda step: 0.7 / step**2, silent=lambda step: min(1.0, step / 30))
    runs.append(replace(solved, evaluations=[*solved.evaluations[:-1], Evaluation(60, 2.0, 0.99, {"ended": 1.0})]))
    # With equal rewards in its first steps GRPO has a loss of exactly 0.
    begun = curves.policy()
    runs.append(replace(begun, steps=[replace(step, loss=0.0) if step.number < 6 else step for step in begun.steps]))
    # Cut off from the first step on, as by a small max_new_tokens.
    cut = curves.policy(160, 4, "ppo", ended=lambda step: 0.6)
    runs.append(replace(cut, evaluations=[Evaluation(160, 2.0, 0.5, {"ended": 0.1})]))
    assert len(runs) == 14
    for curve in runs:
        assert [finding for finding in diagnose(curve) if finding.level != "note"] == []
        assert watch(curve) == []


def test_alignment_that_does_nothing_or_too_much():
    draw = random.Random(4)
    noise = curves.preferences(lambda step: draw.uniform(-0.1, 0.1) * (step > 0))
    found = {finding.name: finding for finding in diagnose(noise)}
    assert found["margin does not move"].level == "warning"
    assert not found["margin does not move"].stops
    far = curves.policy(160, 4, "ppo", kl=lambda step: 0.5 * step)
    assert {finding.name for finding in diagnose(far)} == {"policy runs away"}
    assert "objective.kl_target is 6" in diagnose(far)[0].evidence
    lost = curves.policy(160, 4, "ppo", ended=lambda step: max(0.0, 1 - step / 80))
    lost = replace(lost, evaluations=[Evaluation(160, 2.0, 0.5, {"ended": 0.1})])
    assert names(diagnose(lost)) == {"answers do not end"}
    assert diagnose(lost)[0].level == "warning"


def test_real_runs_are_left_alone():
    found = set()
    pairs = 0
    known = curves.real()
    for curve in known:
        for detect in DETECTORS:
            finding = detect(curve)
            pairs += 1
            if finding is not None:
                found.add((curve.source, finding.name))
                assert finding.level != "serious"
                assert not finding.stops
    assert found == TRUE_OF_REAL
    assert len({curve.facts.method for curve in known}) >= 21
    assert pairs == len(known) * len(DETECTORS) >= 33 * 25


def test_a_guard_lets_real_runs_train():
    said = {curve.source: watch(curve) for curve in curves.real()}
    assert len(said) >= 33
    assert {source for source, lines in said.items() if lines} == {"all-methods/longlora-seed2"}
    assert len(said["all-methods/longlora-seed2"]) == 1  # once, though it is so at two evaluations


def test_no_beginning_of_a_real_run_stops_it():
    looks = 0
    for curve in curves.real():
        for end in range(1, len(curve.steps), 7):
            part = Curve(curve.source, curve.steps[:end], (), curve.facts)
            assert not any(finding.stops for finding in diagnose(part, STOPPING)), (curve.source, end)
            looks += 1
    assert looks > 800


@pytest.mark.parametrize("name", sorted(STOPS))
def test_a_guard_stops_what_cannot_become_good(name):
    planted = curves.PLANTED[name]()
    longer = replace(planted, facts=replace(planted.facts, total=2 * planted.last))
    with pytest.raises(GuardError) as caught:
        watch(longer)
    assert caught.value.exit_code == 4
    message = str(caught.value)
    assert "\n" not in message
    assert "likely cause" in message
    assert any(sign.isdigit() for sign in message)


def test_a_guard_warns_once():
    said = watch(curves.healthy(peak_rate=0.5))
    assert len(said) == 1
    assert said[0].startswith("learning rate: the learning rate is 0.5 at its peak; lora on a base of 23 M parameters")
    assert said[0].endswith("try method.learning_rate=0.004")


def test_an_evaluation_without_numbers_is_told():
    said: list[str] = []
    guard = RunGuard(curves.FACTS, said.append)
    for step in curves.steps_of(curves.falling(30)):
        guard.after_step(step)
    guard.after_evaluation(Evaluation(30, math.nan, 0.5))
    guard.after_evaluation(Evaluation(31, math.nan, 0.5))
    assert len(said) == 1
    assert said[0].startswith("not finite: step 30: the evaluation loss is nan")


def test_divergence_is_seen_soon():
    losses = [*curves.falling(400), *[4.0] * 200]
    guard = RunGuard(replace(curves.FACTS, total=600), lambda line: None)
    for step in curves.steps_of(losses):
        try:
            guard.after_step(step)
        except GuardError:
            assert 420 <= step.number <= 440
            return
    raise AssertionError("it was not stopped")


def test_steps_without_numbers_are_left_out_then_stop(tmp_path):
    said: list[str] = []
    file = tmp_path / "bad_batch.jsonl"
    guard = RunGuard(Facts(), said.append, file)
    rows = [Row(f"train.jsonl:{line}", "x" * 3_000) for line in range(1, 6)]
    assert guard.may_step(1, 0.7, 1.0, lambda: rows)
    assert not guard.may_step(2, math.nan, 1.0, lambda: rows)
    assert not guard.may_step(3, 0.7, math.inf, lambda: rows)
    assert guard.may_step(4, 0.7, 1.0, lambda: rows)  # it counts anew
    assert not guard.may_step(5, math.nan, math.nan, lambda: rows)
    assert not guard.may_step(6, math.nan, math.nan, lambda: rows)
    with pytest.raises(GuardError, match=r"step 7: the loss is nan, for the third time in a row; rows train.jsonl:1, "):
        guard.may_step(7, math.nan, math.nan, lambda: rows)
    assert len(said) == 4
    assert said[0].startswith("step 2: the loss is nan, so its 5 rows are left out: train.jsonl:1, train.jsonl:2")
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in kept] == [step for step in (2, 3, 5, 6, 7) for _ in rows]
    assert kept[0] == {
        "step": 2, "loss": "nan", "grad_norm": "1.0", "place": "train.jsonl:1", "text": "x" * LONGEST_TEXT
    }  # fmt: skip


def test_an_interrupted_run_keeps_its_guard():
    facts = replace(curves.FACTS, peak_rate=0.5)
    said: list[str] = []
    guard = RunGuard(facts, said.append)
    bad = [replace(step, loss=math.nan) for step in curves.steps_of([0.0, 0.0])]
    good = curves.steps_of(curves.falling(40))
    guard.resumed([*good, *[replace(step, number=41 + index) for index, step in enumerate(bad)]])
    assert guard.skipped == 2
    with pytest.raises(GuardError):
        guard.may_step(43, math.nan, 1.0, list)
    guard.after_evaluation(Evaluation(43, 0.5, 0.7))
    assert said == []  # the rate was told before the interruption


def test_rows_as_text(tmp_path):
    place = tiny.write_all(tmp_path)
    tokenizer = load_tokenizer(str(place / "model"))
    rows = read_rows(str(place / "train.jsonl"), need_label=True)[:2]
    examples = Classify().examples(rows, tokenizer, ("negative", "positive"), 24)
    found = rows_of(examples, tokenizer)
    assert [row.place for row in found] == [row.place for row in rows]
    assert rows[0].text in found[0].text
    write_rows(tmp_path / "b.jsonl", 3, math.nan, 0.0, found)
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 2


def test_ranges_hold_every_default():
    checked = 0
    for name, kind in methods().items():
        for parameters, rate in (
            (22_700_000, kind.rate_small),
            (7_000_000_000, kind.rate_large),
            (None, kind.rate_small),
        ):
            known = bearable(Facts(method=name, parameters=parameters))
            assert known is not None
            assert known.low < rate < known.high, (name, parameters)
            checked += 1
        near = bearable(Facts(method=name, parameters=134_515_008))
        assert near is not None
        assert near.low < kind.rate_large < near.high
    assert checked >= 60
    assert bearable(Facts(method="lora", parameters=134_515_008)).high > 2e-3  # which is best there
    assert bearable(Facts(method="full", parameters=7_000_000_000)).high < 1e-3
    assert bearable(Facts(method="lora", parameters=50_000)) is None
    assert bearable(Facts(method="nothing")) is None
    assert bearable(Facts(method="frozen", recipe={"method": {"name": "frozen", "last_layers": 0}})) is None


def test_memorized_rows_are_no_fault():
    losses = [*[0.7 * 0.9**index for index in range(150)], *[0.0] * 50]
    assert not names(diagnose(curves.curve(losses))) & STOPS


def test_a_spike_that_comes_back_does_not_stop():
    found = diagnose(curves.PLANTED["spike"]())
    assert [finding.level for finding in found] == ["note"]


def test_changes_are_a_diff_and_a_command():
    found = diagnose(curves.PLANTED["diverged"]())
    assert diff(curves.FACTS.recipe, found[0].changes) == [
        "- method.learning_rate: 0.004", "+ method.learning_rate: 0.0013",
    ]  # fmt: skip
    assert assignments(found) == ["method.learning_rate=0.0013"]
    assert diff({}, {"learning_rate": 1e-5}) == ["+ learning_rate: 1e-05"]


FAULTS = {
    "diverged": {"method": {"name": "full", "learning_rate": 0.5}},
    "no descent": {"method": {"name": "lora", "learning_rate": 1e-5}},
    "overfit": {"method": {"name": "full", "learning_rate": 5e-3}},
}
"""Settings of tiny runs that go wrong."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", ["diverged", *(pytest.param(name, marks=SLOW) for name in [*FAULTS][1:])])
def test_a_tiny_run_that_goes_wrong(place, tmp_path, name):
    settings = tiny.settings(place, **FAULTS[name])
    settings["training"] |= {"num_train_epochs": 12}
    if name == "overfit":  # labels of chance: there is nothing to learn but the rows themselves
        rows = tiny.rows(32, 7)
        noise = [row | {"label": ("positive", "negative")[(index // 2) % 2]} for index, row in enumerate(rows)]
        settings["data"] |= {"train": str(tiny.write_rows(tmp_path / "noise.jsonl", noise))}
        settings["training"] |= {"num_train_epochs": 40}
    recipe = tiny.Recipe.parse(settings)
    if name in STOPS:
        with pytest.raises(GuardError):
            execute(recipe, tmp_path / "run")
    else:
        execute(recipe, tmp_path / "run")
        log = (tmp_path / "run" / "log.txt").read_text("utf-8").splitlines()
        assert sum(line.startswith(f"{name}: ") for line in log) == 1
    curve = read_run(tmp_path / "run")
    assert curve.ended == (name not in STOPS)
    assert name in names(diagnose(curve))


@pytest.mark.parametrize("method", ["lora", *(pytest.param(name, marks=SLOW) for name in RATES if name != "lora")])
def test_a_healthy_tiny_run(place, tmp_path, method):
    execute(
        tiny.recipe(place, method={"name": method, "learning_rate": RATES[method]} | SHORTER.get(method, {})),
        tmp_path / "run",
    )
    curve = read_run(tmp_path / "run")
    assert len(curve.steps) == 30
    assert curve.facts.classes == 2
    assert curve.facts.train_rows == 240
    assert curve.evaluations[-1].figures["majority"] == 0.5
    assert diagnose(curve) == []
    assert watch(curve) == []


@pytest.mark.slow
def test_a_healthy_tiny_chat_run_and_one_whose_answers_do_not_end(tmp_path):
    place = tiny_chat.write_all(tmp_path / "data")
    training = {"num_train_epochs": 5, "per_device_train_batch_size": 8, "precision": "fp32"}
    execute(tiny_chat.recipe(place, training=training), tmp_path / "good")
    good = read_run(tmp_path / "good")
    assert names(diagnose(good)) == {"few validation rows"}  # there are twelve
    assert watch(good) == []
    objective = {"name": "instruct", "max_new_tokens": 1}
    execute(tiny_chat.recipe(place, training=training, objective=objective), tmp_path / "bad")
    bad = read_run(tmp_path / "bad")
    assert "answers do not end" in names(diagnose(bad))
    assert sum(line.startswith("answers do not end") for line in watch(bad)) == 1
