"""Several runs from one file, each of which may point at those before it: supervised tuning, a reward model, a policy.

A chain is a YAML file with `stages`, a mapping of names to recipes; what stands beside it holds for all. Within a
stage `stage:NAME` is the folder of an earlier one. Each stage is a run of its own, as `graft train` makes it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.config import STAGES, override, read_yaml
from graft.errors import RecipeError, nearest
from graft.recipe import Recipe
from graft.run import execute

_POINTER = "stage:"

Watch = Callable[[str, float], None]


def read_chain(source: str, folder: Path, assignments: Sequence[str] = ()) -> dict[str, Recipe]:
    """The recipes of a chain whose runs will lie in `folder`. An assignment `STAGE.key=value` is for one stage,
    `key=value` for all.

    Raises `RecipeError` for a fault of any of them, before the first is run.
    """
    values = read_yaml(source)
    stages = values.pop(STAGES)
    if not isinstance(stages, Mapping) or not stages:
        raise RecipeError(f"{source}: `stages` has to map names to recipes, as in `stages: {{sft: {{…}}, ppo: {{…}}}}`")
    for assignment in assignments:
        first, dot, _ = assignment.partition("=")[0].partition(".")
        if dot and first not in stages and first not in (*Recipe.model_fields, *Recipe.aliases):
            raise RecipeError(f"{assignment!r}: no stage or section {first!r}", nearest(first, stages))
    recipes: dict[str, Recipe] = {}
    for name, own in stages.items():
        if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
            raise RecipeError(f"{source}: stage {name!r}: letters, digits, '-' and '_' only")
        if not isinstance(own, Mapping):
            raise RecipeError(f"{source}: stage {name}: expected keys and values")
        mine = [
            assignment.removeprefix(f"{name}.") for assignment in assignments if _concerns(assignment, name, stages)
        ]
        whole = override({**values, **own}, Recipe, mine)
        recipes[name] = Recipe.parse(_pointed(whole, recipes, folder, name), f"{source}: stage {name}")
    return recipes


def _concerns(assignment: str, name: str, stages: Mapping[str, Any]) -> bool:
    first = assignment.partition("=")[0].partition(".")[0]
    return first == name or first not in stages


def _pointed(value: Any, earlier: Mapping[str, Recipe], folder: Path, name: str) -> Any:
    """`value` with `stage:NAME` replaced by the folder of that stage."""
    if isinstance(value, Mapping):
        return {key: _pointed(inner, earlier, folder, name) for key, inner in value.items()}
    if isinstance(value, list):
        return [_pointed(inner, earlier, folder, name) for inner in value]
    if not isinstance(value, str) or not value.startswith(_POINTER):
        return value
    wanted = value.removeprefix(_POINTER)
    if wanted not in earlier:
        known = f"stages before it: {', '.join(earlier) or 'none'}"
        raise RecipeError(f"stage {name}: {value} is no earlier stage", known)
    return str(folder / wanted)


def execute_chain(
    recipes: Mapping[str, Recipe],
    folder: Path,
    watch: Watch | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run every stage in its folder and return the reports. Stages that are finished are left as they are."""
    reports = {}
    for number, (name, recipe) in enumerate(recipes.items()):

        def tell(phase: str, fraction: float, name: str = name, number: int = number) -> None:
            if watch:
                watch(f"{name}: {phase}", (number + fraction) / len(recipes))

        if say:
            say(f"stage {name} ({number + 1} of {len(recipes)})")
        reports[name] = execute(recipe, folder / name, tell, say)
    return reports
