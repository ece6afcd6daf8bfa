"""The commands that let a run speak: chat, in the terminal, and generate, for a file of prompts."""

import os
import signal
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.shared import run_bar, terminal
from graft.errors import GraftError, UsageError

if TYPE_CHECKING:
    from graft.chat import Chat
    from graft.prompts import Partial

Run = Annotated[str, typer.Argument(help="A run folder, an adapter folder together with --model, or a base.")]
Model = Annotated[str | None, typer.Option("--model", help="The base, if not as the run says.")]
System = Annotated[str, typer.Option("--system", help="The system turn that every dialogue begins with.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the best token, always.")]
TopP = Annotated[float, typer.Option("--top-p", help="The share of the probability that is drawn from.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer at most.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the draws; without effect at temperature 0.")]

_SIDE_BY_SIDE = 140
"""Columns from which two answers stand side by side."""
_HELP = "/reset begins anew   /system TEXT sets the system turn   /base compares with the base, or stops it   /quit"


def chat(
    run: Run,
    once: Annotated[str | None, typer.Option("--once", help="Answer this and leave.")] = None,
    show_base: Annotated[bool, typer.Option("--base", help="Show the untouched base's answer beside.")] = False,
    system: System = "",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 256,
    seed: Seed = 0,
    model: Model = None,
) -> None:
    """Talk to a run, or to a base. Prompts can also come from standard input, one per line."""
    from graft.chat import Chat, load_served
    from graft.sampling import Sampling

    sampling = Sampling(temperature, top_p, seed=seed)
    with run_bar(False) as bar:
        served = load_served(run, model, bar)
    if served.note:
        _note(served.note)
    if show_base:
        served.need_untouched()
    talk = Chat(served, sampling, max_new_tokens, system, show_base)
    if once is not None:
        _answer(talk, once)
        return
    for name in ("SIGTERM", "SIGHUP"):  # they end the program; Ctrl-C ends an answer
        with suppress(AttributeError, ValueError):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    _talk(talk)


def generate(
    run: Run,
    file: Annotated[
        Path, typer.Option("-f", "--file", help="Rows with prompt or messages, any dialogue format, or a .txt.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The JSONL file to write; printed when left out.")
    ] = None,
    show_base: Annotated[bool, typer.Option("--base", help="Add the untouched base's answers.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Give prompts as they are, without a chat template.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows that are answered at once.")] = 16,
    system: System = "",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = 256,
    seed: Seed = 0,
    model: Model = None,
) -> None:
    """Answer every prompt of a file: its rows in their order, with answer and ended added."""
    from graft.chat import load_served
    from graft.files import write_text
    from graft.prompts import Partial, answer_rows, line_of, read_prompts
    from graft.sampling import Sampling

    sampling = Sampling(temperature, top_p, seed=seed)
    if output is not None:
        _check_output(output)
    partial = None if output is None else Partial(output)
    rows = read_prompts(file)
    with run_bar(False) as bar, _told(partial, len(rows)):
        served = load_served(run, model, bar)
        answered = answer_rows(
            served, rows, untouched=show_base, plain=plain, system=system, batch_size=batch_size,
            max_new_tokens=max_new_tokens, sampling=sampling, watch=bar, keep=None if partial is None else partial.add,
        )  # fmt: skip
    if served.note and not plain:
        _note(served.note)
    lines = "".join(map(line_of, answered))
    if output is None or partial is None:
        typer.echo(lines, nl=False)
    else:
        write_text(output, lines)
        partial.remove()
    cut = sum(not row["ended"] for row in answered)
    if cut:
        _note(f"{cut:,} of {len(answered):,} answers were cut at the limit of --max-new-tokens {max_new_tokens}")


@contextmanager
def _told(partial: "Partial | None", rows: int) -> Iterator[None]:
    """Whatever stops the block: say where the answers are that were finished by then."""
    try:
        yield
    except BaseException as error:
        if partial is not None and partial.rows:
            count = f"{len(partial.rows):,} of {rows:,} rows"
            _note(f"{count} are answered in {partial.path}, in the order in which they were finished")
        elif partial is None and isinstance(error, KeyboardInterrupt):
            _note("no answer was kept; with -o FILE those that are finished are")
        raise


def _check_output(path: Path) -> None:
    """What would be found out after hours otherwise."""
    if path.exists():
        raise UsageError(f"{path} is there already", "remove it, or give another name with -o")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{path}: nothing can be written into {folder}", "choose another place")


def _talk(talk: "Chat") -> None:
    """The loop over prompts, until /quit or the end of the input."""
    terminal_input = sys.stdin.isatty()
    if terminal_input:
        with suppress(ImportError):
            import readline  # noqa: F401 - input() then edits lines
        _note(f"{talk.served.name}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    for line in _lines(terminal_input):
        if line == "/quit":
            return
        if line.startswith("/"):
            _command(talk, line)
            continue
        try:
            _answer(talk, line)
        except KeyboardInterrupt:
            if not terminal_input:
                raise
            print()
            _note("stopped")
        except GraftError as error:
            _note(str(error))


def _lines(terminal_input: bool) -> Iterator[str]:
    """What the user types, without empty lines."""
    while True:
        try:
            line = input("> ") if terminal_input else input()
        except EOFError:
            if terminal_input:
                print()
            return
        except KeyboardInterrupt:
            if not terminal_input:
                raise
            print()
            _note("Ctrl-D leaves")
            continue
        if line.strip():
            yield line.strip()


def _command(talk: "Chat", line: str) -> None:
    name, _, rest = line.partition(" ")
    if name == "/reset":
        talk.history = []
        _note("the dialogue begins anew")
    elif name == "/system":
        talk.system, talk.history = rest.strip(), []
        _note("the system turn is set, the dialogue begins anew" if talk.system else "there is no system turn now")
    elif name == "/base":
        try:
            talk.served.need_untouched()
        except GraftError as error:
            _note(str(error))
            return
        talk.compare = not talk.compare
        _note("the untouched base answers beside" if talk.compare else "the untouched base is silent")
    elif name == "/help":
        _note(_HELP)
    else:
        _note(f"no command {name}; {_HELP}")


def _answer(talk: "Chat", prompt: str) -> None:
    """Print the answer as it comes; the untouched base's follows, or stands beside where there is room."""
    screen = terminal()
    beside = talk.compare and screen.is_terminal and screen.width >= _SIDE_BY_SIDE
    own: list[str] = []
    theirs: list[str] = []
    if talk.compare and not beside:
        print(_title(talk.served.name))
    with closing(talk.ask(prompt)) as pieces:
        for row, piece in pieces:
            shown = _printable(piece)
            (theirs if row else own).append(shown)
            if row == 0 and not beside:
                print(shown, end="", flush=True)
    if beside:
        _two_columns(talk, "".join(own), "".join(theirs))
    else:
        print(flush=True)
    if talk.compare and not beside:
        print(f"{_title(f'{talk.served.base.name}, untouched')}\n{''.join(theirs)}", flush=True)
    if talk.dropped:
        _note(f"the dialogue exceeded the positions of the base: its {talk.dropped} oldest turns were left out")
    for cut, name in ((talk.cut, "the answer"), (talk.compare and talk.base_cut, "the untouched base's answer")):
        if cut:
            _note(f"{name} was cut: at --max-new-tokens {talk.max_new_tokens}, or where the positions end")


def _two_columns(talk: "Chat", own: str, theirs: str) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    table.add_column(Text(talk.served.name), ratio=1)
    table.add_column(Text(f"{talk.served.base.name}, untouched"), ratio=1)
    table.add_row(Text(own), Text(theirs))
    terminal().print(table)


def _title(text: str) -> str:
    return f"--- {text} ".ljust(78, "-")


def _printable(text: str) -> str:
    """Without control characters, which would drive the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
