"""How long a user waits: for `graft --help`, and from the command line to the end of the first optimizer step."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.speed import work as works
from benchmarks.speed.drive import LIMIT, ROOT, Drive, environment
from benchmarks.speed.work import CHAT_MODEL, ENCODER, Work

_HELPS = 10
_ROWS = 200
_TASK = ("family_relationships",)
"""A starter task whose rows have 67 to 96 tokens."""
_LOOK = 0.002
"""Seconds between two looks at Graft's file of steps."""


def measure(drive: Drive, plan: Callable[[int], None]) -> dict[str, Any]:
    """Seconds of each start, all of them, by what is started and who starts."""
    works_of = {
        "chat": Work("chat", CHAT_MODEL, 8, 2e-3, 1024),
        "labels": Work("labels", ENCODER, 8, 4e-3, 512),
    }
    sides = [side for side in ("graft", "trainer") if drive.only is None or side in drive.only]
    plan(_HELPS + len(works_of) * drive.rounds * len(sides))
    helps = []
    for _ in range(_HELPS):
        drive.tell("start: graft --help")
        helps.append(_seconds([sys.executable, "-m", "graft", "--help"], drive.threads))
        drive.tell(None)
    found: dict[str, Any] = {"help": helps}
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as place:
        for kind, work in works_of.items():
            folder = Path(place) / kind
            works.write(work, folder, _rows(work), held=0)
            recipe = work.recipe(folder, 1, drive.graft)
            (folder / "recipe.yaml").write_text(recipe.to_yaml(), "utf-8")
            times: dict[str, list[Any]] = {side: [] for side in sides}
            for number in range(drive.rounds):
                for side in sides if number % 2 else reversed(sides):
                    drive.tell(f"start: {side}, {work.model}, round {number + 1}")
                    begin = _graft if side == "graft" else _trainer
                    times[side].append(begin(work, folder, number, drive.threads))
                    drive.tell(None)
            found[work.model] = times
    return {"times": found, "times_of": "process start to the end of the first optimizer step"}


def _rows(work: Work) -> dict[str, list[dict[str, Any]]]:
    """Rows of like length, so that it does not matter which ones a side takes first."""
    if work.kind == "labels":
        return works.rows_for(work, _ROWS, 2)
    return {
        "train": works.chat_rows("train", _ROWS, _TASK),
        "validation": works.chat_rows("validation", 2, _TASK),
        "test": works.chat_rows("test", 2, _TASK),
    }


def _seconds(command: list[str], threads: int | None) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=environment(threads), cwd=ROOT, check=True, capture_output=True, timeout=LIMIT)
    return time.perf_counter() - started


def _graft(work: Work, folder: Path, number: int, threads: int | None) -> float | str:
    """`graft train`, until its first line of metrics is written; it is ended then."""
    run = folder / f"run{number}"
    command = [sys.executable, "-m", "graft", "train", str(folder / "recipe.yaml"), "-o", str(run), "--quiet"]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment(threads), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and time.perf_counter() - started < LIMIT:
            file = run / "metrics.jsonl"
            if file.exists() and file.stat().st_size:
                return time.perf_counter() - started
            time.sleep(_LOOK)
        return f"ended with {process.poll()} before its first step"
    finally:
        process.kill()
        process.wait()


def _trainer(work: Work, folder: Path, number: int, threads: int | None) -> float | str:
    """The least script with peft and Trainer, to its end, which is right behind the first step."""
    from graft.model import locate

    script = str(ROOT / "benchmarks" / "speed" / "first_step.py")
    command = [sys.executable, script, locate(work.model), str(folder / "train.jsonl"), work.kind]
    try:
        return _seconds(command, threads)
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", b"") or b"").decode(errors="replace").strip().splitlines()
        return (said or [str(error)])[-1][:300]
