"""The command that says what a run will take."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.shared import (
    Assignments,
    Device,
    Json,
    Memory,
    given_recipe,
    planning,
    run_bar,
    source_and_settings,
    terminal,
)

if TYPE_CHECKING:
    from graft.methods.base import Method
    from graft.planning.machine import Machine
    from graft.planning.plan import Estimate, Plan

_QLORA = ("method=lora", "target_modules=[all-linear]", "quantization=nf4", "gradient_checkpointing=true")
"""LoRA at every matrix of a base in nf4, with activations recomputed (Dettmers et al. 2023, arXiv 2305.14314)."""


def plan(
    given: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A YAML recipe; left out with --model or --fits.")
    ] = None,
    assignments: Assignments = None,
    memory: Memory = None,
    methods: Annotated[
        str | None, typer.Option("--methods", "--method", help="Names with commas, or all; qlora is lora on nf4.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A model by name, such as llama-2-7b, without data or weights.")
    ] = None,
    device: Device = None,
    fits: Annotated[
        str | None, typer.Option("--fits", help="Show what can be tuned in this much memory, such as 16GB.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict memory and time of a run, whether it fits, and what would make it fit. Nothing is loaded or trained."""
    from graft.errors import UsageError
    from graft.planning.machine import parse_memory

    recipe, settings = source_and_settings(given, assignments, model)
    if (recipe is not None) + (model is not None) + (fits is not None) != 1:
        raise UsageError("give one of a recipe, --model and --fits", "see graft plan --help")
    if fits is not None:
        if memory or methods or settings:
            raise UsageError("--fits takes no methods, settings or memory of its own", "give --device at most")
        _print_fits(parse_memory(fits), device, as_json)
        return
    with planning(memory, device, as_json) as (machine, limit, bar):
        found = _planned(recipe, settings, methods, model, limit, machine, bar)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        _print(found, machine)
    _check(found)


def _planned(
    recipe: str | None,
    assignments: list[str],
    names: str | None,
    model: str | None,
    limit: int,
    machine: "Machine",
    bar: Any,
) -> "Plan":
    from graft.config import override
    from graft.planning.plan import plan_model, plan_recipe
    from graft.recipe import Recipe

    named = _names(names)
    given = [*_preset(named), *assignments]
    if model is None:
        assert recipe is not None
        read = given_recipe(recipe, given)
        return plan_recipe(read, _chosen(named, read.method, assignments), limit, machine, bar)
    settings = override({}, Recipe, given)
    return plan_model(model, _chosen(named, None, assignments), settings, limit, machine, bar)


def _names(given: str | None) -> list[str]:
    """The methods that are asked for by name, each once; none where the recipe's own is meant."""
    from graft.errors import UsageError

    if given is None:
        return []
    names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if not names:
        raise UsageError("--methods names no method", "give names with commas, or all")
    if "qlora" in names and len(names) > 1:
        raise UsageError("qlora changes the base, so it is planned alone", "give --method qlora, or quantization=nf4")
    if "all" in names and len(names) > 1:
        raise UsageError("--methods all stands alone", "give all, or names")
    return names


def _preset(names: list[str]) -> list[str]:
    """One method as a setting of the recipe, so that settings beside are its own; `qlora` is several."""
    if names == ["qlora"]:
        return list(_QLORA)
    return [f"method={names[0]}"] if len(names) == 1 and names != ["all"] else []


def _chosen(names: list[str], own: "Method | None", assignments: list[str]) -> "list[Method] | None":
    """The methods of several names, with the settings that the recipe has for its own; None for the recipe's own."""
    from graft.config import override
    from graft.errors import UsageError
    from graft.methods.base import read_method
    from graft.planning.plan import every_method
    from graft.recipe import Recipe

    if _preset(names) or not names:
        return None
    for assignment in assignments:
        if "method" in override({}, Recipe, [assignment]):
            raise UsageError(f"{assignment}: several methods are planned", "give the one method that it is for")
    chosen = every_method() if names == ["all"] else [read_method(name) for name in names]
    return [own if own is not None and own.name == method.name else method for method in chosen]


def _check(found: "Plan") -> None:
    """End with 3 where nothing fits, saying what is missing, and with 2 where nothing can be used."""
    from graft.errors import ResourceError, UsageError

    usable = [estimate for estimate in found.estimates if estimate.error is None]
    if not usable:
        raise UsageError(f"{found.estimates[0].label}: {found.estimates[0].error}")
    assert found.memory is not None
    if all(estimate.fits is False and estimate.change is None for estimate in usable):
        least = min(estimate.changed_peak or estimate.peak for estimate in usable)
        raise ResourceError(
            f"nothing fits: at least {_size(least)} are needed, {_size(least - found.memory)} more than there are",
            "take a smaller model, or more memory (--memory, --device)",
        )


# Tables ----------------------------------------------------------------------------------------------

_SHORT = {
    "weights": "weights", "adapter": "adapter", "gradients": "grads", "optimizer": "optim",
    "activations": "activ", "logits": "logits",
}  # fmt: skip


def _print(found: "Plan", machine: "Machine") -> None:
    from rich.table import Table

    screen = terminal()
    told = found.settings
    lines = [
        f"{found.model}: {told['objective']}, {told['precision']}"
        + (f", base in {told['quantization']}" if told["quantization"] else ""),
        found.rows,
        f"passes of {_rows(told['micro_batch'])}, {told['accumulation']} to a step"
        + (", activations recomputed" if told["gradient_checkpointing"] else ""),
        f"in {_size(found.memory or 0)}; {found.machine}",
        *found.notes,
    ]
    for line in lines:
        screen.print(line, highlight=False, markup=False)
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in ("fits", "peak", *_SHORT.values(), "s/step", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for estimate in found.estimates:
        if estimate.error is None:
            table.add_row(*_row(estimate))
    if table.row_count:
        screen.print()
        screen.print(table)
    rest = [line for estimate in found.estimates for line in _remarks(estimate)]
    if rest:
        screen.print()
    for line in rest:
        screen.print(line, highlight=False, markup=False)


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number:,} rows"


def _row(estimate: "Estimate") -> list[str]:
    fits = {True: "yes", False: "no", None: ""}[estimate.fits]
    kinds = [_size(estimate.kinds[name]) for name in _SHORT]
    step = "" if estimate.step_seconds is None else f"{estimate.step_seconds:.3g}"
    run = "" if estimate.run_seconds is None else _time(estimate.run_seconds)
    return [estimate.label, fits, _size(estimate.peak), *kinds, step, run]


def _remarks(estimate: "Estimate") -> list[str]:
    if estimate.error is not None:
        return [f"{estimate.label}: {estimate.error}"]
    lines = []
    most = max(("training", "evaluation", "saving"), key=lambda stage: estimate.stages.get(stage, 0))
    if most != "training":
        lines.append(f"{estimate.label}: {most} takes the most, {_size(estimate.stages[most])} of live tensors")
    if estimate.fits is False and estimate.change is not None:
        lines.append(f"{estimate.label} fits, with {_size(estimate.changed_peak or 0)}, by {estimate.change}")
    elif estimate.fits is False:
        least = estimate.changed_peak or estimate.peak
        lines.append(f"{estimate.label} does not fit whatever is changed: it takes at least {_size(least)}")
    return lines


def _print_fits(memory: int, device: str | None, as_json: bool) -> None:
    from rich.table import Table

    from graft.planning.machine import known
    from graft.planning.plan import what_fits

    machine = known(device) if device is not None else None
    with run_bar(as_json) as bar:
        rows = what_fits(memory, machine, bar)
    if as_json:
        typer.echo(json.dumps({"memory": memory, "models": rows}, indent=2))
        return
    screen = terminal()
    screen.print(f"in {_size(memory)}: rows of 512 tokens, one at a time, activations recomputed", highlight=False)
    screen.print()
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("model", "parameters", "full", "LoRA", "QLoRA"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        cells = [_fit(row.get(way), memory) for way in ("full", "lora", "qlora")]
        table.add_row(row["model"], _count(row["parameters"]), *cells)
    screen.print(table)


def _fit(size: int | None, memory: int) -> str:
    if size is None:
        return "no"
    return f"{_size(size)} {'yes' if size <= memory else 'no'}"


def _count(number: int) -> str:
    return f"{number / 1e9:,.1f} B" if number >= 1e9 else f"{number / 1e6:,.0f} M"


def _size(size: int) -> str:
    """Bytes in at most five characters."""
    for unit, letter in ((2**30, "G"), (2**20, "M"), (2**10, "K")):
        if abs(size) >= unit:
            number = size / unit
            return f"{number:.1f}{letter}" if abs(number) < 99.95 else f"{number:,.0f}{letter}"
    return str(size)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.0f} d"
