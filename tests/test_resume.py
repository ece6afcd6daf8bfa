"""A run that was ended goes on, and ends as if it had not been: every method, every place to stop, kill -9."""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_chat
import tiny_pairs
import torch

from graft.errors import DamagedError, DataError, RecipeError
from graft.families import FAMILIES
from graft.methods.base import methods
from graft.run import execute
from graft.train import checkpoint, resume
from graft.train.loop import Trainer

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 32, "precision": "fp32", "preflight": False}
"""Eight steps, evaluated at 2, 4, 6 and 8."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tiny.write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture
def often(monkeypatch):
    """A checkpoint behind every step."""
    monkeypatch.setattr(resume.Keeper, "due", lambda keeper: keeper.folder is not None)


def recipe(place: Path, method: Any = "lora", **more: Any) -> Any:
    training = TRAINING | more.pop("training", {})
    return tiny.recipe(place, method=method, training=training, **more)


def digests(folder: Path) -> dict[str, str]:
    """Of the adapter's files and of which test rows were right."""
    files = [*(folder / "adapter").glob("*.safetensors"), folder / "correct.json"]
    assert len(files) >= 2
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def stop_at(step: int) -> Any:
    """What a run calls as it goes on; ends it behind a step, as an interrupt does."""

    def watch(phase: str, fraction: float) -> None:
        if phase.startswith(f"training, step {step} of"):
            raise KeyboardInterrupt

    return watch


def interrupt(given: Any, folder: Path, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(given, folder, stop_at(step))


def curve(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in point.items() if not key.endswith("seconds")} for point in points]


# Every method --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("method", sorted(methods()))
def test_a_stopped_run_ends_as_if_it_had_not_been(place, tmp_path, method):
    """Stopped twice: behind the first steps, when some methods have not begun to prune, and late."""
    settings = {key: value for key, value in methods()[method].small.items() if key != "exclusive"}
    given = recipe(place, {"name": method} | settings)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    report = execute(given, whole)
    for step in (3, 7):
        interrupt(given, parts, step)
        # stopped where it tells of a step, before it keeps the checkpoint behind it
        assert checkpoint.steps(parts / "checkpoints")[0] == step - 1
    again = execute(given, parts)
    assert digests(parts) == digests(whole)
    assert curve(parts) == curve(whole)
    assert len(curve(parts)) == 8
    assert again["best_step"] == report["best_step"]
    assert again["curve"] == report["curve"]
    assert checkpoint.steps(parts / "checkpoints") == []
    assert "going on behind step 6" in (parts / "log.txt").read_text()


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize(
    "more",
    [
        {"training": {"optimizer": "adamw_8bit"}},
        {
            "training": {
                "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 16,
                "lr_scheduler_type": "cosine",
            }
        },
        {"training": {"gradient_checkpointing": True}},
        {"training": {"load_best_model_at_end": False}},
        {"training": {"num_train_epochs": 3, "max_steps": 14, "eval_steps": 5}},
        {"training": {"precision": "bf16"}},
        {"quantization": "nf4"},
        {"method": {"name": "lora", "lora_dropout": 0.3}},
    ],
)
def test_every_setting_that_a_step_depends_on(place, tmp_path, more):
    given = recipe(place, **more)
    execute(given, tmp_path / "whole")
    interrupt(given, tmp_path / "parts", 5)
    execute(given, tmp_path / "parts")
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_another_seed_is_another_adapter(place, tmp_path):
    execute(recipe(place), tmp_path / "a")
    execute(recipe(place), tmp_path / "b")
    execute(recipe(place, seed=2), tmp_path / "c")
    found = [digests(tmp_path / name)["adapter_model.safetensors"] for name in "abc"]
    assert found[0] == found[1] != found[2]


# What has changed in between -----------------------------------------------------------------------


@pytest.mark.usefixtures("often")
def test_changed_data_base_and_settings_are_named(place, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(place, copy)
    given, folder = recipe(copy), tmp_path / "run"
    interrupt(given, folder, 5)
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    with pytest.raises(RecipeError, match=r"holds another run \(method\.r: 8, now 4\)"):
        execute(recipe(copy, {"name": "lora", "r": 4}), folder)
    rows = (copy / "train.jsonl").read_text()
    (copy / "train.jsonl").write_text(rows.replace("good", "fine", 1))
    with pytest.raises(DataError, match=r"train\.jsonl has changed since"):
        execute(given, folder)
    (copy / "train.jsonl").write_text(rows)
    weights = next((copy / "model").glob("*.safetensors"))
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4096] + bytes(4096))
    with pytest.raises(RecipeError, match=r"the weights of .* have changed since .* was begun"):
        execute(given, folder)
    weights.write_bytes(kept)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    execute(given, folder)
    execute(given, tmp_path / "whole")
    assert digests(folder) == digests(tmp_path / "whole")


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("how", ["cut", "altered", "no manifest", "no training", "all"])
def test_a_damaged_checkpoint_is_passed_over(place, tmp_path, how):
    given, folder = recipe(place), tmp_path / "run"
    interrupt(given, folder, 6)
    newest, older = (checkpoint.at(folder / "checkpoints", step) for step in checkpoint.steps(folder / "checkpoints"))
    for path in (newest, older) if how == "all" else (newest,):
        if how in ("cut", "all"):
            os.truncate(path / "training.safetensors", 100)
        elif how == "altered":
            content = bytearray((path / "adapter.safetensors").read_bytes())
            content[-1] ^= 1
            (path / "adapter.safetensors").write_bytes(content)
        else:
            (path / {"no manifest": "manifest.json", "no training": "training.safetensors"}[how]).unlink()
    execute(given, folder)
    log = (folder / "log.txt").read_text()
    if how == "all":
        assert "going on" not in log
    else:
        assert f"passed over: {newest}" in log
        assert "going on behind step 4" in log
    execute(given, tmp_path / "whole")
    assert digests(folder) == digests(tmp_path / "whole")
    assert curve(folder) == curve(tmp_path / "whole")


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("last", ['{"step": 7, "exa', "\x00" * 4096], ids=["half", "nul"])
def test_a_log_that_a_power_cut_left_odd_is_mended(place, tmp_path, last):
    given = recipe(place)
    execute(given, tmp_path / "whole")
    interrupt(given, tmp_path / "parts", 5)
    with (tmp_path / "parts" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(last)
    execute(given, tmp_path / "parts")
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


@pytest.mark.usefixtures("often")
def test_a_clock_that_jumps_back_changes_nothing(place, tmp_path, monkeypatch):
    given = recipe(place)
    execute(given, tmp_path / "whole")
    interrupt(given, tmp_path / "parts", 5)
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now - 10**8)
        patch.setenv("TZ", "Pacific/Kiritimati")
        execute(given, tmp_path / "parts")
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_another_optimizers_memory_is_refused(place, tmp_path):
    tensors = {"random.cpu": torch.get_rng_state(), "optimizer.5.exp_avg": torch.zeros(2)}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(DamagedError, match="optimizer has 1 tensors, the run's 1"):
        resume.restore(optimizer, tensors, {})


# Interrupts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_within_a_step_keeps_what_the_step_did(place, tmp_path, monkeypatch, number):
    given, folder = recipe(place), tmp_path / "run"
    step = Trainer._step
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def interrupted(trainer: Trainer, *arguments: Any) -> Any:
        found = step(trainer, *arguments)
        if found.step == 5:
            os.kill(os.getpid(), number)
        return found

    def stop(given: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        for one in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(one, stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                execute(given, folder)
        finally:
            for one, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), handlers, strict=True):
                signal.signal(one, handler)
    assert checkpoint.steps(folder / "checkpoints")[0] == 5
    assert len(curve(folder)) == 5
    execute(given, folder)
    execute(given, tmp_path / "whole")
    assert digests(folder) == digests(tmp_path / "whole")


def test_a_second_interrupt_does_not_wait():
    heard = []

    def step() -> None:
        with resume.whole_steps() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            heard.append(asked())
            os.kill(os.getpid(), signal.SIGINT)
            heard.append("went on")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert heard == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with resume.whole_steps() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
    finally:
        signal.signal(signal.SIGHUP, before)


# kill -9 -------------------------------------------------------------------------------------------

KILLS = 4
"""The long part (`make test-faults`) has more, of all methods."""


def test_killed_at_random_moments(place, tmp_path):
    """One method that classifies and three other pairs of a method and an objective."""
    seed = int(os.environ.get("GRAFT_SEED") or 7)
    given = [("lora", recipe(place)), *pairs(tiny_pairs.write_all(tmp_path / "data"), seed)[:3]]
    assert killed(given, tmp_path, KILLS, seed, each=1) >= KILLS


@pytest.mark.faults
def test_every_method_killed_at_random_moments(place, tmp_path):
    seed = int(os.environ.get("GRAFT_SEED") or random.SystemRandom().randrange(10**6))
    given = [(name, recipe(place, {"name": name} | small(name))) for name in sorted(methods())]
    count = killed(given, tmp_path, max(50, 3 * len(methods())), seed)
    print(f"{count} kills, GRAFT_SEED={seed}")


OBJECTIVES: dict[str, dict[str, Any]] = {
    "instruct": {"name": "instruct", "max_new_tokens": 4},
    "pretrain": {"name": "pretrain"},
    "dpo": {"name": "dpo"},
    "reward": {"name": "reward"},
    "grpo": {"name": "grpo", "rewards": ["length:3-6"], "num_generations": 3, "max_new_tokens": 4},
    "ppo": {"name": "ppo", "rewards": ["length:3-6"], "num_ppo_epochs": 2, "max_new_tokens": 4},
}
"""Beside classify, which the test above kills with every method."""


@pytest.mark.faults
def test_pairs_of_method_and_objective_killed_at_random_moments(tmp_path):
    """All of them, or as many as GRAFT_PAIRS says, drawn at random."""
    seed = int(os.environ.get("GRAFT_SEED") or random.SystemRandom().randrange(10**6))
    given = pairs(tiny_pairs.write_all(tmp_path / "data"), seed)[: int(os.environ.get("GRAFT_PAIRS") or 10**6)]
    count = killed(given, tmp_path, 50, seed, each=1)
    print(f"{count} kills of {len(given)} pairs of method and objective, GRAFT_SEED={seed}")


def pairs(place: Path, seed: int) -> list[tuple[str, Any]]:
    """Every method that trains beside the base on a decoder, with every objective; in an order of the seed."""
    family = FAMILIES["llama"]
    known = [name for name, kind in sorted(methods().items()) if kind.refuses(family) is None]
    training = TRAINING | {"max_steps": 6, "num_train_epochs": 9, "per_device_train_batch_size": 4, "eval_steps": 3}
    found = []
    for method, (name, objective) in itertools.product(known, OBJECTIVES.items()):
        make: Any = tiny_pairs.recipe if name in ("dpo", "reward") else _chat
        settings = make(place, objective).resolved()
        settings["data"] |= {"max_train_samples": 12, "max_eval_samples": 4}
        chosen = {"name": method, "learning_rate": 1e-3} | methods()[method].small
        found.append((f"{method} {name}", tiny.Recipe.parse(settings | {"method": chosen, "training": training})))
    assert {type(given.objective).name for _, given in found} == set(OBJECTIVES)
    random.Random(seed).shuffle(found)
    return found


def _chat(place: Path, objective: dict[str, Any]) -> Any:
    return tiny_chat.recipe(place, objective=objective)


def small(name: str) -> dict[str, Any]:
    """The small settings of a method; those that can train the base in place do."""
    return {key: value for key, value in methods()[name].small.items() if key != "exclusive"}


SERVER = """
import json, os, sys
from pathlib import Path
import tiny, torch
from graft.run import execute
from graft.train import resume
resume.Keeper.due = lambda keeper: keeper.folder is not None
torch.set_num_threads(1)
import graft.methods.base, torch._dynamo, transformers.models.bert.modeling_bert
for line in sys.stdin:
    settings, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            execute(tiny.Recipe.parse(settings), Path(folder))
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
"""Runs as processes that have the libraries loaded: a start takes milliseconds instead of seconds."""


def killed(runs: list[tuple[str, Any]], tmp_path: Path, count: int, seed: int, each: int = 3) -> int:
    """Kill named runs at random moments of their whole time, all of them and until so many kills; how many there were.

    A run is killed `each` times at most, and compared with one that was not.
    """
    draw = random.Random(seed)
    kills = 0
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    ) as server:  # fmt: skip
        assert server.stdin is not None
        assert server.stdout is not None

        def run(given: Any, folder: Path, seconds: float | None) -> int:
            print(json.dumps([given.resolved(), str(folder)]), file=server.stdin, flush=True)
            child = int(server.stdout.readline())
            if seconds is not None:
                time.sleep(seconds)
                with suppress(ProcessLookupError):  # it was faster
                    os.kill(child, signal.SIGKILL)
            return int(server.stdout.readline())

        assert run(runs[0][1], tmp_path / "first", None) == 0  # what is loaded late is loaded for all
        number = 0
        while kills < count or number < len(runs):
            name, given = runs[number % len(runs)]
            number += 1
            whole, parts = tmp_path / f"whole{number}", tmp_path / f"parts{number}"
            began = time.monotonic()
            assert run(given, whole, None) == 0
            took = time.monotonic() - began
            for _ in range(each):
                if run(given, parts, draw.uniform(0, took)) == 0:
                    break  # it was faster
                kills += 1
            assert run(given, parts, None) == 0, f"{name}, seed {seed}"
            assert digests(parts) == digests(whole), f"{name}, seed {seed}"
            assert curve(parts) == curve(whole), f"{name}, seed {seed}"
            assert not [path for path in parts.rglob(".*") if path.name != ".lock"], f"{name}, seed {seed}"
            shutil.rmtree(whole)
            shutil.rmtree(parts)
        server.stdin.close()
    return kills
