"""The command that says what went wrong in a run, or whether an installation works."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.shared import Json, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from graft.checkup import Check
    from graft.diagnosis.comparison import Trial
    from graft.diagnosis.curve import Curve, Finding

_COLOURS = {"serious": "red", "fail": "red", "warning": "yellow", "warn": "yellow", "note": "cyan", "ok": "green"}


def doctor(
    run: Annotated[
        Path | None,
        typer.Argument(
            help="A run folder, a comparison's folder, or logs of transformers' Trainer; none: this machine."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what went wrong in a run, why, and what to change; without a run, whether this installation works.

    The exit code is 4 when something is serious.
    """
    if run is None:
        _installation(as_json)
        return
    from graft.diagnosis.comparison import is_comparison

    serious = _comparison(run, as_json) if is_comparison(run) else _one(run, as_json)
    if serious:
        raise typer.Exit(4)


def _read(path: Path) -> "Curve":
    """The curve in a folder or file, whoever wrote it."""
    from graft.diagnosis.comparison import base_beside
    from graft.diagnosis.runs import read_run
    from graft.diagnosis.trainer import find_logs, read_logs
    from graft.errors import UsageError

    if not path.exists():
        raise UsageError(f"{path}: no such run", "`graft runs` lists them")
    if (path / "status.json").is_file() or (path / "metrics.jsonl").is_file():
        return read_run(path, base_beside(path))
    logs = find_logs(path)
    if logs is None:
        raise UsageError(
            f"{path} is neither a run of Graft nor a log of transformers' Trainer",
            "give a folder with status.json, trainer_state.json or checkpoint-*, or a .jsonl of logged values",
        )
    return read_logs(logs)


def _one(path: Path, as_json: bool) -> bool:
    from graft.diagnosis.diagnose import diagnose

    curve = _read(path)
    found = diagnose(curve)
    if as_json:
        typer.echo(_as_json(_told(path.name, curve, found)))
    else:
        screen = terminal()
        _print_run(screen, str(path), curve, found)
        _print_again(screen, path, curve, found)
    return any(finding.level == "serious" for finding in found)


def _comparison(path: Path, as_json: bool) -> bool:
    from graft.diagnosis.comparison import read_comparison, unstable
    from graft.diagnosis.diagnose import diagnose

    trials = read_comparison(path)
    found = {trial.name: diagnose(trial.curve) if trial.curve is not None else [] for trial in trials}
    beside = unstable(trials)
    broken = [trial for trial in trials if trial.curve is None]
    if as_json:
        told = [_told(trial.name, trial.curve, found[trial.name], trial.fault) for trial in trials]
        typer.echo(_as_json({"trials": told, "findings": [asdict(one) for one in beside]}))
    else:
        _print_comparison(path, trials, found, beside)
    return bool(broken) or any(one.level == "serious" for findings in (*found.values(), beside) for one in findings)


def _told(name: str, curve: "Curve | None", found: "list[Finding]", fault: str = "") -> dict[str, Any]:
    if curve is None:
        return {"run": name, "state": "damaged", "fault": fault, "findings": []}
    findings = [asdict(finding) for finding in found]
    return {"run": name, "source": curve.source, "state": curve.facts.state, "steps": curve.last, "findings": findings}


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _print_run(screen: "Console", name: str, curve: "Curve", found: "list[Finding]") -> None:
    from rich.text import Text

    facts = curve.facts
    about = [facts.method, facts.objective, facts.state]
    steps = f"{curve.last:,} steps" + (f" of {facts.total:,}" if facts.total and facts.total != curve.last else "")
    seen = f"{len(curve.evaluations)} evaluations"
    screen.print(Text(f"{name}: " + ", ".join([*(word for word in about if word), steps, seen])))
    for finding in found:
        screen.print()
        _print_finding(screen, curve, finding)
    if not found:
        screen.print(Text("nothing stands out in its figures"))


def _print_finding(screen: "Console", curve: "Curve", finding: "Finding") -> None:
    from rich.padding import Padding
    from rich.text import Text

    from graft.diagnosis.advice import diff

    head = Text(f"{finding.level}: ", style=_COLOURS[finding.level])
    screen.print(head.append(Text(finding.name, style="bold")).append(Text(f" ({finding.sure})", style="")))

    def line(text: str, indent: int = 2, style: str = "") -> None:
        screen.print(Padding(Text(_plain(text), style=style), (0, 0, 0, indent)))

    line(finding.evidence)
    for rank, cause in enumerate(finding.causes, 1):
        line(f"{'cause' if rank == 1 else 'or'}: {cause}")
    for text in diff(curve.facts.recipe, finding.changes):
        line(text, 4, "red" if text.startswith("-") else "green")


def _print_again(screen: "Console", path: Path, curve: "Curve", found: "list[Finding]") -> None:
    """The command that trains the run again with all changes, where it is one of Graft."""
    from rich.text import Text

    from graft.diagnosis.advice import assignments

    changes = assignments([finding for finding in found if finding.level != "note"])
    if changes and curve.facts.recipe:
        again = ["graft", "train", str(path / "recipe.yaml"), *changes, "-o", f"{path}-again"]
        screen.print()
        screen.print(Text(shlex.join(again)), soft_wrap=True)


def _print_comparison(
    path: Path, trials: "list[Trial]", found: "dict[str, list[Finding]]", beside: "list[Finding]"
) -> None:
    from rich.text import Text

    screen = terminal()
    quiet = [trial.name for trial in trials if trial.curve is not None and not found[trial.name]]
    for trial in trials:
        if trial.curve is None:
            screen.print(Text(_plain(f"{trial.name}: {trial.fault}"), style="red"))
            screen.print()
        elif found[trial.name]:
            _print_run(screen, trial.name, trial.curve, found[trial.name])
            screen.print()
    for finding in beside:
        _print_finding(screen, next(trial.curve for trial in trials if trial.curve is not None), finding)
        screen.print()
    screen.print(Text(f"{path}: nothing stands out in {len(quiet)} of {len(trials)} trials"))


def _installation(as_json: bool) -> None:
    from graft.checkup import check_installation

    checks = check_installation()
    if as_json:
        typer.echo(_as_json([asdict(check) for check in checks]))
    else:
        _print_checks(checks)
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(4)


def _print_checks(checks: "list[Check]") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name in ("state", "name", "found"):
        table.add_column(name, no_wrap=name != "found", overflow="fold")
    for check in checks:
        told = check.found + (f"; {check.remedy}" if check.remedy else "")
        table.add_row(Text(check.state, style=_COLOURS[check.state]), check.name, Text(_plain(told)))
    terminal().print(table)


def _plain(text: str) -> str:
    """On one line, without control characters, which could drive a terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
