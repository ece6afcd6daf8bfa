"""The command line: each command is one call of a public function. Heavy modules are imported when a command runs."""

import io
import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from graft import __version__
from graft.cli import chat, data, doctor, export, hardware, look, plan, recommend, runs, serve
from graft.engine.runtime import prepare_environment
from graft.errors import NO_FILE, GraftError
from graft.limits import is_memory

app = typer.Typer(
    help="A fine-tuning workbench: compare methods on your own model and data, then train the one that wins.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(runs.demo)
app.command()(runs.compare)
app.command()(runs.train)
app.command(name="eval")(runs.evaluate)
app.command()(chat.chat)
app.command()(chat.generate)
app.command()(serve.serve)
app.command()(doctor.doctor)
app.command()(runs.merge)
app.command()(export.export)
app.command()(runs.runs)
app.command()(look.methods)
app.command()(plan.plan)
app.command()(recommend.recommend)
app.command()(hardware.hardware)
app.command()(look.schema)
app.add_typer(data.app, name="data")
app.add_typer(look.assets_app, name="assets")

_FINISHED = "; the same command starts again and repeats no finished trial"
_AGAIN = {
    "compare": _FINISHED,
    "demo": _FINISHED,
    "train": "; the same command goes on behind the last checkpoint, where there is one",
}
"""What an interrupted command says of being called again."""
# typer carries a copy of click, in earlier versions click itself: their common error is found through typer.
_ClickUsageError: type[Exception] = typer.BadParameter.__mro__[1]


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


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run a command; every error of Graft becomes one line and its exit code."""
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP, and nohup has it ignored
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    prepare_environment()
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
        code = _say(f"interrupted{_AGAIN.get(sys.argv[1] if len(sys.argv) > 1 else '', '')}", 130)
    except BrokenPipeError:
        code = 0
    except OSError as error:
        code = _say(f"{error.filename or 'the system'}: {error.strerror or error}", 2 if error.errno in NO_FILE else 3)
    except Exception as error:
        if os.environ.get("GRAFT_DEBUG"):
            raise
        if is_memory(error):
            code = _say("out of memory; use smaller batches, shorter rows or a smaller adapter", 3)
        else:
            code = _say(f"{type(error).__name__}: {error}; this is a fault of Graft, GRAFT_DEBUG=1 shows where", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _say(message: str, code: int) -> int:
    print(f"graft: {' '.join(message.split())}", file=sys.stderr)
    return code
