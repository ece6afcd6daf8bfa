"""The commands on data: check, clean, split, convert, preview."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.shared import Json, run_bar, terminal
from graft.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from graft.curation.findings import Report
    from graft.curation.preview import Shown

app = typer.Typer(help="Check, clean, split, convert and preview data before it is trained on.")

Given = Annotated[str, typer.Argument(metavar="FILE", help="A data file, starter data, or task:NAME.")]
Columns = Annotated[
    list[str] | None, typer.Option("--column", help="A field's name in the file, as in text=sentence; repeatable.")
]
Format = Annotated[str | None, typer.Option("--format", help="The format, if it shall not be recognized.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Out = Annotated[
    Path, typer.Option("-o", "--output", help="The file to write: .jsonl, .csv or .tsv, with or without .gz.")
]

_MARKS = {"error": ("✗", "bold red"), "warning": ("!", "yellow"), "note": ("·", "dim")}


@app.callback(invoke_without_command=True)
def _data(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _columns(given: list[str] | None) -> dict[str, str]:
    columns = {}
    for assignment in given or []:
        name, separator, own = assignment.partition("=")
        if not separator or not name or not own:
            raise UsageError(f"--column {assignment!r} is not FIELD=NAME", "write it as in --column text=sentence")
        columns[name] = own
    return columns


@app.command()
def check(
    given: Given,
    test: Annotated[str | None, typer.Option("--test", help="A file whose rows shall not be in this one.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Count tokens with this model's tokenizer.")] = None,
    max_length: Annotated[int, typer.Option("--max-length", min=4, help="Tokens a row may have, with --model.")] = 1024,
    sample: Annotated[int | None, typer.Option("--sample", min=1, help="Read only this many rows.")] = None,
    column: Columns = None,
    format: Format = None,
    as_json: Json = False,
) -> None:
    """Report what would spoil training: faults, copies, contradictions, broken or private text; exit code 2 on errors.

    Nothing is changed.
    """
    from graft.curation.check import Options
    from graft.curation.check import check as check_data

    options = Options(_columns(column), format, model, max_length, test, sample)
    with run_bar(as_json) as bar:
        report = check_data(given, options, bar)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2, ensure_ascii=False))
    else:
        _print_report(report)
    if report.errors:
        raise typer.Exit(2)


def _print_report(report: "Report") -> None:
    from rich.table import Table

    screen = terminal()

    def say(line: str) -> None:
        screen.print(line, highlight=False, markup=False, emoji=False)

    say(f"{report.source}: {report.rows:,} rows, {report.why}")
    for lengths in report.lengths:
        say(f"{lengths.unit}: p50 {lengths.p50:,}, p95 {lengths.p95:,}, longest {lengths.longest:,}")
        most = max(count for _, count in lengths.histogram)
        for bound, count in lengths.histogram:
            say(f"  up to {bound:>9,}  {'█' * -(-30 * count // most):<30} {count:,}")
    if report.labels:
        told = [f"{label[:30]} {count:,}" for label, count in list(report.labels.items())[:8]]
        say("labels: " + ", ".join(told) + (f", and {len(report.labels) - 8} more" if len(report.labels) > 8 else ""))
    if report.roles:
        say(
            f"turns: {report.turns[0]} to {report.turns[1]}; "
            + ", ".join(f"{r} {n:,}" for r, n in report.roles.items())
        )
    if not report.findings:
        say("nothing found")
        return
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), show_edge=False)
    for name in ("", "finding", "rows", "share", "what it means"):
        table.add_column(name, justify="right" if name in ("rows", "share") else "left", overflow="fold")
    from rich.text import Text

    for finding in report.findings:
        mark, style = _MARKS[finding.severity]
        cells = (finding.name, f"{finding.count:,}", _share(finding.share), f"{finding.means}; {finding.advice}")
        table.add_row(Text(mark, style), *(Text(cell) for cell in cells))
    screen.print()
    screen.print(table)
    for finding in report.findings:
        if finding.examples:
            say("\n" + finding.name)
        for example in finding.examples:
            said = f"{_short(example.place, report.file)}  {example.snippet.replace(report.file + ':', 'line ')}"
            if screen.is_terminal:
                screen.print(f"  {said}", highlight=False, markup=False, emoji=False, no_wrap=True, overflow="ellipsis")
            else:
                typer.echo(f"  {said}")
    counts = ", ".join(
        f"{count} {severity}{'s' if count != 1 else ''}"
        for severity in _MARKS
        if (count := sum(finding.severity == severity for finding in report.findings))
    )
    say("\n" + counts)


def _share(share: float) -> str:
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def _short(place: str, source: str) -> str:
    """The line alone, where the place is in the file that the report is about."""
    line = place.removeprefix(f"{source}:")
    return f"line {line}" if line != place else place


@app.command()
def clean(
    given: Given,
    output: Out,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", help="A rule that shall drop nothing; repeatable.")
    ] = None,
    drop: Annotated[list[str] | None, typer.Option("--drop", help="A further rule that drops; repeatable.")] = None,
    pii: Annotated[str, typer.Option("--pii", help="Personal data: keep, mask or drop.")] = "keep",
    test: Annotated[str | None, typer.Option("--test", help="Drop the rows that this file has too.")] = None,
    column: Columns = None,
    format: Format = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Drop or repair the rows that `check` finds fault with; dropped rows go to OUTPUT.dropped.jsonl with the reason.

    Dropping by default: unreadable, empty, mojibake (what cannot be repaired), refusals, duplicates, near-duplicates,
    overlap (with --test). On demand: placeholders, conflicts, personal, special-tokens, cut, control, invisible,
    long-words.
    """
    from graft.curation.clean import clean as clean_data
    from graft.curation.clean import policy

    chosen = policy(keep or (), drop or (), pii=pii, test=test, columns=_columns(column), format=format)
    with run_bar(as_json) as bar:
        result = clean_data(given, output, chosen, force, bar)
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
        return
    typer.echo(f"{result.kept:,} of {result.rows:,} rows kept: {result.target}")
    for rule, count in result.dropped.items():
        typer.echo(f"  dropped {count:>9,}  {rule}")
    for what, count in (("repaired", result.repaired), ("masked", result.masked)):
        if count:
            typer.echo(f"  {what:<7} {count:>9,}")
    if result.personal:
        typer.echo(f"{result.personal:,} rows hold personal data; --pii mask replaces it, --pii drop drops them")
    if result.dropped_file:
        typer.echo(f"dropped rows: {result.dropped_file}")


@app.command()
def split(
    given: Given,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    val: Annotated[float, typer.Option("--val", help="Share of validation rows.")] = 0.05,
    test: Annotated[float, typer.Option("--test", help="Share of test rows.")] = 0.15,
    column: Columns = None,
    format: Format = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Divide rows into train, validation and test.jsonl, near-equal rows together, always in the same way."""
    from graft.curation.convert import split as split_data

    with run_bar(as_json) as bar:
        result = split_data(given, output, val, test, _columns(column), format, force, bar)
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
        return
    told = ", ".join(f"{name} {count:,}" for name, count in result.rows.items())
    typer.echo(f"{told} rows in {result.groups:,} groups of near-equal text: {result.folder}")


@app.command()
def convert(
    given: Given,
    output: Out,
    to: Annotated[str | None, typer.Option("--to", help="The format to write; messages for dialogues.")] = None,
    column: Columns = None,
    format: Format = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a file, or the rows of task:NAME, in another format; every faulty row is named."""
    from graft.curation.convert import convert as convert_data

    with run_bar(as_json) as bar:
        result = convert_data(given, output, to, _columns(column), format, force, bar)
    if as_json:
        typer.echo(json.dumps(asdict(result), indent=2))
        return
    for place, reason in result.faulty:
        typer.echo(f"{place}: {reason}", err=True)
    left = f", {len(result.faulty):,} faulty rows left out" if result.faulty else ""
    typer.echo(f"{result.rows:,} rows from {result.format} to {result.written}{left}: {result.target}")


@app.command()
def preview(
    given: Given,
    model: Annotated[str, typer.Option("--model", help="The model whose tokenizer is used.")],
    max_length: Annotated[int, typer.Option("--max-length", min=4, help="Tokens a row may have.")] = 1024,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows.")] = 3,
    train: Annotated[str, typer.Option("--train", help="What bears loss: assistant, last or all.")] = "assistant",
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", help="A template's name, file or text.")
    ] = None,
    column: Columns = None,
    format: Format = None,
    as_json: Json = False,
) -> None:
    """Show rows as the model sees them: trained tokens in green, control tokens dim; without colour in ⟦ ⟧ and ‹ ›."""
    from graft.curation.preview import preview as preview_data

    shown = preview_data(given, model, rows, max_length, train, chat_template, _columns(column), format)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in shown], indent=2, ensure_ascii=False))
        return
    from graft.curation.preview import marked

    screen = terminal()
    coloured = screen.is_terminal and not screen.no_color
    for row in shown:
        cut = f", {row.cut:,} cut" if row.cut else f", {row.further:,} in further pieces" if row.further else ""
        typer.echo(f"{row.place}: {row.trained:,} of {row.tokens:,} tokens trained{cut}")
        if row.lost:
            typer.echo(f"  {row.lost}")
        elif coloured:
            screen.print(_coloured(row), soft_wrap=True)
        else:
            typer.echo(marked(row))
        typer.echo("")


def _coloured(row: "Shown") -> "Text":
    """Each token in its colour; trained neighbours alternate in brightness, so that tokens can be told apart."""
    from rich.text import Text

    from graft.curation.preview import visible

    text = Text()
    for number, piece in enumerate(row.pieces):
        style = ("bold green" if number % 2 else "green") if piece.trained else ""
        text.append(visible(piece.text), f"{style} dim".strip() if piece.kind == "special" else style)
    return text
