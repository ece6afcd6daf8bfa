"""Many runs, one table: every trial its own process and run folder, on equal terms."""

import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from graft.assess import check_probes
from graft.data.load import Splits
from graft.errors import DamagedError, GraftError, RecipeError
from graft.files import write_json, write_text
from graft.methods.base import Method, check_pairs
from graft.model import family_of
from graft.recipe import Recipe
from graft.report import write_report
from graft.runfolder import RunFolder, differences
from graft.stats import interval, verdicts

BASE = "base"
PARENT = "GRAFT_PARENT"
"""Environment variable by which a trial knows the process that it must not outlive."""

Watch = Callable[[int, int, str, str, float], None]
"""Called with trials done, trials in all, the trial's name, what it is doing, and its own share done."""


@dataclass(frozen=True)
class Trial:
    """One run of a comparison."""

    label: str
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def name(self) -> str:
        """Label and seed."""
        return self.label if self.label == BASE else f"{self.label} (seed {self.seed})"


def labels(methods: Sequence[Method]) -> list[str]:
    """A label for each method: its name, and the settings by which it differs from others of its name."""
    result = []
    for method in methods:
        same = [other for other in methods if other.name == method.name]
        given = method.model_dump(mode="json")
        told = [key for key in given if any(other.model_dump(mode="json")[key] != given[key] for other in same)]
        told = [key for key in told if given[key] or type(given[key]) in (int, float)]
        result.append(" ".join([method.name, *(_told(key, given[key]) for key in told)]))
    twice = next((label for label in result if result.count(label) > 1), None)
    if twice:
        raise RecipeError(f"methods: {twice!r} stands twice with the same settings")
    return result


def _told(key: str, value: Any) -> str:
    """One setting in a label. Those that are off or left out are not told."""
    if value is True:
        return key
    return f"{key}={'+'.join(map(str, value)) if isinstance(value, list) else value}"


def trials(recipe: Recipe, folder: Path) -> list[Trial]:
    """The untouched base, then every method with every seed."""
    pairs: list[tuple[str, Method | None]] = [(BASE, None)]
    pairs += list(zip(labels(recipe.methods), recipe.methods, strict=True))
    found = []
    for label, method in pairs:
        for seed in recipe.seeds[:1] if method is None else recipe.seeds:
            # A trial's recipe leaves the others out, so that adding a method repeats no finished trial.
            one = recipe.model_copy(
                update={
                    "method": method,
                    "methods": [method or recipe.methods[0]],
                    "seed": seed,
                    "seeds": [seed],
                }
            )
            if method is None:
                one = one.model_copy(
                    update={"methods": Recipe.model_fields["methods"].get_default(call_default_factory=True)}
                )
            found.append(Trial(label, seed, one, folder / "trials" / f"{_slug(method)}-seed{seed}"))
    return found


def _slug(method: Method | None) -> str:
    """A folder name that depends on the method alone, unlike its label: its name and settings that are no defaults."""
    if method is None:
        return BASE
    given = method.model_dump(mode="json", exclude_defaults=True)
    name = " ".join([method.name, *(f"{key}={value}" for key, value in given.items())])
    plain = name.replace(" ", "-").replace("=", "-")
    slug = re.sub(r"[^A-Za-z0-9._-]", "-", plain)
    if slug == plain and len(slug) <= 100:
        return slug
    return f"{slug[:80]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def compare(recipe: Recipe, folder: Path, watch: Watch | None = None, command: str = "") -> dict[str, Any]:
    """Run every trial that is not finished yet, write comparison.json and report.html, and return the comparison.

    A trial that fails costs its row. Raises what is wrong with the recipe, the data or the folder before any
    trial starts.
    """
    check_pairs(recipe.methods, recipe.model, recipe.objective.refuses)
    splits = recipe.objective.load(recipe.data)
    check_probes(recipe, splits.labels)
    planned = trials(recipe, folder)
    _check_folder(recipe, folder, planned, splits)
    write_text(folder / "recipe.yaml", recipe.to_yaml())
    causes: dict[str, str] = {}
    for number, trial in enumerate(planned):
        if RunFolder(trial.folder).finished(trial.recipe.resolved()):
            continue

        def tell(phase: str, share: float, number: int = number, trial: Trial = trial) -> None:
            if watch:
                watch(number, len(planned), trial.name, phase, share)

        cause = _run(trial, tell)
        if cause:
            causes[trial.name] = cause
    if watch:
        watch(len(planned), len(planned), "", "writing the report", 0.0)
    comparison = assemble(recipe, planned, causes, command)
    write_json(folder / "comparison.json", comparison)
    write_report(comparison, folder / "report.html")
    return comparison


def _check_folder(recipe: Recipe, folder: Path, planned: Sequence[Trial], splits: Splits) -> None:
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file, a comparison needs a folder")
    stored = folder / "recipe.yaml"
    inside = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} if folder.exists() else set()
    foreign = sorted(inside - {"recipe.yaml", "comparison.json", "report.html", "trials"})
    if foreign:
        raise RecipeError(f"{folder} holds other files ({foreign[0]})", "choose another folder with -o")
    if stored.exists():
        before = RunFolder(folder).recipe() or {}
        ignored = {"methods", "seeds", "method", "seed"}
        changed = [
            difference
            for difference in differences(before, recipe.resolved())
            if difference.split(":")[0].split(".")[0] not in ignored
        ]
        if changed:
            raise RecipeError(
                f"{folder} holds another comparison ({', '.join(changed[:3])})",
                "choose another folder with -o",
            )
    for trial in planned:
        run = RunFolder(trial.folder)
        run.check(trial.recipe.resolved())
        if run.finished():
            run.check_data(splits.sha256)


def _run(trial: Trial, tell: Callable[[str, float], None]) -> str | None:
    """Run one trial in a process of its own; the cause when it failed, None when it is done.

    An interrupt ends the trial first and then goes on.
    """
    trial.folder.parent.mkdir(parents=True, exist_ok=True)
    tell("starting", 0.0)
    # Files rather than pipes: a pipe that nobody reads is full after 64 KB, and the trial would wait for ever.
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(trial.recipe.to_yaml().encode())
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "graft", "train", "-", "-o", str(trial.folder), "--quiet"],
            stdin=given,
            stdout=subprocess.DEVNULL,
            stderr=said,
            env={**os.environ, PARENT: str(os.getpid())},
        )
        _wait(process, RunFolder(trial.folder), tell)
        said.seek(0)
        lines = [line for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    if process.returncode == 0:
        return None
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return f"ended by {name}" + (", which out of memory looks like" if name == "SIGKILL" else "")
    return lines[-1].removeprefix("graft: ") if lines else f"exit code {process.returncode}"


def _wait(process: subprocess.Popen[bytes], folder: RunFolder, tell: Callable[[str, float], None]) -> None:
    try:
        while process.poll() is None:
            with suppress(GraftError):
                status = folder.read("status.json")
                if status.get("pid") == process.pid and "phase" in status:
                    tell(str(status["phase"]), float(status["fraction"]))
            time.sleep(0.2)
    except BaseException:
        process.terminate()  # a job in the background can have SIGINT ignored
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def assemble(recipe: Recipe, planned: Sequence[Trial], causes: dict[str, str], command: str = "") -> dict[str, Any]:
    """comparison.json from finished run folders."""
    done = [trial for trial in planned if trial.name not in causes]
    if not done:
        raise DamagedError(f"no trial of the comparison finished; the first: {next(iter(causes.values()))}")
    reports = {trial.name: RunFolder(trial.folder).read("report.json") for trial in done}
    correct = {trial.name: RunFolder(trial.folder).read("correct.json")["correct"] for trial in done}
    base = reports.get(BASE, {})
    names = dict.fromkeys(trial.label for trial in planned)
    rows = []
    arrays: dict[str, list[list[int]]] = {}
    for label in names:
        mine = [trial for trial in planned if trial.label == label]
        failed = [causes[trial.name] for trial in mine if trial.name in causes]
        finished = [trial for trial in mine if trial.name not in causes]
        if failed:
            told = {"label": label, "method": label.split()[0], "status": "failed", "cause": failed[0]}
            rows.append(told | {"seeds": len(finished)} | _nothing())
            continue
        arrays[label] = [correct[trial.name] for trial in finished]
        rows.append(_row(label, [reports[trial.name] for trial in finished], arrays[label], base, recipe))
    # The base has no seeds: its one answer stands against each seed of the others.
    width = max(len(array) for array in arrays.values())
    found = verdicts({label: array * (width // len(array)) for label, array in arrays.items()})
    environment = RunFolder(done[0].folder).read("env.json")
    return {
        "title": f"Fine-tuning {environment['model']['name']} on {recipe.data.train}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command or shlex.join(sys.argv),
        "model": environment["model"] | {"architecture": family_of(recipe.model).kind},
        "data": _data(recipe),
        "objective": recipe.objective.name,
        "metric": recipe.objective.metric,
        "forgetting_unit": next(iter(reports.values())).get("forgetting_unit", "points"),
        "seeds": recipe.seeds,
        "environment": environment["machine"],
        "recipe": recipe.resolved(),
        "rows": rows,
        "verdicts": [vars(verdict) for verdict in found],
        "notes": [*environment["data"]["notes"], *_notes(recipe)],
    }


_FIGURES = (
    "quality", "quality_low", "quality_high", "trainable_parameters", "trainable_fraction", "peak_memory_bytes",
    "train_seconds", "examples_per_second", "adapter_bytes", "latency_ms", "merged_latency_ms", "learning_rate",
    "expected_memory_bytes", "expected_seconds",
)  # fmt: skip


_WHOLE = ("trainable_parameters", "peak_memory_bytes", "expected_memory_bytes", "adapter_bytes")
"""Figures that are counts; the mean over seeds is rounded."""


def _nothing() -> dict[str, Any]:
    return dict.fromkeys(_FIGURES) | {"forgetting": {}, "transfer": {}, "by_rank": {}, "curve": [], "figures": {}}


def _row(
    label: str,
    reports: Sequence[dict[str, Any]],
    correct: list[list[int]],
    base: dict[str, Any],
    recipe: Recipe,
) -> dict[str, Any]:
    measured = interval(correct)
    figures = {name: _mean([report.get(name) for report in reports]) for name in _FIGURES[3:]}
    by_rank = {rank: _mean([report["by_rank"][rank] for report in reports]) for rank in reports[0].get("by_rank", {})}
    # A share that falls is forgotten in points, a loss that rises in nats.
    factor = -1 if reports[0].get("forgetting_unit") == "nats" else 100
    forgetting = {
        name: factor * (base["probes"][name] - value)
        for name in recipe.forgetting
        if base and (value := _mean([report["probes"][name] for report in reports])) is not None
    }
    further = {
        name: _mean([report.get("figures", {}).get(name) for report in reports])
        for name in reports[0].get("figures", {})
    }
    return {
        "label": label,
        "method": reports[0]["method"],
        "status": "done",
        "cause": None,
        "seeds": len(reports),
        "quality": measured.mean,
        "quality_low": measured.low,
        "quality_high": measured.high,
        "by_rank": by_rank,
        **figures,
        **{name: round(value) for name in _WHOLE if (value := figures[name]) is not None},
        "forgetting": forgetting,
        "figures": further,
        "transfer": {name: _mean([report["transfer"][name] for report in reports]) for name in recipe.transfer},
        "curve": reports[0]["curve"],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _data(recipe: Recipe) -> dict[str, Any]:
    splits = recipe.objective.load(recipe.data)
    return {
        "name": recipe.data.train,
        "train": len(splits.train),
        "validation": len(splits.validation),
        "test": len(splits.test),
        "labels": list(splits.labels),
    }


def _notes(recipe: Recipe) -> list[str]:
    labelled = recipe.objective.unit == "labelled"
    samples = recipe.probe_samples or (2500 if labelled else 200)
    notes = [
        "The untouched base classifies by the nearest mean embedding of the training rows of each label; "
        "nothing in it is trained."
        if labelled
        else "The untouched base gets the same prompts through the same chat template; nothing in it is trained."
    ]
    if recipe.forgetting and labelled:
        notes.append(
            "Forgetting: recall@10 of finding another sentence of the same document among up to "
            f"{samples:,} sentences by mean-pooled embeddings, base minus tuned, in points."
        )
    elif recipe.forgetting:
        notes.append(
            f"Forgetting: mean loss of up to {samples:,} texts, or of the answers of a task, tuned minus base, in nats "
            "per token."
        )
    if recipe.transfer:
        what = "accuracy of the tuned classifier on texts of other kinds" if labelled else "quality on other data"
        notes.append(f"Transfer: {what}, without training on them.")
    notes.append(
        "Peak memory is that of the training process, with the libraries it loads. Latency is of "
        + ("one row at a time." if labelled else "one generated token at batch 1, the prompt's pass included.")
    )
    return notes
