"""A run folder as a curve: finished, running, stopped or killed, with whatever it holds."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from graft.config import read_yaml
from graft.diagnosis.curve import Curve, Evaluation, Facts, Step
from graft.errors import DamagedError, GraftError


def read_run(path: Path, base: Mapping[str, Any] | None = None) -> Curve:
    """The curve and facts of a run folder; `base` is the untouched base's report, where there is one.

    Lines of the log that cannot be read are counted, not raised. Raises `DamagedError` for a recipe, report or status
    that cannot be read.
    """
    recipe = _recipe(path)
    points, unreadable = read_lines(path / "metrics.jsonl")
    steps = tuple(_step(point) for point in points)
    evaluations = tuple(_evaluation(point) for point in points if _is_evaluation(point))
    facts = _facts(path, recipe, points, _figures({} if base is None else base))
    return Curve(str(path), _rising(steps), evaluations, facts, unreadable)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file of lines, and how many lines are none: the last one may be half written."""
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return [], 0
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from None
    found, bad = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            bad += 1
    return found, bad


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty when there is none. Raises `DamagedError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read ({str(error)[:80]})", "remove it, or run it again") from None
    if not isinstance(value, dict):
        raise DamagedError(f"{path} holds no object", "remove it, or run it again")
    return value


def number(value: Any) -> float | None:
    """A number, also one that is not finite; None for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def count(value: Any) -> int | None:
    """A whole number; None for anything else."""
    found = number(value)
    return int(found) if found is not None and isfinite(found) else None


def numbers(values: Any) -> dict[str, float]:
    """The numbers of a mapping."""
    if not isinstance(values, Mapping):
        return {}
    return {str(key): found for key, value in values.items() if (found := number(value)) is not None}


def _recipe(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path / "recipe.yaml")
    except GraftError as error:
        raise DamagedError(str(error), "give the folder of a run") from None


def _rising(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Steps without those that were repeated after a resume: the later one counts."""
    kept: dict[int, Step] = {}
    for step in steps:
        kept[step.number] = step
    return tuple(kept[name] for name in sorted(kept))


def _step(point: Mapping[str, Any]) -> Step:
    loss = number(point.get("train_loss"))
    return Step(
        count(point.get("step")) or 0, float("nan") if loss is None else loss, number(point.get("learning_rate")),
        number(point.get("grad_norm")), count(point.get("examples")), number(point.get("seconds")),
        numbers(point.get("watched")),
    )  # fmt: skip


def _is_evaluation(point: Mapping[str, Any]) -> bool:
    return number(point.get("quality")) is not None or number(point.get("validation_loss")) is not None


def _evaluation(point: Mapping[str, Any]) -> Evaluation:
    samples = point.get("samples")
    return Evaluation(
        count(point.get("step")) or 0, number(point.get("validation_loss")), number(point.get("quality")),
        numbers(point.get("figures")), samples if isinstance(samples, list) else (),
        number(point.get("evaluation_seconds")),
    )  # fmt: skip


def facts_of(
    recipe: Mapping[str, Any],
    *,
    peak_rate: float | None = None,
    parameters: int | None = None,
    total: int | None = None,
    classes: int | None = None,
    train_rows: int | None = None,
    validation_rows: int | None = None,
    dtype: str | None = None,
) -> Facts:
    """The facts of a run of a resolved recipe: what it says, and what is known of its base and rows."""
    training, method, objective = (_section(recipe, name) for name in ("training", "method", "objective"))
    by_quality = objective.get("name") == "classify"
    best_by = training.get("metric_for_best_model")
    return Facts(
        method=_name(method),
        objective=_name(objective),
        best_by=best_by if best_by in ("quality", "loss") else "quality" if by_quality else "loss",
        parameters=parameters,
        peak_rate=peak_rate if peak_rate is not None else number(method.get("learning_rate")),
        total=total,
        warmup=number(training.get("warmup_ratio")) or 0.0,
        epochs=number(training.get("num_train_epochs")),
        few_on_purpose=training.get("max_steps") is not None,
        clip=number(training.get("max_grad_norm")),
        classes=classes,
        train_rows=train_rows,
        validation_rows=validation_rows,
        keeps_best=bool(training.get("load_best_model_at_end", True)),
        dtype=dtype,
        recipe=recipe,
    )


def _facts(path: Path, recipe: dict[str, Any], points: list[dict[str, Any]], base: Mapping[str, Any]) -> Facts:
    environment, status, report = (read_object(path / name) for name in ("env.json", "status.json", "report.json"))
    data, log = _section(environment, "data"), _text_lines(path / "log.txt")
    rows = _section(data, "rows")
    train_rows = count(rows.get("train")) or _rows_in(log)
    rates = [rate for point in points if (rate := number(point.get("learning_rate"))) is not None]
    stated = number(report.get("learning_rate")) or number(_section(recipe, "method").get("learning_rate"))
    answers, _ = read_lines(path / "answers.jsonl")
    known = facts_of(
        recipe,
        peak_rate=stated or _rate_in(log) or max(rates, default=None),
        parameters=count(_section(environment, "model").get("parameters")),
        total=count(report.get("steps")) or _planned(_section(recipe, "training"), train_rows, status),
        classes=_classes(path, data),
        train_rows=train_rows,
        validation_rows=count(rows.get("validation")),
        dtype=_section(environment, "machine").get("dtype"),
    )
    return replace(
        known,
        state=_state(status),
        cause=str(status.get("cause", "")),
        report=_figures(report),
        correct=_scores(path),
        answers=answers,
        base=base,
        log=log,
    )


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def _name(section: Mapping[str, Any]) -> str | None:
    found = section.get("name")
    return found if isinstance(found, str) else None


def _text_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _rows_in(log: Iterable[str]) -> int | None:
    """Training rows, as the run said them before its first step."""
    found = next(
        (hit for line in log if (hit := re.match(r"([\d,]+) rows of [\d,]+ tokens in the median", line))), None
    )
    return None if found is None else int(found[1].replace(",", ""))


def _rate_in(log: Iterable[str]) -> float | None:
    """The peak learning rate, as the run said it before its first step."""
    found = next((hit for line in log if (hit := re.match(r"peak learning rate ([\d.e+-]+);", line))), None)
    return None if found is None else float(found[1])


def _planned(training: Mapping[str, Any], rows: int | None, status: Mapping[str, Any]) -> int | None:
    """Optimizer steps, as the status says them or as they follow from the recipe."""
    told = re.search(r"step \d+ of (\d+)", str(status.get("phase", "")))
    if told:
        return int(told[1])
    size, passes = (count(training.get(key)) for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    epochs, most = number(training.get("num_train_epochs")), count(training.get("max_steps"))
    if rows is None or not size or epochs is None:
        return most
    steps = max(1, round(-(-rows // (size * (passes or 1))) * epochs))
    return min(steps, most or steps)


def _classes(path: Path, data: Mapping[str, Any]) -> int | None:
    """Labels of a classifier: of the run's record, else of its saved adapter."""
    told = data.get("labels")
    if isinstance(told, Mapping | list):
        return len(told) or None
    try:
        labels = _section(read_object(path / "adapter" / "graft.json"), "head").get("labels")
    except DamagedError:
        return None
    return len(labels) if isinstance(labels, list) else None


def _figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a report, and those of its figures and probes; the rest is not looked at."""
    inner = {name: numbers(report.get(name)) for name in ("figures", "probes")}
    return numbers(report) | inner | {"forgetting_unit": str(report.get("forgetting_unit", "points"))}


def _scores(path: Path) -> list[float]:
    """Score of each test row; empty where the file is missing or damaged."""
    try:
        given = read_object(path / "correct.json").get("correct")
    except DamagedError:
        return []
    return [value for value in given if number(value) is not None] if isinstance(given, list) else []


def _state(status: Mapping[str, Any]) -> str | None:
    """The state; lost when a run that says it is running has no process on this machine."""
    state, process = status.get("state"), count(status.get("pid"))
    if state == "running" and process is not None and not _alive(process):
        return "lost"
    return None if state is None else str(state)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is there, and another user's
        return True
    return True
