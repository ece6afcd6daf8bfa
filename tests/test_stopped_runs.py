"""The guard in runs that really train: a planted fault ends the run or is said, and shipped recipes stay quiet."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_chat
import tiny_pairs
import torch
from test_resume import digests, interrupt
from test_run import trainer

from graft.cli import main
from graft.config import read_yaml
from graft.diagnosis.curve import Facts
from graft.diagnosis.diagnose import diagnose
from graft.diagnosis.guard import rows_of
from graft.diagnosis.rates import bearable
from graft.diagnosis.runs import read_lines, read_object, read_run
from graft.errors import GuardError
from graft.model import load_tokenizer
from graft.objectives.base import Loss
from graft.objectives.classify import Classify
from graft.recipe import Recipe
from graft.run import execute
from graft.train import checkpoint, resume
from graft.train.loop import Trainer

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
PARAMETERS = {"minilm-l6": 22_713_216, "smollm2-135m": 134_515_008}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """No simulated step, which takes longer than these runs and would meet the planted fault first."""
    monkeypatch.setattr("graft.run._forecast", lambda *_: None)
    monkeypatch.setattr(Trainer, "rehearse", lambda *_: None)


def plant(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Put `change(loss, pass)` around the loss of each training pass, counted from 1."""
    original, count = Classify.loss, 0

    def loss(self: Any, base: Any, examples: Any, route: Any) -> Loss:
        nonlocal count
        count += 1
        given = original(self, base, examples, route)
        return Loss(change(given.total, count), given.weight)

    monkeypatch.setattr(Classify, "loss", loss)


def recipe(place: Path, **training: Any) -> Recipe:
    given = tiny.settings(place)
    return Recipe.parse(given | {"training": given["training"] | training})


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text("utf-8")


def test_a_step_without_numbers_changes_nothing(place, tmp_path, monkeypatch):
    """Two bad steps among 30: neither the adapter nor the optimizer sees them, and the run ends."""
    seen: dict[int, list[torch.Tensor]] = {}
    step = Trainer._step

    def kept(trainer: Trainer, *arguments: Any) -> Any:
        found = step(trainer, *arguments)
        seen[found.step] = [tensor.detach().clone() for tensor in trainer.parameters()]
        return found

    monkeypatch.setattr(Trainer, "_step", kept)
    plant(monkeypatch, lambda total, count: total * math.nan if count in (1, 12) else total)
    report = execute(recipe(place), tmp_path / "run")
    assert report["steps"] == len(seen) == 30
    assert all(torch.equal(a, b) for a, b in zip(seen[12], seen[11], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[13], seen[12], strict=True))
    assert all(bool(tensor.isfinite().all()) for tensor in seen[30])
    bad_rows, damaged = read_lines(tmp_path / "run" / "bad_batch.jsonl")
    assert [row["step"] for row in bad_rows] == [1] * 16 + [12] * 16
    assert damaged == 0
    assert log(tmp_path / "run").count("so its 16 rows are left out") == 2
    assert all(math.isfinite(point["train_loss"]) for point in report["curve"])
    points, _ = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [point["step"] for point in points] == list(range(1, 31))
    assert math.isnan(points[11]["train_loss"])
    assert {finding.name for finding in diagnose(read_run(tmp_path / "run"))} == {"not finite"}


def test_the_command_names_cause_rows_and_the_last_good_checkpoint(place, tmp_path, monkeypatch, capsys):
    plant(monkeypatch, lambda total, count: total * math.nan if count > 17 else total)
    file, folder = tmp_path / "mine.yaml", tmp_path / "run"
    file.write_text(recipe(place).to_yaml(), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["graft", "train", str(file), "-o", str(folder), "--quiet"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 4
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "step 20: the loss is nan, for the third time in a row" in said
    assert "bad_batch.jsonl" in said
    assert str(folder / "checkpoints" / "best") in said
    assert checkpoint.check(folder / "checkpoints" / "best")["step"] <= 16
    kept = checkpoint.newest(folder / "checkpoints", pytest.fail)
    assert kept is not None
    assert checkpoint.check(kept)["step"] == 16


def test_a_zero_loss_stops_a_run(place, tmp_path, monkeypatch):
    plant(monkeypatch, lambda total, count: total * 0 if count > 9 else total)
    with pytest.raises(GuardError, match="the loss is exactly 0 at steps 10 to 12"):
        execute(recipe(place), tmp_path / "run")


def test_a_spike_that_stays_stops_a_run(place, tmp_path, monkeypatch):
    """The learned part is turned round at step 30 and the rate is too small to mend it."""
    step = Trainer._step

    def turned(trainer: Trainer, *arguments: Any) -> Any:
        found = step(trainer, *arguments)
        if found.step == 30:
            with torch.no_grad():
                assert trainer.adapter.head is not None
                for tensor in trainer.adapter.head.parameters():
                    tensor.mul_(-6)
        return found

    monkeypatch.setattr(Trainer, "_step", turned)
    given = recipe(place, num_train_epochs=6, lr_scheduler_type="linear")
    with pytest.raises(GuardError, match=r"the loss was .* at first and .* at its best, and is .*; the best adapter"):
        execute(given, tmp_path / "run")


def test_an_adapter_without_numbers_is_not_kept(place, tmp_path, monkeypatch):
    step = Trainer._step

    def spoiled(trainer: Trainer, *arguments: Any) -> Any:
        found = step(trainer, *arguments)
        if found.step == 30:
            with torch.no_grad():
                trainer.parameters()[0].fill_(math.nan)
        return found

    monkeypatch.setattr(Trainer, "_step", spoiled)
    with pytest.raises(GuardError, match="after step 30 the adapter has values that are no numbers"):
        execute(recipe(place, load_best_model_at_end=False), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_with_bad_steps_goes_on_with_the_same_bytes(place, tmp_path, monkeypatch):
    """Bad steps before and after the interruption; what is written behind the checkpoint is written once."""
    monkeypatch.setattr(resume.Keeper, "due", lambda keeper: keeper.folder is not None)
    bad: set[str] = set()

    def spoil(trainer: Trainer, chosen: Any) -> tuple[float, float]:
        loss, norm = original(trainer, chosen)
        return (math.nan, norm) if chosen[0].place in bad else (loss, norm)

    original = Trainer.gradients
    first = recipe(place, num_train_epochs=1)
    execute(first, tmp_path / "clean")
    bad.update(json.loads(line)["place"] for line in _firsts(first, (3, 5, 9)))
    monkeypatch.setattr(Trainer, "gradients", spoil)
    execute(first, tmp_path / "whole")
    interrupt(first, tmp_path / "parts", 7)
    execute(first, tmp_path / "parts")
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole") != digests(tmp_path / "clean")
    rows = [read_lines(tmp_path / name / "bad_batch.jsonl")[0] for name in ("whole", "parts")]
    assert [row["step"] for row in rows[0]] == [3] * 16 + [5] * 16 + [9] * 16
    assert json.dumps(rows[0]) == json.dumps(rows[1])


def _firsts(given: Recipe, steps: tuple[int, ...]) -> list[str]:
    """The place of the first row of some steps, as JSON lines."""
    from graft.data.batch import training_batches

    splits = given.objective.load(given.data)
    examples = given.objective.examples(splits.train, load_tokenizer(given.model), splits.labels, given.max_length)
    batches = list(training_batches([len(one) for one in examples], 16, seed=given.seed, epoch=0))
    return [json.dumps({"place": examples[batches[step - 1][0]].place}) for step in steps]


def test_memory_that_runs_out_within_a_step_drops_what_it_had_begun(place, monkeypatch):
    """The second of two passes fails: its step is done again in four, with the loss and gradient of the same rows."""
    passes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 6, "preflight": False}
    plain, train, validation = trainer(tiny.recipe(place), **passes)
    expected = plain.fit(train, validation)
    halved, train, validation = trainer(tiny.recipe(place), **passes)
    said: list[str] = []
    halved.say = said.append
    original, count = Classify.loss, 0

    def loss(self: Any, base: Any, examples: Any, route: Any) -> Loss:
        nonlocal count
        count += 1
        if count == 8:  # the second pass of step 4
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return original(self, base, examples, route)

    monkeypatch.setattr(Classify, "loss", loss)
    found = halved.fit(train, validation)
    assert halved.pass_rows == 4
    assert said == ["out of memory: passes of 4 rows from here on, each step has the same rows"]
    for figure in ("train_loss", "grad_norm"):
        values = [[getattr(point, figure) for point in run.points] for run in (found, expected)]
        assert len(values[0]) == 6
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    for one, other in zip(halved.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_rows_and_seconds_are_recorded(place, tmp_path):
    execute(recipe(place, num_train_epochs=1), tmp_path / "run")
    data = read_object(tmp_path / "run" / "env.json")["data"]
    assert data["rows"] == {"train": 240, "validation": 40}
    assert sorted(data["labels"]) == ["negative", "positive"]
    facts = read_run(tmp_path / "run").facts
    assert (facts.train_rows, facts.validation_rows, facts.classes) == (240, 40, 2)
    seen = read_run(tmp_path / "run").evaluations
    assert len(seen) == 4
    assert all(one.seconds is not None and one.seconds > 0 for one in seen)


def test_rows_of_pairs_are_both_answers(tmp_path):
    folder = tiny_pairs.write_all(tmp_path)
    given = tiny_pairs.recipe(folder, "dpo")
    tokenizer = load_tokenizer(given.model)
    examples = given.objective.examples(given.objective.load(given.data).train[:2], tokenizer, (), 96)
    found = rows_of(examples, tokenizer)
    assert [row.place for row in found] == [example.place for example in examples]
    assert "chosen: " in found[0].text
    assert "\nrejected: " in found[0].text
    assert "wide" in found[0].text
    assert rows_of(examples, None)[0].text.split()[1].isdigit()


# Shipped recipes -----------------------------------------------------------------------------------


def settings_of(path: Path) -> list[dict[str, Any]]:
    """Every run that a recipe file asks for, as its settings."""
    read = read_yaml(path)
    if "stages" in read:
        common = {key: value for key, value in read.items() if key != "stages"}
        return [common | stage for stage in read["stages"].values()]
    methods = read.pop("methods", None) or [read["method"]]
    read.pop("seeds", None)
    return [read | {"method": method} for method in methods]


def test_no_shipped_recipe_has_a_rate_that_is_warned_of():
    checked = 0
    for path in RECIPES:
        for settings in settings_of(path):
            method = {"name": settings["method"]} if isinstance(settings["method"], str) else settings["method"]
            rate, objective = method.get("learning_rate"), settings["objective"]
            name = objective if isinstance(objective, str) else objective["name"]
            parameters = PARAMETERS[settings["model"]]
            known = bearable(Facts(method=method["name"], objective=name, parameters=parameters))
            assert known is not None
            assert rate is None or known.low <= rate <= known.high, (path.name, method)
            checked += 1
    assert checked >= 50
    assert len(RECIPES) == 11


ALIGNED = {
    "dpo": {"name": "dpo"},
    "reward": {"name": "reward"},
    "grpo": {"name": "grpo", "rewards": ["length:3-6"], "num_generations": 4, "max_new_tokens": 6},
    "ppo": {"name": "ppo", "rewards": ["length:3-6"], "max_new_tokens": 6},
}


@pytest.mark.parametrize("name", ALIGNED)
def test_healthy_alignment_trains_without_an_alarm(tmp_path, name, monkeypatch):
    """Short runs of every objective of the shipped recipes for alignment: nothing above a note."""
    monkeypatch.setattr("graft.assess.TextAssessor._latency", lambda *_: 1.0)
    folder = tiny_pairs.write_all(tmp_path / "data")
    training = {"max_steps": 12, "num_train_epochs": 9, "per_device_train_batch_size": 8, "precision": "fp32"}
    if name in ("grpo", "ppo"):
        given = tiny_chat.recipe(folder, objective=ALIGNED[name], training=training, method={"name": "lora"})
    else:
        given = tiny_pairs.recipe(folder, ALIGNED[name], training=training)
    execute(given, tmp_path / "run")
    curve = read_run(tmp_path / "run")
    assert len(curve.steps) == 12
    assert name == "reward" or curve.steps[-1].watched
    assert [finding for finding in diagnose(curve) if finding.level != "note"] == []
    assert "likely cause" not in log(tmp_path / "run")
