"""The command that says what to take, and why."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.shared import (
    Assignments,
    Device,
    Json,
    Memory,
    given_recipe,
    planning,
    source_and_settings,
    terminal,
)

if TYPE_CHECKING:
    from graft.advice.recommend import Recommendation

_DECIDED = ("method", "methods", "quantization")
"""Settings that are what is recommended."""


def recommend(
    given: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A YAML recipe; left out with --model.")
    ] = None,
    assignments: Assignments = None,
    memory: Memory = None,
    device: Device = None,
    goal: Annotated[
        str, typer.Option("--goal", help="What counts: quality, memory, latency or many-tasks.")
    ] = "quality",
    model: Annotated[str | None, typer.Option("--model", help="A model by name, such as llama-2-7b.")] = None,
    rows: Annotated[int | None, typer.Option("--rows", help="With --model: how many training rows there are.")] = None,
    runs: Annotated[
        Path | None,
        typer.Option("--runs", help="A folder of comparisons, which count before rules; runs if it exists."),
    ] = None,
    write: Annotated[Path | None, typer.Option("--write", help="Save the recipe that is recommended.")] = None,
    as_json: Json = False,
) -> None:
    """Recommend a method and its settings, with the reasons: measured comparisons first, rules of the field else."""
    from graft.advice.case import GOALS
    from graft.advice.recommend import recommend as decide
    from graft.errors import UsageError, nearest

    source, settings = source_and_settings(given, assignments, model)
    if (source is None) == (model is None):
        raise UsageError("give one of a recipe and --model", "see graft recommend --help")
    if goal not in GOALS:
        raise UsageError(f"no goal {goal!r}", nearest(goal, GOALS))
    if write is not None and model is not None:
        raise UsageError("--write needs a recipe, since a recipe names its data", "give a recipe in place of --model")
    if write is not None and write.exists():
        raise UsageError(f"{write} exists", "choose another name for --write")
    folder = _folder(runs)
    values = _values(settings)
    recipe = given_recipe(source, settings) if source is not None else None
    with planning(memory, device, as_json) as (machine, limit, bar):
        found = decide(
            recipe, model=model, rows=rows, settings=values, memory=limit, machine=machine, goal=goal, runs=folder,
            watch=bar,
        )  # fmt: skip
    if write is not None:
        _write(found, write)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        _print(found, write)


def _folder(given: Path | None) -> Path | None:
    from graft.errors import UsageError

    if given is None:
        return Path("runs") if Path("runs").is_dir() else None
    if not given.is_dir():
        raise UsageError(f"{given} is no folder", "give the folder of your comparisons, or leave --runs out")
    return given


def _values(assignments: list[str]) -> dict[str, Any]:
    """The settings by section; those that are recommended cannot be given."""
    from graft.config import override
    from graft.errors import UsageError
    from graft.recipe import Recipe

    for assignment in assignments:
        told = override({}, Recipe, [assignment])
        decided = [key for key in told if Recipe.aliases.get(key, key) in _DECIDED]
        if decided:
            raise UsageError(f"{assignment}: {decided[0]} is what is recommended", "leave it out, or see graft plan")
    return override({}, Recipe, assignments)


def _write(found: "Recommendation", path: Path) -> None:
    """Save the recipe, once it reads back as it is."""
    from graft.files import unwritable
    from graft.recipe import Recipe, read_recipe

    assert found.recipe is not None
    recipe: Recipe = Recipe.parse(found.recipe)
    text = recipe.to_yaml()
    assert read_recipe(None, text=text).method == recipe.method
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise unwritable(path, error) from None


def _print(found: "Recommendation", written: Path | None) -> None:
    from graft.advice.fit import size

    screen = terminal()

    def line(text: str, indent: int = 0) -> None:
        from rich.padding import Padding
        from rich.text import Text

        screen.print(Padding(Text(text), (0, 0, 0, indent)))

    count = "an unknown number of rows" if found.rows is None else f"{found.rows:,} training rows"
    line(f"{found.model} ({found.parameters / 1e6:,.0f} M parameters), {found.objective}, {count}")
    line(f"goal {found.goal}, in {size(found.memory)}" + (f"; {found.machine}" if found.machine else ""))
    line("")
    for told in found.statements:
        line(f"{told.setting} = {_value(told.value)}")
        line(f"{told.basis}: {told.reason} [{told.source}]", 4)
    line("")
    time = "" if found.run_seconds is None else f" and {_time(found.run_seconds)}"
    line(f"It takes {size(found.peak)}{time}.")
    if found.alternatives:
        line("If this is wrong, the next choices:")
    for other in found.alternatives:
        line(f"{other.label}: {other.words}", 2)
    for text in found.yielded:
        line(f"A rule gives way: {text}")
    if found.evidence:
        line("Measured comparisons looked at:")
    else:
        line("No measured comparison of this model and objective was found: all of this is rules and plans.")
    for text in [*found.evidence, *found.notes]:
        line(text, 2)
    if written is not None:
        line(f"Written: {written}; `graft train {written}` takes it.")


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
