"""A comparison's folder: each trial as a curve, and what only shows beside the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from graft.diagnosis.curve import Curve, Finding
from graft.diagnosis.runs import number, read_object, read_run
from graft.errors import DamagedError, DataError

SPREAD = 3.0
"""Standard errors of a difference (of two shares of the test rows) that seeds may lie apart, and
`SPREAD_POINTS` at least. In the comparison of 23 methods one has seeds so far apart (P-tuning: 74.1 and 79.2 %)."""
SPREAD_POINTS = 0.05
BASE = "base"


@dataclass(frozen=True)
class Trial:
    """One run of a comparison: its name, its folder's curve, or why that cannot be read."""

    name: str
    curve: Curve | None
    fault: str = ""


def is_comparison(path: Path) -> bool:
    """Whether a folder holds a comparison's trials."""
    return (path / "trials").is_dir() and (path / "recipe.yaml").is_file()


def read_comparison(path: Path) -> list[Trial]:
    """Every trial but the untouched base, which the others are measured against. Raises `DataError` without any."""
    folders = sorted(entry for entry in (path / "trials").iterdir() if (entry / "recipe.yaml").is_file())
    base: Mapping[str, Any] = {}
    for folder in folders:
        if folder.name.startswith(BASE):
            base = _report(folder)
    found = [_trial(folder, base) for folder in folders if not folder.name.startswith(BASE)]
    if not found:
        raise DataError(f"{path / 'trials'} holds no trial yet", "start the comparison again: it goes on")
    return found


def base_beside(path: Path) -> Mapping[str, Any]:
    """The untouched base's report, when a run folder is a comparison's trial; empty otherwise."""
    if path.resolve().parent.name != "trials":
        return {}
    return next((_report(folder) for folder in sorted(path.resolve().parent.glob(f"{BASE}-seed*"))), {})


def _report(folder: Path) -> Mapping[str, Any]:
    try:
        return read_object(folder / "report.json")
    except DamagedError:
        return {}


def _trial(folder: Path, base: Mapping[str, Any]) -> Trial:
    try:
        return Trial(folder.name, read_run(folder, base))
    except DamagedError as error:
        return Trial(folder.name, None, str(error))


def unstable(trials: Sequence[Trial]) -> list[Finding]:
    """Methods whose seeds lie farther apart than the test rows explain."""
    grouped: dict[str, list[Curve]] = {}
    for trial in trials:
        name, mark, _ = trial.name.rpartition("-seed")
        if mark and trial.curve is not None:
            grouped.setdefault(name, []).append(trial.curve)
    found = []
    for name, curves in grouped.items():
        shares = {_seed(curve): quality for curve in curves if (quality := _quality(curve)) is not None}
        if len(shares) < 2:
            continue
        low, high = min(shares, key=lambda seed: shares[seed]), max(shares, key=lambda seed: shares[seed])
        gap, middle = shares[high] - shares[low], sum(shares.values()) / len(shares)
        rows = max(len(curve.facts.correct) for curve in curves) or 100
        error = sqrt(2 * max(middle * (1 - middle), 1e-4) / rows)
        if gap > max(SPREAD_POINTS, SPREAD * error):
            told = f"{name}: {shares[low]:.1%} with seed {low} and {shares[high]:.1%} with seed {high}"
            causes = (
                "a learning rate near the most it bears",
                "too few steps",
                "a result that one seed says little of",
            )
            found.append(Finding("seeds differ", "warning", "likely", f"{told}, on {rows:,} test rows", causes))
    return found


def _quality(curve: Curve) -> float | None:
    return number(curve.facts.report.get("quality"))


def _seed(curve: Curve) -> str:
    return str(curve.facts.recipe.get("seed", "?"))
