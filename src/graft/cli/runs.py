"""The commands that run recipes: demo, compare, train, eval, merge, and runs, which lists them."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli.shared import (
    Assignments,
    DryRun,
    Json,
    Output,
    RecipePath,
    comparison_bar,
    given_recipe,
    run_bar,
    stem,
    terminal,
)
from graft.errors import GraftError, RecipeError


def demo(assignments: Assignments = None, output: Output = None, as_json: Json = False) -> None:
    """Compare six methods on a real model and real data: what each costs, reaches and forgets."""
    _compare(_demo_recipe(), assignments, output or Path("runs/demo"), as_json, False)


def compare(
    recipe: RecipePath,
    assignments: Assignments = None,
    output: Output = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Compare methods on one model and data: a table, comparison.json and an HTML page.

    Started again after an interruption, it repeats no finished trial.
    """
    _compare(recipe, assignments, output or Path("runs") / stem(recipe), as_json, dry_run)


def _compare(source: str, assignments: list[str] | None, folder: Path, as_json: bool, dry_run: bool) -> None:
    recipe = given_recipe(source, assignments)
    if source != "-" and assignments:
        before = given_recipe(source, None, quiet=True)
        if (before.method, before.seed) != (recipe.method, recipe.seed):
            raise RecipeError(
                "a comparison reads methods and seeds, not method and seed", "give methods=[…] or seeds=[…]"
            )
    if dry_run:
        typer.echo(recipe.to_yaml(), nl=False)
        return
    from graft.compare import compare as compare_methods
    from graft.report import summary, terminal_table

    with comparison_bar() as watch:
        comparison = compare_methods(recipe, folder, watch, f"graft {shlex.join(sys.argv[1:])}")
    failed = [row for row in comparison["rows"] if row["status"] == "failed"]
    if as_json:
        typer.echo(json.dumps(comparison, indent=2))
    else:
        screen = terminal()
        screen.print(terminal_table(comparison))
        for sentence in summary(comparison):
            screen.print(sentence, highlight=False, markup=False)
        typer.echo(f"\nreport: {folder / 'report.html'}   figures: {folder / 'comparison.json'}")
    if failed:
        raise GraftError(
            f"{len(failed)} of {len(comparison['rows'])} rows failed: {failed[0]['label']}: {failed[0]['cause']}"
        )


def train(
    recipe: RecipePath,
    assignments: Assignments = None,
    output: Output = None,
    as_json: Json = False,
    dry_run: DryRun = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Train one method and write a run folder: adapter, figures, learning curve."""
    from graft.config import read_stages

    if recipe != "-" and read_stages(recipe):
        _train_chain(recipe, assignments or [], output or Path("runs") / stem(recipe), as_json, dry_run, quiet)
        return
    read = given_recipe(recipe, assignments, quiet)
    if dry_run:
        typer.echo(read.to_yaml(), nl=False)
        return
    from graft.compare import PARENT
    from graft.run import execute, stop_with

    method = read.method.name if read.method is not None else "base"
    folder = output or Path("runs") / f"{stem(recipe)}-{method}-seed{read.seed}"
    parent = int(os.environ[PARENT]) if os.environ.get(PARENT, "").isdigit() else None
    silent = quiet or as_json
    with run_bar(silent) as bar:

        def watch(phase: str, fraction: float) -> None:
            stop_with(parent)
            bar(phase, fraction)

        report = execute(read, folder, watch, say=None if silent else lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    elif not quiet:
        typer.echo(_run_line(report))
        _print_ranks(report["by_rank"])
        typer.echo(f"run: {folder}")


def _train_chain(source: str, assignments: list[str], folder: Path, as_json: bool, dry_run: bool, quiet: bool) -> None:
    """The runs of a recipe with stages, one after the other; finished ones are kept."""
    from graft.chain import execute_chain, read_chain

    recipes = read_chain(source, folder, assignments)
    if dry_run:
        for name, recipe in recipes.items():
            typer.echo(f"# stage {name}\n{recipe.to_yaml()}", nl=False)
        return
    silent = quiet or as_json
    with run_bar(silent) as bar:
        reports = execute_chain(recipes, folder, bar, None if silent else lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(reports, indent=2))
    elif not quiet:
        for name, report in reports.items():
            typer.echo(f"{name}: {_run_line(report)}")
        typer.echo(f"runs: {folder}")


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Other labelled rows: a file or a starter data set.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a run's adapter, read from disk, on its test rows or on other data."""
    from graft.run import evaluate_run

    with run_bar(as_json) as bar:
        result = evaluate_run(run, data, bar)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        typer.echo(
            f"{result['metric']} {result['quality']:.1%} ({result['quality_low']:.1%} to {result['quality_high']:.1%}) "
            f"on {result['rows']:,} rows of {result['data']}"
        )
        _print_ranks(result["by_rank"])


def merge(
    run: Annotated[Path, typer.Argument(help="A run folder, or an adapter folder together with --model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write; it must be empty.")],
    rank: Annotated[
        int | None, typer.Option("--rank", help="Of a method that has ranks; the highest by default.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="fp32, bf16 or fp16; that of the base when left out.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The base, if not as the run says.")] = None,
    original: Annotated[
        bool, typer.Option("--original", help="Into the base as it was before it was quantized to NF4.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write an adapter into its base: a model folder of transformers, read again and compared."""
    from graft.merge import merge_run, merged_lines

    with run_bar(as_json) as bar:
        result = merge_run(run, output, rank=rank, dtype=dtype, model=model, original=original, watch=bar)
    typer.echo(json.dumps(result, indent=2) if as_json else "\n".join(merged_lines(result)))


def runs(
    folder: Annotated[Path, typer.Argument(help="Where the runs are.")] = Path("runs"), as_json: Json = False
) -> None:
    """List the runs below a folder, with their state and result."""
    from graft.runfolder import list_runs

    found = list_runs(folder)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    if not found:
        typer.echo(f"no runs below {folder}")
        return
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("run", "method", "data", "state", "quality"):
        table.add_column(name, justify="right" if name == "quality" else "left", overflow="fold")
    for row in found:
        quality = f"{row['quality']:.1%}" if row["quality"] is not None else ""
        table.add_row(row["run"], row["method"], row["data"], row["state"], quality)
    terminal().print(table)


def _demo_recipe() -> str:
    here = Path(__file__).resolve()
    for folder in (here.parents[1] / "recipes", here.parents[3] / "recipes"):  # installed, and in a checkout
        if (folder / "demo.yaml").is_file():
            return str(folder / "demo.yaml")
    raise RecipeError("recipes/demo.yaml is not part of this installation", "install graft-tuning again")


def _run_line(report: dict[str, Any]) -> str:
    interval = f"{report['quality']:.1%} ({report['quality_low']:.1%} to {report['quality_high']:.1%})"
    if report["train_seconds"] is None:
        return f"the untouched base: {report['metric']} {interval}" + (
            " by nearest centroid" if report["metric"] == "accuracy" else ""
        )
    return (
        f"{report['method']}: {report['metric']} {interval} on the test rows, "
        f"{report['trainable_parameters']:,} parameters, {report['train_seconds']:.0f} s of training, "
        f"{report['peak_memory_bytes'] / 2**20:,.0f} MiB at the peak"
    )


def _print_ranks(by_rank: dict[str, float]) -> None:
    """The quality at each rank, for methods that serve several from one training."""
    if not by_rank:
        return
    from rich.table import Table

    table = Table(box=None, header_style="bold", show_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("quality", justify="right")
    for rank, quality in by_rank.items():
        table.add_row(rank, f"{quality:.1%}")
    terminal().print(table)
