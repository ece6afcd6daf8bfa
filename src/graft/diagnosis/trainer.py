"""Logs of transformers' Trainer as a curve: trainer_state.json, a folder of checkpoints, or lines of logged values."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.diagnosis.curve import Curve, Evaluation, Facts, Step
from graft.diagnosis.runs import count, number, numbers, read_lines, read_object
from graft.errors import DamagedError, DataError

STATE = "trainer_state.json"
_QUALITIES = ("accuracy", "f1", "exact_match", "mean_token_accuracy", "rouge1", "rougeL")
"""Names of a quality between 0 and 1, in the order in which one is taken."""


def find_logs(path: Path) -> Path | None:
    """The log in a folder: its trainer_state.json, else that of its latest checkpoint, else its only .jsonl file of
    logged values. A file is its own log. None where there is none.
    """
    if path.is_file():
        return path
    if (path / STATE).is_file():
        return path / STATE
    kept = sorted(path.glob(f"checkpoint-*/{STATE}"), key=lambda found: _number_of(found.parent.name))
    if kept:
        return kept[-1]
    lines = [found for found in sorted(path.glob("*.jsonl")) if _looks_logged(found)]
    return lines[0] if len(lines) == 1 else None


def read_logs(path: Path) -> Curve:
    """The curve of a log of transformers' Trainer. Raises `DataError` when nothing in it was logged by one."""
    unreadable = 0
    state: dict[str, Any] = {}
    if path.suffix == ".jsonl":
        history, unreadable = read_lines(path)
    else:
        state = _state(path)
        given = state.get("log_history")
        history = [entry for entry in given if isinstance(entry, dict)] if isinstance(given, list) else []
    steps = [_step(entry) for entry in history if "loss" in entry and number(entry.get("loss")) is not None]
    evaluations = [_evaluation(entry) for entry in history if number(entry.get("eval_loss")) is not None]
    if not steps and not evaluations:
        raise DataError(
            f"{path}: nothing was logged in it as transformers' Trainer does (loss, eval_loss, step)",
            "give a trainer_state.json, a folder of checkpoints, or a .jsonl of logged values",
        )
    facts = _facts(path.parent, state, history, steps)
    return Curve(str(path), _timed(steps, history), tuple(evaluations), facts, unreadable)


def _state(path: Path) -> dict[str, Any]:
    """A trainer_state.json, or the list of its `log_history` alone."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read ({str(error)[:80]})", "give an earlier checkpoint's") from None
    if isinstance(value, list):
        return {"log_history": value}
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no log of transformers' Trainer", f"give a {STATE}")
    return value


def _looks_logged(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            first = json.loads(file.readline(100_000))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "step" in first and bool({"loss", "eval_loss"} & first.keys())


def _number_of(name: str) -> int:
    found = re.search(r"(\d+)$", name)
    return int(found[1]) if found else 0


def _step(entry: Mapping[str, Any]) -> Step:
    loss = number(entry.get("loss"))
    return Step(
        count(entry.get("step")) or 0, float("nan") if loss is None else loss, number(entry.get("learning_rate")),
        number(entry.get("grad_norm")),
    )  # fmt: skip


def _evaluation(entry: Mapping[str, Any]) -> Evaluation:
    named = {key.removeprefix("eval_"): value for key, value in numbers(entry).items() if key.startswith("eval_")}
    quality = next((named[name] for name in _QUALITIES if 0 <= named.get(name, -1) <= 1), None)
    return Evaluation(
        count(entry.get("step")) or 0, named.get("loss"), quality, seconds=number(entry.get("eval_runtime"))
    )


def _timed(steps: Sequence[Step], history: Sequence[Mapping[str, Any]]) -> tuple[Step, ...]:
    """Steps with the seconds of the whole training at the last one, where the log ends with them."""
    took = next((found for entry in history if (found := number(entry.get("train_runtime"))) is not None), None)
    if took is None or not steps:
        return tuple(steps)
    evaluating = sum(number(entry.get("eval_runtime")) or 0.0 for entry in history)
    last = steps[-1]
    timed = Step(last.number, last.loss, last.rate, last.norm, last.rows, max(0.0, took - evaluating))
    return (*steps[:-1], timed)


def _facts(
    folder: Path, state: Mapping[str, Any], history: Sequence[Mapping[str, Any]], steps: Sequence[Step]
) -> Facts:
    rates = [step.rate for step in steps if step.rate is not None]
    total = count(state.get("max_steps"))
    peak = max(rates, default=None)
    rising = [step.number for step in steps if peak and step.rate is not None and step.rate < 0.99 * peak]
    first = next((step.number for step in steps if peak and step.rate is not None and step.rate >= 0.99 * peak), 0)
    ends = any("train_runtime" in entry for entry in history)
    return Facts(
        kind="transformers",
        method=_method(folder),
        best_by="loss",
        peak_rate=peak,
        total=total if total and total > 0 else None,
        warmup=first / total if total and rising and rising[0] < first else 0.0,
        epochs=number(state.get("num_train_epochs")),
        keeps_best=bool(state.get("best_model_checkpoint")),
        state="done" if ends or bool(total and steps and steps[-1].number >= total) else None,
    )


def _method(folder: Path) -> str | None:
    """The method that peft's adapter_config.json beside the log names; None for anything unknown."""
    from graft.methods.base import methods

    try:
        config = read_object(folder / "adapter_config.json")
    except DamagedError:
        return None
    if not config:
        return None
    names = [name for name, kind in methods().items() if kind.reads(config)]
    return names[0] if len(names) == 1 else None
