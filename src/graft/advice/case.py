"""What is decided upon: a recipe or a model by name, a goal, the memory and the machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.config import override
from graft.errors import UsageError, nearest
from graft.families import FAMILIES
from graft.methods.base import Method
from graft.planning.catalogue import config_of, entries, find, skeleton
from graft.planning.machine import Machine
from graft.planning.plan import Plan, plan_model, plan_recipe
from graft.recipe import Recipe
from graft.train.settings import Training

GOALS = ("quality", "memory", "latency", "many-tasks")
"""What a recommendation can be for."""
Watch = Callable[[str, float], None]
"""Told a phase and its share that is done."""


@dataclass(frozen=True)
class Case:
    """A recipe, or a model without one, and what a method for it has to serve."""

    recipe: Recipe | None
    model: str
    objective: str
    rows: int | None
    given: Mapping[str, Any]
    """Settings of a model without a recipe."""
    parameters: int
    memory: int
    machine: Machine | None
    goal: str

    def plan(self, settings: Sequence[str], memory: int | None, watch: Watch | None = None) -> Plan:
        """What a run with these settings takes."""
        if self.recipe is not None:
            return plan_recipe(self.applied(settings), None, memory, self.machine, watch)
        return plan_model(self.model, None, override(self.given, Recipe, settings), memory, self.machine, watch)

    def applied(self, settings: Sequence[str]) -> Recipe:
        """The recipe with these settings."""
        assert self.recipe is not None
        return Recipe.parse(override(self.recipe.resolved(), Recipe, settings))

    def seconds(self, found: Plan) -> float | None:
        """Time of a run: the plan's, or that of two passes over `rows` where it was planned without data."""
        estimate = found.estimates[0]
        if self.recipe is not None or self.rows is None or estimate.step_seconds is None:
            return estimate.run_seconds
        effective = found.settings["micro_batch"] * found.settings["accumulation"]
        training = self.training
        steps = -(-self.rows // effective) * training.num_train_epochs
        return float(estimate.step_seconds * min(steps, training.max_steps or steps))

    @property
    def training(self) -> Training:
        """The settings of training that were given, with defaults for the others."""
        if self.recipe is not None:
            return self.recipe.training
        given = {key: self.given[key] for key in ("training",) if key in self.given}
        return Recipe.parse({"model": self.model, "data": {"train": "rows"}} | given).training


def case_of(
    recipe: Recipe | None,
    model: str | None,
    rows: int | None,
    settings: Mapping[str, Any],
    memory: int,
    machine: Machine | None,
    goal: str,
) -> Case:
    """The case of a recipe, or of a model by name with so many rows and these settings.

    Raises `UsageError` for what cannot be decided upon: both or none of the two, an unknown goal or model.
    """
    if goal not in GOALS:
        raise UsageError(f"no goal {goal!r}", nearest(goal, GOALS))
    if (recipe is None) == (model is None):
        raise UsageError("give one of a recipe and a model's name", "see graft recommend --help")
    if rows is not None and (recipe is not None or rows < 1):
        raise UsageError(
            "--rows goes with --model: a recipe's data say how many there are" if recipe else "--rows is 1 at least",
            "leave it out" if recipe else "give the number of training rows",
        )
    name = recipe.model if recipe is not None else str(model)
    kind = FAMILIES[config_of(name).model_type].kind
    if recipe is not None:
        reason = recipe.objective.refuses(FAMILIES[config_of(name).model_type])
        if reason is not None:
            raise UsageError(f"{name}: {reason}", "choose another base or objective")
        objective, rows = recipe.objective.name, len(recipe.objective.load(recipe.data).train)
        return Case(recipe, name, objective, rows, {}, _parameters(name), memory, machine, goal)
    objective = {"decoder": "instruct"}.get(kind, "classify")
    default = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 8}
    training = settings.get("training", {})
    given = {"objective": objective, **settings}
    if isinstance(training, Mapping):
        given["training"] = default | {Training.aliases.get(key, key): value for key, value in training.items()}
    chosen = given["objective"]
    objective = chosen if isinstance(chosen, str) else str(chosen.get("name", objective))
    return Case(None, name, objective, rows, given, _parameters(name), memory, machine, goal)


def _parameters(model: str) -> int:
    entry = find(model)
    if entry is not None:
        return entries()[entry.name].parameters
    return sum(tensor.numel() for tensor in skeleton(config_of(model)).parameters())


def suits(method: Method, goal: str) -> bool:
    """Whether a method serves a goal."""
    if goal == "latency":
        return method.mergeable
    return not (goal in ("many-tasks", "memory") and method.in_place)
