"""Bad inputs as data, and what holds for each: one clear line, its exit code, nothing written."""

import hashlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from graft import cli


class Planted(NamedTuple):
    """A bad input: what is planted (by whom `command` is made), and what must be said of it."""

    fault: str
    """The number in the list of faults, such as C3."""
    name: str
    """What is planted, in a few words; no two are alike."""
    command: tuple[str, ...]
    """The words behind `graft`; {r} is the recipe, {f} the folder of the test, {m} its model, {o} the output."""
    says: tuple[str, ...]
    """What the one line must contain: the file, field or line."""
    code: int = 2
    """The exit code."""
    plant: Callable[[Path], None] | None = None
    """Puts the fault into the folder of the test."""


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder, with the sha256 of what is a file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def check(case: Planted, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, **places: str) -> str:
    """Plant a fault, run the command, and hold what is promised of every bad input; what was said."""
    if case.plant is not None:
        case.plant(folder)
    before = snapshot(folder)
    words = [word.format(r=folder / "r.yaml", f=folder, m=folder / "model", o=folder / "out") for word in case.command]
    monkeypatch.setattr(sys, "argv", ["graft", *words])
    monkeypatch.chdir(folder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("graft: ")]
    assert len(errors) == 1, err
    assert "Traceback" not in out + err
    assert "fault of Graft" not in err, err
    assert caught.value.code == case.code, err
    for part in case.says:
        assert part in errors[0], errors[0]
    assert snapshot(folder) == before, "something was written, changed or removed"
    return errors[0]
