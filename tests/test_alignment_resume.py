"""An alignment run that was ended goes on and ends with the same bytes: answers in hand, prices, references, draws."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import tiny_pairs
import torch
from test_resume import curve, digests, interrupt

from graft.alignment.rollouts import Rollout, packed, unpacked
from graft.objectives.grpo import Grpo
from graft.objectives.ppo import Ppo
from graft.recipe import Recipe
from graft.run import execute
from graft.train import checkpoint, resume
from graft.train.loop import Trainer

LORA = {"name": "lora", "r": 4, "learning_rate": 5e-3, "target_modules": "all-linear"}
GIVEN: dict[str, dict[str, Any]] = {
    "grpo": {"name": "grpo", "num_generations": 3, "num_iterations": 2, "max_new_tokens": 5},
    "ppo": {"name": "ppo", "num_ppo_epochs": 3, "max_new_tokens": 5, "kl_target": 0.01, "kl_horizon": 10},
    "dpo": {"name": "dpo"},
    "kto": {"name": "dpo", "variant": "kto"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_pairs.write_all(tmp_path_factory.mktemp("aligned"))
    (folder / "mine.py").write_text("def reward(prompt, answer, row):\n    return (sum(map(ord, answer)) % 17) / 17\n")
    execute(tiny_chat.recipe(folder, method=LORA, training=training(2)), folder / "sft")
    return folder


@pytest.fixture(autouse=True)
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """No simulated step and no timing, which take longer than these runs; the rehearsal stays."""
    monkeypatch.setattr("graft.run._forecast", lambda *_: None)
    monkeypatch.setattr("graft.assess.TextAssessor._latency", lambda *_: 1.0)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint behind every step."""
    monkeypatch.setattr(resume.Keeper, "due", lambda keeper: keeper.folder is not None)


def training(steps: int) -> dict[str, Any]:
    """Steps of few rows, evaluated once, at their end."""
    return {
        "max_steps": steps, "num_train_epochs": 9, "per_device_train_batch_size": 4, "precision": "fp32",
        "eval_steps": steps,
    }  # fmt: skip


def recipe(place: Path, name: str, steps: int = 7) -> Recipe:
    """A short run from a supervised start; those over pairs see each more than once."""
    given = GIVEN[name] | {"init": str(place / "sft")}
    if name in ("grpo", "ppo"):
        given["rewards"] = [{"file": str(place / "mine.py")}]
    make: Any = tiny_chat if name in ("grpo", "ppo") else tiny_pairs
    read = tiny_pairs.recipe(place, given, method=LORA) if make is tiny_pairs else None
    settings = (read or tiny_chat.recipe(place, objective=given, method=LORA)).resolved()
    data = settings["data"] | {"max_train_samples": 12, "max_eval_samples": 4}
    return Recipe.parse(settings | {"data": data, "training": training(steps)})


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("name", GIVEN)
def test_a_stopped_run_ends_as_if_it_had_not_been(place, tmp_path, name):
    """Policies within a drawing and between two, the others before and behind the end of the first epoch."""
    given = recipe(place, name)
    execute(given, tmp_path / "whole")
    for step in (3, 6) if name in ("dpo", "ppo") else (6,):
        interrupt(given, tmp_path / "parts", step)
        assert checkpoint.steps(tmp_path / "parts" / "checkpoints")[0] == step - 1
    execute(given, tmp_path / "parts")
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    points = curve(tmp_path / "whole")
    assert len(points) == 7
    assert len({json.dumps(point["watched"]) for point in points}) > 3  # it went somewhere
    assert "going on behind step 5" in (tmp_path / "parts" / "log.txt").read_text("utf-8")


@pytest.mark.usefixtures("often")
def test_the_comparison_sees_what_is_forgotten(place, tmp_path, monkeypatch):
    """The same run, but for the price of KL, which begins anew."""
    given = recipe(place, "ppo")
    execute(given, tmp_path / "whole")
    interrupt(given, tmp_path / "parts", 4)
    recall = Ppo.recall

    def forgetful(objective: Ppo, kept: Any) -> None:
        recall(objective, kept)
        assert objective._coef != objective.init_kl_coef
        objective._coef = objective.init_kl_coef

    monkeypatch.setattr(Ppo, "recall", forgetful)
    execute(given, tmp_path / "parts")
    assert digests(tmp_path / "parts") != digests(tmp_path / "whole")


def test_what_a_checkpoint_keeps_of_a_policy(place, tmp_path, monkeypatch):
    """The value head with the optimizer's memory of it, the answers in hand, the groups without a signal."""
    monkeypatch.setattr(resume.Keeper, "due", lambda keeper: keeper.folder is not None)
    kept = {}
    for name in ("grpo", "ppo"):
        interrupt(recipe(place, name), tmp_path / name, 4)
        path = checkpoint.at(tmp_path / name / "checkpoints", 3)
        kept[name] = checkpoint.read_training(path)
        adapter = checkpoint._load(path / "adapter.safetensors")
        optimizer = {key.split(".")[1] for key in kept[name] if key.startswith("optimizer.")}
        assert len(optimizer) == len(adapter)
        assert ("head.out.weight" in adapter) == (name == "ppo")
    assert len(resume.remembered(kept["grpo"])["silent"]) == 2 + 1  # a share for each drawing, and what the last earned
    rows = resume.remembered(kept["ppo"])["rollouts.rows"]
    assert rows.shape == (4, 5)


def test_rollouts_as_tensors_are_the_same_again():
    asked: list[Any] = [object(), object()]
    draw = [torch.randn(size) for size in (3, 1)]
    before = [
        Rollout([1, 2, 3, 4, 5], 2, True, asked[1], draw[0], old=draw[0] + 1, values=draw[0]),
        Rollout([6, 7], 1, False, asked[0], draw[1], old=draw[1] + 1, values=draw[1]),
    ]
    kept = packed(before, {id(prompt): number for number, prompt in enumerate(asked)})
    assert set(kept) == {"ids", "rows", "advantages", "old", "values"}
    for one, other in zip(before, unpacked(kept, asked), strict=True):
        assert (one.ids, one.prompt, one.ended) == (other.ids, other.prompt, other.ended)
        assert one.asked is other.asked
        assert other.reference is None
        assert torch.equal(one.advantages, other.advantages)
        assert one.old is not None
        assert other.old is not None
        assert torch.equal(one.old, other.old)
    assert unpacked(packed([], {}), asked) == []


def test_a_run_that_goes_on_knows_which_tensors_had_a_gradient(place, tmp_path, monkeypatch):
    """Stopped before the check that all have moved, and with no signal in the steps between."""
    monkeypatch.setattr(resume.Keeper, "due", lambda keeper: keeper.folder is not None)
    monkeypatch.setitem(GIVEN, "grpo", GIVEN["grpo"] | {"beta": 0.0})  # else the distance alone gives a gradient
    given = recipe(place, "grpo", 14)
    checked = given.objective.patience + 2
    interrupt(given, tmp_path / "run", checked)

    def silent(objective: Grpo, earned: Any) -> None:
        earned.fill_(1.0)

    monkeypatch.setattr(Grpo, "_judge_groups", silent)
    monkeypatch.setattr(Trainer, "rehearse", lambda *_: None)
    assert execute(given, tmp_path / "run")["steps"] == 14


RUN = """
import json, sys
from pathlib import Path
import tiny_pairs
import torch
from graft.recipe import Recipe
from graft.run import execute
from graft.train import resume
torch.set_num_threads(1)
resume.Keeper.due = lambda keeper: keeper.folder is not None
execute(Recipe.parse(json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.faults
@pytest.mark.parametrize("name", GIVEN)
def test_killed_runs(place, tmp_path, name):
    """kill -9 behind a step, with no time to write anything, twice."""
    given = recipe(place, name, 9)
    execute(given, tmp_path / "whole")
    parts = tmp_path / "parts"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    kills = 0
    for step in (2, 5):
        with subprocess.Popen(
            [sys.executable, "-c", RUN, json.dumps(given.resolved()), str(parts)], env=environment
        ) as child:
            while child.poll() is None and not checkpoint.at(parts / "checkpoints", step).exists():
                time.sleep(0.002)
            child.send_signal(signal.SIGKILL)
        kills += child.returncode == -signal.SIGKILL
    assert kills == 2
    execute(given, parts)
    assert digests(parts) == digests(tmp_path / "whole")
    assert curve(parts) == curve(tmp_path / "whole")
