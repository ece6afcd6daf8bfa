"""What the commands share: their common options, reading a recipe, and bars on a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from graft.planning.machine import Machine
    from graft.recipe import Recipe

Assignments = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's.")
]
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML recipe; - reads it from standard input.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="The folder to write; runs/… when left out.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, and nothing else there.")]
Memory = Annotated[
    str | None, typer.Option("--memory", help="What it must fit in, such as 16GB; else the machine's free memory.")
]
Device = Annotated[str | None, typer.Option("--device", help="Plan for a card by name, such as a100-80gb.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the recipe and print every setting, then stop.")]


def given_recipe(source: str, assignments: list[str] | None, quiet: bool = False) -> "Recipe":
    """The recipe of a command line; `-` reads it from standard input."""
    from graft.recipe import read_recipe

    text = sys.stdin.read() if source == "-" else None
    note = None if quiet else lambda line: typer.echo(line, err=True)
    return read_recipe(source if source != "-" else None, assignments or [], text, note)


def source_and_settings(
    given: str | None, assignments: list[str] | None, model: str | None
) -> tuple[str | None, list[str]]:
    """The recipe of a command line and its settings: with `--model` the first word is a setting too."""
    if given is not None and model is not None and "=" in given:
        return None, [given, *(assignments or [])]
    return given, list(assignments or [])


@contextmanager
def planning(
    memory: str | None, device: str | None, silent: bool
) -> Iterator[tuple["Machine", int, Callable[[str, float], None]]]:
    """What a run is planned for, and a bar: the card of this name, or this machine, which is measured the first time,
    and the bytes that it may take, as given, or all of a card, or what is free here.
    """
    import torch

    from graft.planning.machine import free_memory, known, measured, parse_memory

    limit = None if memory is None else parse_memory(memory)  # a fault in it is told before this machine is measured
    with run_bar(silent) as bar:
        machine = known(device) if device is not None else measured(watch=bar)
        if limit is None:
            limit = machine.memory if device is not None else free_memory(torch.device(machine.kind))
        yield machine, limit, bar


def stem(recipe: str) -> str:
    """What a recipe is called, for the folder of its run."""
    return "run" if recipe == "-" else Path(recipe).stem


def as_cell(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return {True: "yes", False: "no", None: ""}.get(value, str(value)) if not isinstance(value, str) else value


def terminal(stderr: bool = False) -> "Console":
    """rich's view of standard output, or of standard error."""
    from rich.console import Console

    return Console(stderr=stderr)


@contextmanager
def run_bar(silent: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, with what is being done and the time left; nothing elsewhere."""
    console = terminal(stderr=True)
    if silent or not console.is_terminal:
        yield lambda phase, fraction: None
        return
    with _progress(console) as progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda phase, fraction: progress.update(task, completed=fraction, description=phase)


@contextmanager
def comparison_bar() -> Iterator[Callable[[int, int, str, str, float], None]]:
    """A bar over all trials on a terminal; elsewhere a line as each trial starts."""
    console = terminal(stderr=True)
    if not console.is_terminal:
        started: list[str] = []

        def tell(done: int, total: int, name: str, phase: str, share: float) -> None:
            if name and (not started or started[-1] != name):
                started.append(name)
                typer.echo(f"trial {done + 1} of {total}: {name}", err=True)

        yield tell
        return
    with _progress(console) as progress:
        task = progress.add_task("starting", total=1.0)

        def watch(done: int, total: int, name: str, phase: str, share: float) -> None:
            what = f"{done + 1}/{total} {name}: {phase}" if name else phase
            progress.update(task, completed=(done + share) / total, description=what)

        yield watch


def _progress(console: "Console") -> Any:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    return Progress(
        TextColumn("{task.description}", table_column=Column(ratio=3, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        expand=True,
        transient=True,
        speed_estimate_period=600,
    )
