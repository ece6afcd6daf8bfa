"""What stops an alignment run, or is told of it: each guard with a planted fault and a healthy run beside it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import tiny_pairs
import torch
from torch import Tensor

from graft.alignment.rewards import Rewards, RewardSource, Said
from graft.data.dialogue import Dialogue, Message
from graft.errors import DataError, GuardError, UsageError
from graft.objectives import dpo, online
from graft.objectives.dpo import Dpo
from graft.objectives.grpo import Grpo
from graft.run import execute

LORA = {"name": "lora", "r": 4, "learning_rate": 5e-3, "target_modules": "all-linear"}


@pytest.fixture(autouse=True, scope="module")
def unplanned():
    """No simulated step and no timing, which take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graft.run._forecast", lambda *_: None)
        patch.setattr("graft.assess.TextAssessor._latency", lambda *_: 1.0)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pairs.write_all(tmp_path_factory.mktemp("guarded"))


def training(steps: int) -> dict[str, Any]:
    return {
        "max_steps": steps, "num_train_epochs": 9, "per_device_train_batch_size": 2, "precision": "fp32",
        "preflight": False, "eval_steps": 4,
    }  # fmt: skip


def policy(place: Path, body: str, steps: int = 12, **more: Any) -> Any:
    """A run that is rewarded by a function of this body."""
    file = place / f"reward{abs(hash(body))}.py"
    file.write_text(f"calls = 0\ndef reward(prompt, answer, row):\n    global calls\n    calls += 1\n    {body}\n")
    given = {"name": "grpo", "rewards": [{"file": str(file)}], "max_new_tokens": 4} | more
    given |= {"num_generations": 2} if given["name"] == "grpo" else {}
    settings = tiny_chat.settings(place, objective=given, method=LORA, training=training(steps))
    settings["data"] |= {"max_eval_samples": 4}
    return tiny_chat.Recipe.parse(settings)


def pairs(place: Path, objective: Any, steps: int = 11, **more: Any) -> Any:
    settings = tiny_pairs.settings(place, objective, method=LORA, training=training(steps))
    settings["data"] |= {"max_eval_samples": 4} | more
    return tiny_pairs.Recipe.parse(settings)


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text("utf-8")


# The reference --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "grpo", "ppo"])
def test_a_policy_that_is_not_the_reference_stops_a_run_before_its_first_step(place, tmp_path, monkeypatch, name):
    """The fault: a policy whose log-probabilities are a millionth off. The healthy case is every other run."""
    module: Any = dpo if name == "dpo" else online
    read = module.answer_logps

    def off(base: Any, rows: Any, entry: Any, *more: Any) -> tuple[Tensor, Tensor]:
        found, targets = read(base, rows, entry, *more)
        return found * (1 + 1e-6) if entry is not None else found, targets

    monkeypatch.setattr(module, "answer_logps", off)
    given = pairs(place, "dpo") if name == "dpo" else policy(place, "return 1", name=name)
    with pytest.raises(GuardError, match="before the first step the policy is not the reference"):
        execute(given, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# Margins --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["sigmoid", "kto"])
def test_a_margin_that_does_not_move_stops_a_run_at_step_ten(place, tmp_path, variant):
    """The fault: a β so small that the policy is held to nothing; AdamW moves the tensors all the same."""
    with pytest.raises(GuardError, match="after step 10 no margin has moved from 0"):
        execute(pairs(place, {"name": "dpo", "variant": variant, "beta": 1e-9}), tmp_path / "fault")
    assert json.loads((tmp_path / "fault" / "status.json").read_text("utf-8"))["state"] == "failed"
    report = execute(pairs(place, {"name": "dpo", "variant": variant}), tmp_path / "run")
    assert report["steps"] == 11


def test_single_answers_have_to_come_away_from_the_reference_too():
    objective = Dpo(variant="kto")
    for step in range(1, 10):
        assert objective.after_step(step) == {"kl": 0.0}
    with pytest.raises(GuardError, match="after step 10"):
        objective.after_step(10)
    objective._moved = True
    objective.after_step(10)


# Groups ---------------------------------------------------------------------------------------------


def test_groups_of_equal_rewards_are_counted_and_stop_a_run(place, tmp_path):
    with pytest.raises(GuardError, match="first 10 steps every group of 2 answers had equal rewards, the last 3"):
        execute(policy(place, "return 3"), tmp_path / "fault")
    points = [json.loads(line) for line in (tmp_path / "fault" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert len(points) == 9
    assert {point["watched"]["silent"] for point in points} == {1.0}
    execute(policy(place, "return calls % 7"), tmp_path / "run")
    points = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert min(point["watched"]["silent"] for point in points) < 0.5
    assert "taught nothing" not in log(tmp_path / "run")


def test_a_short_run_without_a_signal_says_so_at_its_end(place, tmp_path):
    execute(policy(place, "return 3", 4), tmp_path / "run")
    assert "100% of the groups of the last 4 steps had equal rewards and taught nothing" in log(tmp_path / "run")


@pytest.mark.parametrize(
    ("alike", "cause"),
    [
        (0.0, "the task is too hard for the policy"),
        (1.0, "the policy is always right"),
        (0.4, "the reward hardly differs"),
    ],
)
def test_the_cause_is_read_from_the_groups_that_were_equal(alike, cause):
    """Not from the first group, which differs here and earned 1 and 0."""
    objective, said = Grpo(rewards=["exact_match"]), []
    objective._say = said.append
    rewards = torch.full((10, 2), alike)
    rewards[0] = torch.tensor([1.0, 0.0])
    for _ in range(10):
        objective._judge_groups(rewards)
    assert len(said) == 1
    assert f"the last earned {alike:g}; likely {cause}" in said[0]


# Functions ------------------------------------------------------------------------------------------

FAULTS = {
    "return 1 / (calls - 22) if calls == 22 else calls % 3": "it raised ZeroDivisionError: division by zero",
    "return float('nan') if calls == 22 else calls % 3": "it gave nan, which is no finite number",
    "return [1, 2] if calls == 22 else calls % 3": r"it gave \[1, 2\], which is no finite number",
    "return __import__('time').sleep(9) if calls == 22 else calls % 3": "it took more than 0.3 s",
    "return __import__('sys').exit() if calls == 22 else calls % 3": "it raised SystemExit",
}


@pytest.mark.parametrize("body", FAULTS)
def test_a_function_that_fails_late_stops_the_run_and_leaves_what_it_had(place, tmp_path, body):
    """The 22nd call is at step five; the evaluation of step four, and the checkpoint behind it, stay."""
    with pytest.raises(GuardError, match=rf"reward .*: for the answer .* to .*train.jsonl:\d+ {FAULTS[body]}"):
        execute(policy(place, body, reward_seconds=0.3), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text("utf-8"))["state"] == "failed"
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["best", "step-000004"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()) == 4
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("return True", 1.0),
        ("return 2", 2.0),
        ("import numpy; return numpy.float32(0.5)", 0.5),
        ("return 10**400", None),
    ],
)
def test_what_counts_as_a_number(tmp_path, body, value):
    (tmp_path / "mine.py").write_text(f"def reward(prompt, answer, row):\n    {body}\n")
    turns = (Message("user", "a"), Message("assistant", "b"))
    said = [Said([1, 2], 1, "b", Dialogue(turns, "0", "row 0"))]
    rewards = Rewards([RewardSource(file=str(tmp_path / "mine.py"))], 1)
    if value is None:
        with pytest.raises(GuardError, match="no finite number"):
            rewards.of(None, said)  # type: ignore[arg-type]
    else:
        assert rewards.of(None, said)[0] == [value]  # type: ignore[arg-type]


def test_a_file_that_ends_the_process_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit\n")
    with pytest.raises(UsageError, match="it cannot be run: SystemExit"):
        Rewards([RewardSource(file=str(tmp_path / "mine.py"))], 1).check()


# Reward models --------------------------------------------------------------------------------------


def test_a_reward_model_is_measured_before_it_rewards(place, tmp_path):
    """No better than a coin: one that learned from pairs of which every other had its sides exchanged. Healthy: the
    same pairs as they are. Both by their own reports."""
    rows = [json.loads(line) for line in (place / "pairs-train.jsonl").read_text("utf-8").splitlines()]
    for number, row in enumerate(rows):
        if number % 2:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    mixed = tiny_chat.write_rows(tmp_path / "mixed.jsonl", rows)
    steps = {"training": training(60) | {"eval_steps": 60, "per_device_train_batch_size": 8}}
    data = {name: str(place / f"pairs-{name}.jsonl") for name in ("train", "validation", "test")} | {"max_length": 96}
    for name, train in {"good": data["train"], "bad": str(mixed)}.items():
        given = tiny_pairs.recipe(place, "reward", method=LORA, data=data | {"train": train}, **steps)
        execute(given, tmp_path / name)
    good, bad = (json.loads((tmp_path / name / "report.json").read_text("utf-8")) for name in ("good", "bad"))
    assert good["quality_low"] > 0.5 >= bad["quality_low"]
    assert set(Rewards([RewardSource(run=str(tmp_path / "good"))], 1).check()) == {f"reward {tmp_path / 'good'}"}
    with pytest.raises(UsageError, match="no better than a coin"):
        Rewards([RewardSource(run=str(tmp_path / "bad"))], 1).check()


def test_a_reward_model_without_numbers_names_the_sample(monkeypatch):
    rewards = Rewards([RewardSource(run="runs/reward")], 1)
    monkeypatch.setattr("graft.alignment.rewards.adapter_folder", lambda _: Path("."))
    monkeypatch.setattr("graft.alignment.rewards._report", lambda _: {})
    monkeypatch.setattr("graft.alignment.rewards.scores", lambda *_: torch.tensor([[0.5], [math.nan]]))
    turns = (Message("user", "a"), Message("assistant", "b"))
    said = [Said([1, 2], 1, "b", Dialogue(turns, str(row), f"row {row}")) for row in range(2)]
    base: Any = type("Base", (), {"adapters": {"reward_0": None}, "device": torch.device("cpu")})()
    base.config = type("Config", (), {"pad_token_id": 0})
    with pytest.raises(GuardError, match="reward runs/reward: nan for row 1"):
        rewards.of(base, said)


def test_answers_that_become_the_same_tokens_are_refused(place, tmp_path):
    """Two answers that differ in what the template strips; `test_alignment.py` has those that are equal as text."""
    rows = [json.loads(line) for line in (place / "pairs-train.jsonl").read_text("utf-8").splitlines()]
    rows[3]["rejected"] = rows[3]["chosen"] + " "
    path = tiny_chat.write_rows(tmp_path / "same.jsonl", rows)
    (tmp_path / "trims.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    given = {"name": "dpo", "chat_template": str(tmp_path / "trims.jinja")}
    with pytest.raises(DataError, match=r"same\.jsonl:4: chosen and rejected are the same tokens"):
        execute(pairs(place, given, train=str(path)), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
