"""Graft beside peft with Trainer and beside trl, on this machine: docs/results/benchmarks.json and docs/benchmarks.md.

python -m benchmarks.speed                      # everything, about 40 minutes on two cores
python -m benchmarks.speed instruct --rounds 3 --rows 96
python -m benchmarks.speed instruct --only graft --graft training.packing=false --out /tmp/without.json
python -m benchmarks.speed --page               # the page alone, from the stored figures
"""

import argparse
import importlib.metadata
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.speed import sections
from benchmarks.speed.drive import ROOT, Drive, json_of, variables

STORED = ROOT / "docs" / "results" / "benchmarks.json"
PAGE = ROOT / "docs" / "benchmarks.md"
SECTIONS = ("instruct", "classify", "methods", "compare", "start")
_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers")


def versions() -> dict[str, str | None]:
    """The installed packages that were measured."""
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def changed() -> bool | None:
    """Whether the source differs from its commit; None where that is not known."""
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--", "src", "benchmarks"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return bool(run.stdout.strip())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all when left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="training rows, where the section's own number is not wanted")
    parser.add_argument("--threads", type=int, help="threads of every side; all cores when left out")
    parser.add_argument("--only", type=lambda text: text.split(","), help="these sides, with commas")
    parser.add_argument("--graft", action="append", default=[], metavar="KEY=VALUE", help="goes over Graft's recipe")
    parser.add_argument("--extra", action="store_true", help="also sides that are known to be slow")
    parser.add_argument("--out", type=Path, default=STORED, help="where the figures go; the page beside the default")
    parser.add_argument("--page", action="store_true", help="write the page from stored figures and measure nothing")
    given = parser.parse_args()
    unknown = [name for name in given.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}: one of {', '.join(SECTIONS)}")
    given.sections = given.sections or list(SECTIONS)
    return given


def stored(path: Path) -> dict[str, Any]:
    """The figures of a file, or none."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"sections": {}}
    return found


def _ended(number: int, frame: FrameType | None) -> None:
    """Leave as after Ctrl-C, so that the running side ends too and no folder stays behind."""
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGTERM, _ended)
    given = _arguments()
    if not given.page:
        measure(given)
    if given.out == STORED:
        from benchmarks.speed.page import page

        PAGE.write_text(page(stored(STORED)), "utf-8")


def measure(given: argparse.Namespace) -> None:
    """Run the sections; each is merged into the file when it is over."""
    from graft.files import write_text
    from graft.measure import environment

    os.environ["HF_HUB_OFFLINE"] = "1"
    screen = Console(width=min(80, Console().width))
    command = "python -m benchmarks.speed " + shlex.join(sys.argv[1:])
    columns = [TextColumn("{task.description}"), BarColumn(10), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn()]  # fmt: skip
    for name in given.sections:
        with Progress(*columns, console=screen) as progress:
            bar = progress.add_task(name, total=None)

            def tell(text: str | None, progress: Progress = progress, bar: Any = bar) -> None:
                if text is None:
                    progress.advance(bar)
                else:
                    progress.update(bar, description=text[-40:])

            drive = Drive(given, tell)
            machine = json_of(["-m", "benchmarks.speed.machine"], given.threads)
            started = time.perf_counter()
            found = run_section(name, drive, given, lambda total, bar=bar: progress.update(bar, total=total))
        told = {
            "command": command.strip(), "created": time.strftime("%Y-%m-%d"), "rounds": given.rounds,
            "seconds": round(time.perf_counter() - started), "machine": machine,
            "environment": environment() | {"threads": machine.get("threads")}, "versions": versions(),
            "graft": given.graft, "variables": variables(), "changed": changed(),
        }  # fmt: skip
        kept = stored(given.out)
        kept["sections"][name] = {**told, **found}
        write_text(given.out, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")  # in the order of the tables
        from benchmarks.speed.page import tables

        for table in tables(name, kept["sections"][name]):
            screen.print(table)


def run_section(name: str, drive: Drive, given: argparse.Namespace, plan: Callable[[int], None]) -> dict[str, Any]:
    """The figures of one section."""
    if name == "start":
        from benchmarks.speed import start

        return start.measure(drive, plan)
    if name == "compare":
        from benchmarks.speed import comparison

        return comparison.measure(drive, plan, given.rows)
    groups = getattr(sections, name)(given.rows)
    if name == "methods":
        return {"groups": _methods(groups, drive, plan)}
    plan(sum(drive.processes(group) for group in groups))
    return {"groups": {group.name: drive.run(group) for group in groups}}


def _methods(groups: list[sections.Group], drive: Drive, plan: Callable[[int], None]) -> dict[str, Any]:
    """One round of each method; the peer's way is chosen by the first of each model and then kept."""
    way: dict[str, tuple[str, ...]] = {}
    tried = {group.work.model: drive.processes(group, 1) for group in reversed(groups)}
    plan(sum(tried.values()) + len(drive.sides(groups[0])) * (len(groups) - len(tried)))
    found = {}
    for group in groups:
        model = group.work.model
        kept = [side if side is sections.GRAFT else replace(side, variants=way.get(model, side.variants))
                for side in group.sides]  # fmt: skip
        found[group.name] = drive.run(replace(group, sides=tuple(kept)), 1)
        peers = [told for name, told in found[group.name]["sides"].items() if not name.startswith("graft")]
        if peers:
            way[model] = (peers[0]["variant"],)
    return found


if __name__ == "__main__":
    main()
