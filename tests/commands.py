"""Commands run in this process, which saves the seconds that a new one needs to import torch."""

import signal
import sys
from typing import Any

import pytest

from graft import cli


def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["graft", *map(str, args)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    code = caught.value.code
    assert code is None or isinstance(code, int)
    return code or 0, *capsys.readouterr()
