"""`graft doctor`: run folders in every state, comparisons, logs of transformers' Trainer, and this machine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import curves
import pytest
import tiny
import yaml
from test_cli import graft  # noqa: F401

from graft import assets, checkup
from graft.checkup import Check, check_installation, numbers_of
from graft.diagnosis.diagnose import diagnose
from graft.diagnosis.runs import read_run
from graft.diagnosis.trainer import find_logs, read_logs
from graft.errors import DamagedError, DataError
from graft.run import execute


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tiny.write_all(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(place) -> Path:
    execute(tiny.recipe(place), place / "runs" / "lora")
    return place / "runs" / "lora"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A finished run's folder, to be changed."""
    subprocess.run(["cp", "-r", str(finished), str(tmp_path / "run")], check=True)
    return tmp_path / "run"


def diverge(run: Path) -> None:
    """Losses that rise and stay."""
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    more = [points[-1] | {"step": 31 + index, "train_loss": 5.0 + index / 100} for index in range(30)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points + more))


def test_a_healthy_run(graft, finished):  # noqa: F811
    done = graft("doctor", finished)
    assert done.code == 0
    assert "lora, classify, done, 30 steps, 4 evaluations" in " ".join(done.out.split())
    assert "nothing stands out" in done.out
    told = json.loads(graft("doctor", finished, "--json").out)
    assert told["findings"] == []
    assert (told["state"], told["steps"]) == ("done", 30)


def test_a_run_that_diverged(graft, run, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "80")
    diverge(run)
    done = graft("doctor", run)
    assert done.code == 4
    lines = [line.rstrip() for line in done.out.splitlines()]
    assert "serious: diverged (certain)" in lines
    assert "    - method.learning_rate: 0.02" in lines
    assert "    + method.learning_rate: 0.0067" in lines
    command = next(line for line in lines if line.startswith("graft train "))
    assert command == f"graft train {run}/recipe.yaml method.learning_rate=0.0067 -o {run}-again"
    assert all(len(line) <= 80 for line in lines if line != command)
    told = json.loads(graft("doctor", run, "--json").out)
    assert [(one["name"], one["level"]) for one in told["findings"]] == [("diverged", "serious")]
    assert told["findings"][0]["changes"] == {"method.learning_rate": 0.0067}
    assert graft(*command.split()[1:], "--dry-run").code == 0


def test_unfinished_and_damaged_runs(graft, run):  # noqa: F811
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "train_lo')
    (run / "status.json").write_text('{"state": "failed", "cause": "the disk is full"}')
    done = graft("doctor", run)
    assert done.code == 4
    assert "the disk is full" in done.out
    assert "1 lines of" in done.out
    (run / "status.json").write_text(json.dumps({"state": "running", "pid": os.getpid(), "phase": "step 30 of 60"}))
    assert read_run(run).facts.state == "running"
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (run / "status.json").write_text(json.dumps({"state": "running", "pid": process.pid}))
    assert read_run(run).facts.state == "running"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "killed" in {finding.name for finding in diagnose(read_run(run))}
    (run / "report.json").write_text('{"quality": ')
    done = graft("doctor", run)
    assert done.code == 5
    assert done.err.count("\n") == 1
    assert "report.json cannot be read" in done.err


def test_a_run_that_has_hardly_begun(graft, run):  # noqa: F811
    for name in ("metrics.jsonl", "report.json", "env.json", "log.txt", "correct.json"):
        (run / name).unlink()
    (run / "status.json").write_text(json.dumps({"state": "running", "pid": os.getpid(), "fraction": 0.0}))
    done = graft("doctor", run)
    assert done.code == 0
    assert "0 steps" in done.out


@pytest.mark.parametrize("content", ["", "[]", "null", "7", '{"step": "a"}', "\x00\xff", '{"step":' * 5000])
def test_metrics_that_are_none(run, content):
    (run / "metrics.jsonl").write_text(content, encoding="utf-8")
    diagnose(read_run(run))


ODD = ["x", 1e400, {"name": [], "quality": "x", "figures": [1]}]
MORE = [[], {}, 7, True, None, [1]]


@pytest.mark.parametrize("odd", [*ODD, *(pytest.param(odd, marks=pytest.mark.slow) for odd in MORE)], ids=repr)
def test_values_of_another_kind(finished, run, odd):
    read = 0
    for name in ("status.json", "env.json", "report.json", "correct.json", "adapter/graft.json"):
        whole = json.loads((finished / name).read_text())
        for key in whole:
            (run / name).write_text(json.dumps(whole | {key: odd}))
            diagnose(read_run(run, whole | {key: odd}))
            read += 1
        (run / name).write_text(json.dumps(whole))
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    for key in recipe:
        (run / "recipe.yaml").write_text(json.dumps(recipe | {key: odd}))
        diagnose(read_run(run))
        if isinstance(recipe[key], dict):
            for inner in recipe[key]:
                (run / "recipe.yaml").write_text(json.dumps(recipe | {key: recipe[key] | {inner: odd}}))
                diagnose(read_run(run))
                read += 1
    point = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    for key in point:
        (run / "metrics.jsonl").write_text(json.dumps(point | {key: odd}) + "\n")
        diagnose(read_run(run))
        read += 1
    for key in (
        "loss",
        "eval_loss",
        "step",
        "learning_rate",
        "grad_norm",
        "eval_accuracy",
        "eval_runtime",
        "max_steps",
    ):
        entry = {"loss": 1.0, "eval_loss": 1.0, "step": 3, key: odd}
        (run / "state.json").write_text(json.dumps({"max_steps": 3, key: odd, "log_history": [entry, odd]}))
        with contextlib.suppress(DataError):
            diagnose(read_logs(run / "state.json"))
        read += 1
    assert read > 80


@pytest.mark.parametrize("name", ["status.json", "env.json", "report.json"])
@pytest.mark.parametrize("content", ["", "[]", "{", "\x00", '{"pid": 1e400}', '{"pid": "x", "data": [], "model": 3}'])
def test_json_that_is_none(run, name, content):
    (run / name).write_text(content)
    if content.startswith('{"'):
        diagnose(read_run(run))
        return
    with pytest.raises(DamagedError, match=name):
        read_run(run)


def test_what_is_no_run(graft, tmp_path):  # noqa: F811
    for path, said in ((tmp_path / "none", "no such run"), (tmp_path, "neither a run of Graft nor a log of")):
        done = graft("doctor", path)
        assert done.code == 2
        assert said in done.err
        assert done.err.count("\n") == 1
    for name, content, code in (
        ("trainer_state.json", "{", 5), ("trainer_state.json", "7", 2), ("trainer_state.json", '{"log_history": 1}', 2),
        ("x.jsonl", "", 2), ("x.txt", "words", 5), ("trainer_state.json", "[" * 100_000, 5)
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
        done = graft("doctor", tmp_path / name)
        assert done.code == code, (name, content[:20], done)
        assert done.err.count("\n") == 1


def test_a_comparison(graft, finished, tmp_path):  # noqa: F811
    trials = tmp_path / "cmp" / "trials"
    trials.mkdir(parents=True)
    (tmp_path / "cmp" / "recipe.yaml").write_text("model: x\n")
    assert graft("doctor", tmp_path / "cmp").code == 2
    for seed, quality in ((1, 0.9), (2, 0.4)):
        subprocess.run(["cp", "-r", str(finished), str(trials / f"lora-seed{seed}")], check=True)
        report = json.loads((trials / f"lora-seed{seed}" / "report.json").read_text())
        (trials / f"lora-seed{seed}" / "report.json").write_text(json.dumps(report | {"quality": quality}))
        recipe = (trials / f"lora-seed{seed}" / "recipe.yaml").read_text()
        (trials / f"lora-seed{seed}" / "recipe.yaml").write_text(recipe.replace("\nseed: 1\n", f"\nseed: {seed}\n"))
    done = graft("doctor", tmp_path / "cmp")
    assert done.code == 0
    told = " ".join(done.out.split())
    assert "seeds differ" in told
    assert "lora: 40.0% with seed 2 and 90.0% with seed 1, on 60 test rows" in told
    assert "nothing stands out in 2 of 2 trials" in told
    diverge(trials / "lora-seed2")
    (trials / "lora-seed1" / "status.json").write_text("{")
    done = graft("doctor", tmp_path / "cmp", "--json")
    assert done.code == 4
    first, second = json.loads(done.out)["trials"]
    assert (first["state"], "status.json cannot be read" in first["fault"]) == ("damaged", True)
    assert [one["name"] for one in second["findings"]] == ["diverged"]


def logged(losses: list[float], every: int = 10, **more: Any) -> dict[str, Any]:
    """A trainer_state.json as transformers 5 writes it."""
    history: list[dict[str, Any]] = [
        {"epoch": 0.1, "grad_norm": 1.0, "learning_rate": 2e-5, "loss": loss, "step": every * (index + 1)}
        for index, loss in enumerate(losses)
    ]
    total = every * len(losses)
    return {"log_history": history, "max_steps": total, "num_train_epochs": 2, "global_step": total} | more


def test_logs_of_a_trainer(graft, tmp_path):  # noqa: F811
    path = tmp_path / "checkpoint-400" / "trainer_state.json"
    path.parent.mkdir()
    path.write_text(json.dumps(logged(curves.falling(40))))
    assert find_logs(tmp_path) == path
    assert graft("doctor", tmp_path).code == 0
    later = tmp_path / "checkpoint-1000" / "trainer_state.json"
    later.parent.mkdir()
    state = logged([*curves.falling(40), *[4.0] * 60])
    later.write_text(json.dumps(state))
    assert find_logs(tmp_path) == later
    done = graft("doctor", tmp_path, "--json")
    assert done.code == 4
    assert [one["name"] for one in json.loads(done.out)["findings"]] == ["diverged"]
    assert "+ learning_rate: 6.7e-06" in graft("doctor", tmp_path).out
    lines = tmp_path / "log.jsonl"
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in state["log_history"]) + '{"loss": 1')
    found = {finding.name for finding in diagnose(read_logs(lines))}
    assert found == {"diverged", "damaged log"}


def test_a_trainers_zeros_nans_and_overfitting(tmp_path):
    state = logged(curves.falling(20))
    zeros = [{"loss": 0.0, "grad_norm": float("nan"), "learning_rate": 1e-5, "step": 210 + 10 * i} for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(state | {"log_history": state["log_history"] + zeros}))
    assert [one.name for one in diagnose(read_logs(tmp_path / "a.json"))] == ["not finite"]
    for entry in zeros:
        entry["grad_norm"] = 0.0
    (tmp_path / "b.json").write_text(json.dumps(state | {"log_history": state["log_history"] + zeros}))
    assert "loss exactly 0" in {one.name for one in diagnose(read_logs(tmp_path / "b.json"))}
    seen = [
        {"eval_loss": loss, "eval_accuracy": 0.8, "eval_runtime": 9.0, "step": step}
        for step, loss in ((50, 0.4), (100, 0.6), (150, 0.8), (200, 1.0))
    ]
    history = [*logged(curves.falling(20, end=0.05))["log_history"], *seen, {"train_runtime": 40.0, "step": 200}]
    (tmp_path / "c.json").write_text(json.dumps(history))
    found = {one.name: one for one in diagnose(read_logs(tmp_path / "c.json"))}
    assert set(found) == {"overfit", "slow evaluation"}
    assert found["overfit"].changes == {"load_best_model_at_end": True}
    short = [one | {"eval_runtime": 4.9} if "eval_runtime" in one else one for one in history]
    short[-1]["train_runtime"] = 25.0  # 19.6 s of them, and 5 s of training
    (tmp_path / "d.json").write_text(json.dumps(short))
    assert {one.name for one in diagnose(read_logs(tmp_path / "d.json"))} == {"overfit"}


def test_a_real_trainers_log(place, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    model = AutoModelForSequenceClassification.from_pretrained(str(place / "model"))
    rows = [{"input_ids": torch.tensor([2, 5 + index % 8, 3]), "labels": index // 4 % 2} for index in range(64)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=30, logging_steps=1, eval_steps=10, eval_strategy="steps", save_strategy="steps",
        save_steps=30, learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:16]).train()
    log = find_logs(tmp_path)
    assert log is not None
    curve = read_logs(log)
    assert (len(curve.steps), len(curve.evaluations), curve.facts.total) == (30, 3, 30)
    assert curve.facts.peak_rate == pytest.approx(1e-3)
    assert all(step.norm is not None for step in curve.steps)
    assert not {finding.level for finding in diagnose(curve)} & {"serious", "warning"}


def test_a_trainers_method_is_read_from_peft(tmp_path):
    state = logged(curves.falling(30))
    for entry in state["log_history"]:
        entry["learning_rate"] = 0.5
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "use_dora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    curve = read_logs(tmp_path / "trainer_state.json")
    assert curve.facts.method == "lora"
    assert [finding.name for finding in diagnose(curve)] == ["learning rate"]


def test_an_empty_log_is_refused(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"epoch": 1}, 3]}')
    with pytest.raises(DataError, match="nothing was logged"):
        read_logs(tmp_path / "trainer_state.json")


def test_this_machine(graft, monkeypatch):  # noqa: F811
    done = graft("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.out)}
    assert done.code == 0
    assert {
        "python",
        "torch",
        "transformers",
        "accelerate",
        "device",
        "memory",
        "number format",
        "torch.compile",
    } <= set(checks)
    assert {"torch.compile", "cache", "starter assets", "C library", "gguf", "fastapi"} <= set(checks)
    assert all(check["state"] in ("ok", "warn") for check in checks.values())
    monkeypatch.setenv("COLUMNS", "80")
    lines = graft("doctor").out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert len(lines) >= len(checks)


def test_faults_of_an_installation(graft, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(checkup, "NEEDED", {"torch": (99, 1), "no-such-package": (1,)})
    monkeypatch.setattr(checkup, "EXTRAS", {"no_such_package": ("gguf", "models in GGUF files")})
    monkeypatch.setattr(checkup, "ROOM", 1 << 60)
    monkeypatch.setattr("graft.engine.compiled.unavailable", lambda: "there is no C++ compiler")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    found = {check.name: check for check in check_installation()}
    assert (found["torch"].state, "99.1 is needed" in found["torch"].found) == ("fail", True)
    assert found["no-such-package"] == Check(
        "no-such-package", "fail", "not installed", "pip install 'no-such-package>=1'"
    )
    assert found["no_such_package"].remedy == "pip install 'graft-tuning[gguf]'"
    assert [found[name].state for name in ("cache", "this folder", "torch.compile")] == ["warn"] * 3
    assert found["starter assets"].found == f"0 of {len(assets.ASSETS)} fetched"
    if sys.platform == "linux":
        assert "tcache_count" in found["C library"].remedy
    assert not (tmp_path / "cache").exists()
    done = graft("doctor")
    assert done.code == 4

    def broken(place: Path) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(checkup.shutil, "disk_usage", broken)
    assert {check.name: check.state for check in check_installation()}["disk"] == "fail"


def test_versions():
    assert numbers_of("2.13.0+cpu") == (2, 13, 0)
    assert numbers_of("5.0.dev1") == (5, 0)
    assert numbers_of("2.11") >= (2, 11)
