"""The speed benchmark: ratios of made-up figures, the page of the stored ones, and two sides on a tiny model."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_chat

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are no part of the package

from benchmarks.speed import drive, figures, work  # noqa: E402
from benchmarks.speed.page import page  # noqa: E402


def made_up_round(seconds: float, loss: float, **more: Any) -> dict[str, Any]:
    return {
        "rows": 10, "steps": 5, "useful_tokens": 1000, "padded_tokens": 1250, "head_positions": 100, "seconds": seconds,
        "step_ms": 200.0, "peak_bytes": 2**30, "held_loss": loss, "format": "bf16",
    } | more  # fmt: skip


def made_up_group(**sides: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "settings": {"model": "tiny", "method": {"name": "lora", "r": 8}, "batch": 2, "learning_rate": 1e-3,
                     "kind": "chat", "held": 4},
        "data": {"rows": 10, "tokens": 1000, "lengths": [50, 60, 100, 140, 150], "answers": [2, 3, 4, 5, 6]},
        "parameters": {"all": 1000, "body": 800, "head": 200},
        "sides": {name: {"about": f"about {name}", "variant": name, "trials": {}, "few": False, "rounds": rounds}
                  for name, rounds in sides.items()},
    }  # fmt: skip


MACHINE = {"threads": 2, "device": "cpu", "fp32": 1e6, "bf16": 2e6, "bytes": 1e9}


def made_up_section(group: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "python -m benchmarks.speed instruct", "created": "2026-01-01", "rounds": 3, "seconds": 120,
        "machine": MACHINE, "graft": [], "variables": {}, "changed": True, "versions": {"torch": "2", "trl": None},
        "environment": {"commit": "0123456789", "cpu": "a CPU", "device": "cpu", "threads": 2, "python": "3.11"},
        "groups": {"instruct": group},
    }  # fmt: skip


def test_a_ratio_is_graft_s_speed_by_the_other_side_s_and_medians_are_taken() -> None:
    ours = [made_up_round(seconds, 2.0) for seconds in (2.0, 1.0, 9.0)]
    theirs = [made_up_round(seconds, 2.1, format="fp32 weights") for seconds in (4.0, 5.0, 6.0)]
    group = made_up_group(graft=ours, trainer=theirs)
    graft, trainer = figures.lines(group, MACHINE)
    assert (graft.speed, graft.ratio) == (500, None)
    assert (trainer.speed, trainer.ratio) == (200, 2.5)
    assert graft.padding == pytest.approx(0.2)
    # 4 · 1000 · 1000 tokens in 2 s at 2e6 operations a second; the body by 1250 positions and the head by 100 of them
    assert graft.nominal == pytest.approx(1.0)
    assert graft.executed == pytest.approx(4 * (800 * 1250 + 200 * 100) / 2.0 / 2e6)
    assert trainer.nominal == pytest.approx(4 * 1000 * 1000 / 5.0 / 1e6)
    text = page({"sections": {"instruct": made_up_section(group)}})
    assert "| trainer | 200 | 2.50 × as fast | 20% |" in text
    assert "| graft | 500 |  | 20% |" in text


def test_the_verdict_on_the_loss_takes_the_spread_between_seeds() -> None:
    peers = [made_up_round(1.0, loss) for loss in (2.00, 2.05)]
    within = made_up_group(graft=[made_up_round(1.0, loss) for loss in (2.04, 2.06)], trainer=peers)
    assert "up to 0.050" in figures.loss_verdict(within)
    assert "within" in figures.loss_verdict(within)
    outside = made_up_group(graft=[made_up_round(1.0, loss) for loss in (2.2, 2.22)], trainer=peers)
    assert "0.185 above *trainer*" in figures.loss_verdict(outside)
    once = made_up_group(graft=[made_up_round(1.0, 2.0)], trainer=[made_up_round(1.0, 2.0)])
    assert figures.loss_verdict(once) == ""


def test_a_failed_side_is_a_line_with_its_error() -> None:
    group = made_up_group(graft=[made_up_round(1.0, 2.0)], trl=[{"error": "No module named 'trl'"}])
    _, failed = figures.lines(group, MACHINE)
    assert failed.error == "No module named 'trl'"
    text = page({"sections": {"instruct": made_up_section(group)}})
    assert "| trl | failed: No module named 'trl' |" in text


def test_what_compiling_took_is_told_with_the_speed_that_it_leaves() -> None:
    compiled = [made_up_round(2.0, 2.0, compile_seconds=8.0)]
    text = page({"sections": {"instruct": made_up_section(made_up_group(**{"graft compiled": compiled}))}})
    assert "| graft compiled | 500 |" in text
    assert "The 8 s of compiling, more the first time, are left out; with them 100 tokens/s" in text


def test_the_page_is_that_of_the_stored_figures() -> None:
    stored, written = ROOT / "docs" / "results" / "benchmarks.json", ROOT / "docs" / "benchmarks.md"
    if not (stored.exists() and written.exists()):
        pytest.skip("nothing is measured yet")
    assert written.read_text("utf-8") == page(json.loads(stored.read_text("utf-8")))


def test_graft_and_trainer_train_the_same_rows(tmp_path: Path) -> None:
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    tiny_chat.write_model(tmp_path / "model")
    one = work.Work("chat", str(tmp_path / "model"), 4, 1e-3, 128)
    rows = {"train": tiny_chat.rows(8, 1), "validation": tiny_chat.rows(2, 2), "test": tiny_chat.rows(6, 3)}
    told = work.write(one, tmp_path / "work", rows, held=5)
    assert (told["rows"], len(work.read_ids(tmp_path / "work", "test"))) == (8, 5)
    found = {}
    for side, more in (("graft", ["--graft", "training.precision=fp32"]), ("trainer:fp32:plain:length", [])):
        command = ["-m", "benchmarks.speed.side", str(tmp_path / "work"), "--side", side, "--seed", "1", *more]
        found[side] = drive.json_of(command, 1)
        assert "error" not in found[side], found[side]["error"]
    ours, theirs = found.values()
    assert ours["recipe"] == ["training.precision=fp32"]
    for key in ("rows", "steps", "useful_tokens", "padded_tokens", "supervised", "trainable"):
        assert ours[key] == theirs[key], key
    assert ours["steps"] == 2
    assert ours["useful_tokens"] == told["tokens"]
    assert ours["head_positions"] == ours["supervised"] < theirs["head_positions"] == theirs["padded_tokens"]
    # Two steps of 1e-3 move little; the untouched model is the same, so the losses agree closely.
    assert ours["held_loss"] == pytest.approx(theirs["held_loss"], abs=0.05)
    assert min(ours["seconds"], theirs["seconds"], ours["peak_bytes"], theirs["peak_bytes"]) > 0


def test_a_side_that_fails_gives_its_last_words() -> None:
    assert drive.json_of(["-c", "print('{}'); raise SystemExit('no luck')"], 1) == {"error": "no luck"}
    assert drive.json_of(["-c", "print('some line'); print('{\"rows\": 3}')"], 1) == {"rows": 3}
