"""Which method to take, with which settings, and why: measured comparisons first, rules where there are none."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.advice.case import Watch, case_of
from graft.advice.choice import Statement
from graft.advice.evidence import gather
from graft.advice.fit import Alternative, alternatives, fitting
from graft.advice.measured import by_measurement, candidates
from graft.advice.ruled import by_rules
from graft.planning.machine import Machine
from graft.recipe import Recipe


@dataclass(frozen=True)
class Recommendation:
    """What to take, why, and what it would cost to be wrong."""

    model: str
    objective: str
    parameters: int
    rows: int | None
    """Training rows; None where they are not known."""
    goal: str
    memory: int
    machine: str | None
    method: str
    statements: list[Statement]
    peak: int
    """Bytes that the run takes at most."""
    run_seconds: float | None
    alternatives: list[Alternative]
    yielded: list[str]
    """Rules that a measurement contradicts, or that the plan makes needless."""
    evidence: list[str]
    """The comparisons that were used or looked at."""
    notes: list[str]
    settings: list[str]
    """The recommended settings as `key=value`."""
    recipe: dict[str, Any] | None
    """The whole recipe; None where only a model was given."""


def recommend(
    recipe: Recipe | None = None,
    *,
    memory: int,
    model: str | None = None,
    rows: int | None = None,
    settings: Mapping[str, Any] | None = None,
    machine: Machine | None = None,
    goal: str = "quality",
    runs: Path | None = None,
    watch: Watch | None = None,
) -> Recommendation:
    """The method and settings for a recipe's model, data and objective, or for a `model` by name with `rows` rows.

    The recipe's own method and quantization are not looked at: they are what is decided. `runs`: a folder whose
    comparisons count before rules. Raises `UsageError` for an unknown goal or model, `ResourceError` where
    nothing fits.
    """
    case = case_of(recipe, model, rows, settings or {}, memory, machine, goal)
    found, notes = gather(runs, case.model, case.objective) if runs is not None else ([], [])
    yielded: list[str] = []
    choice = by_rules(case, yielded)
    evidence = [one for one in found if candidates(one, case)]
    if evidence:
        choice = by_measurement(case, evidence[0], choice, yielded)
    plan, settings_, told = fitting(case, choice, watch)
    estimate = plan.estimates[0]
    others = alternatives(case, settings_, plan, evidence, watch)
    looked = [one.words if one in evidence else f"{one.words}: nothing in it is for this goal" for one in found]
    return Recommendation(
        case.model, case.objective, case.parameters, case.rows, goal, memory, plan.machine, estimate.label,
        told, estimate.peak, case.seconds(plan), others, yielded, looked, [*notes, *plan.notes], settings_,
        None if recipe is None else case.applied(settings_).resolved(),
    )  # fmt: skip
