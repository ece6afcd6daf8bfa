"""The commands that show what there is: methods, schema, assets."""

import json
from typing import Annotated

import typer

from graft.cli.shared import Json, as_cell, run_bar, terminal

assets_app = typer.Typer(help="Starter models and data, fetched from the package index.")


@assets_app.callback(invoke_without_command=True)
def _assets(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def methods(
    model: Annotated[str | None, typer.Option("--model", help="Count trainable parameters on this base.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods in the unified view: what each computes, sees and changes."""
    from graft.methods.table import method_rows

    rows = method_rows(model)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.table import Table

    screen = terminal()
    columns = [name for name in rows[0] if name != "method"]
    # Two tables under each other fit 80 columns; one beside the other needs twice as many.
    for block in [columns] if screen.width >= 150 else [columns[:3], columns[3:]]:
        table = Table(box=None, header_style="bold", show_edge=False, padding=(0, 2, 0, 0))
        for name in ("method", *block):
            table.add_column(name, justify="right" if name == "parameters" else "left", overflow="fold")
        for row in rows:
            table.add_row(row["method"], *(as_cell(row[name]) for name in block))
        screen.print(table)
        screen.print()
    screen.print("A method that merges can be made part of the base: the result runs wherever the base does.")


def schema() -> None:
    """Print the JSON schema of recipes."""
    from graft.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


@assets_app.command("list")
def assets_list(as_json: Json = False) -> None:
    """List the starter models and data."""
    from graft import assets

    rows = [
        {
            "name": a.name,
            "kind": a.kind,
            "licence": a.licence,
            "fetched": assets.is_pulled(a.name),
            "summary": a.summary,
        }
        for a in assets.ASSETS.values()
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(as_cell(value) for value in row.values()))
    terminal().print(table)
    typer.echo(f"\ncache: {assets.cache_dir()}")


@assets_app.command("pull")
def assets_pull(
    names: Annotated[list[str] | None, typer.Argument(help="Names; all when left out.")] = None,
) -> None:
    """Fetch starter models and data."""
    from graft import assets

    chosen = [assets.find(name).name for name in names or list(assets.ASSETS)]
    for name in chosen:
        with run_bar(False) as bar:
            folder = assets.pull(name, bar)
        typer.echo(f"{name}: {folder}")
