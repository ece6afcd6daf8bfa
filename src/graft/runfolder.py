"""The run folder: the only thing that other commands read.

runs/NAME/  recipe.yaml   every setting        env.json       versions, hardware, hashes of data and model
            status.json   running, done, …     metrics.jsonl  one line per optimizer step
            log.txt       what was printed     checkpoints/   the best step, and where the run can go on
            adapter/      what was trained     report.json    the final figures
            correct.json  the score of each test row
            answers.jsonl what was generated for them       skipped.jsonl  rows that could not be read
            bad_batch.jsonl  rows of the steps that were left out, since their loss or gradient was no number
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from graft.config import read_yaml
from graft.errors import DamagedError, DataError, GraftError, RecipeError, ResourceError
from graft.files import unwritable, write_json, write_text

BAD_BATCH = "bad_batch.jsonl"
"""Rows of the steps that were left out."""
FILES = {
    "recipe.yaml", "env.json", "status.json", "metrics.jsonl", "log.txt", "checkpoints", "adapter", "report.json",
    "correct.json", "answers.jsonl", "skipped.jsonl", BAD_BATCH, ".lock",
}  # fmt: skip


_BEGUN = {"env.json", "metrics.jsonl", "log.txt", "skipped.jsonl", BAD_BATCH, "checkpoints"}
"""What a run that was ended early goes on with."""


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = 0.0

    @contextmanager
    def open(self, recipe: Mapping[str, Any], yaml: str) -> Iterator[bool]:
        """Hold the folder for one run; gives False when it holds this very run, finished.

        Of an unfinished start of the same run what it can go on with stays: see `clear`. Raises `RecipeError` when the
        folder holds another run or other files, `ResourceError` when another process is running there.
        """
        self.check(recipe)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise unwritable(self.path, error) from None
        with lock:
            self._lock(lock)
            self.check(recipe)
            if self.finished(recipe):
                yield False
                return
            self.clear(keep=_BEGUN)
            for unfinished in (self.path / "checkpoints").glob(".*"):  # its writer was killed
                shutil.rmtree(unfinished)
            write_text(self.path / "recipe.yaml", yaml)
            self.status("running", phase="starting", fraction=0.0)
            yield True

    def clear(self, keep: Collection[str] = ("recipe.yaml", "status.json")) -> None:
        """Remove what a run wrote, but for some files."""
        for name in FILES - {".lock", *keep}:
            # Beside a file stands what was left of it when its writer was killed: see graft.files.
            for old in [self.path / name, *self.path.glob(f".{name}.*")]:
                if old.is_dir():
                    shutil.rmtree(old)
                else:
                    old.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what `open` has written, and the folder when nothing else is in it."""
        self.clear(keep=())
        (self.path / ".lock").unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def _lock(self, lock: TextIO) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResourceError(
                f"{self.path}: another process is running there", "wait for it, or choose another folder"
            ) from None

    def check(self, recipe: Mapping[str, Any]) -> None:
        """Raise `RecipeError` when the folder holds anything but this run, finished or not."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RecipeError(f"{self.path} is a file, a run needs a folder")
        inside = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(".")}
        foreign = sorted(inside - FILES)
        if foreign:
            raise RecipeError(f"{self.path} holds other files ({foreign[0]})", "choose another folder with -o")
        stored = self.recipe()
        if stored is not None and stored != recipe:
            changed = ", ".join(differences(stored, recipe)[:3])
            raise RecipeError(f"{self.path} holds another run ({changed})", "choose another folder with -o")

    def check_data(self, sha256: Mapping[str, str]) -> None:
        """Raise `DataError` when the finished run was made from data files of other content."""
        before = self.read("env.json").get("data", {}).get("sha256", {})
        changed = [name for name, digest in sha256.items() if before.get(name) != digest]
        if changed:
            raise DataError(f"{changed[0]} has changed since {self.path}", "choose another folder with -o")

    def recipe(self) -> dict[str, Any] | None:
        """The recipe of the run in the folder."""
        path = self.path / "recipe.yaml"
        return read_yaml(path) if path.exists() else None

    def finished(self, recipe: Mapping[str, Any] | None = None) -> bool:
        """Whether the folder holds a finished run (of `recipe`)."""
        if self.read("status.json").get("state") != "done" or not (self.path / "report.json").exists():
            return False
        return recipe is None or self.recipe() == recipe

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty when it is not there."""
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            raise DamagedError(
                f"{self.path / name} cannot be read ({error})", "run it again in another folder"
            ) from None
        return value if isinstance(value, dict) else {}

    def status(self, state: str, **details: Any) -> None:
        """Write status.json; while running at most every 0.3 s, which a watching command reads."""
        now = time.monotonic()
        if state == "running" and now - self._last < 0.3:
            return
        self._last = now
        write_json(self.path / "status.json", {"state": state, "pid": os.getpid(), **details})

    def fail(self, error: BaseException) -> None:
        """Write how the run ended early."""
        stopped = isinstance(error, KeyboardInterrupt)
        cause = "interrupted" if stopped else error.message if isinstance(error, GraftError) else repr(error)
        self.status("stopped" if stopped else "failed", cause=cause)

    def points(self, step: int, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The lines of a log up to a step; those behind it, and one that was not written to its end, go."""
        path = self.path / name
        if not path.is_file():
            return []
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                point = json.loads(line)
                if point["step"] <= step:
                    kept.append(point)
            except (ValueError, KeyError, TypeError):
                continue
        write_text(path, "".join(json.dumps(point, ensure_ascii=False) + "\n" for point in kept))
        return kept

    def append(self, name: str, line: str) -> None:
        """Add a line to a log file."""
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def differences(left: Mapping[str, Any], right: Mapping[str, Any], at: str = "") -> list[str]:
    """Which settings differ, as `key: left, now right`."""
    found = []
    for key in [*left, *(key for key in right if key not in left)]:
        a, b = left.get(key), right.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{at}{key}.")
        elif a != b:
            found.append(f"{at}{key}: {a}, now {b}")
    return found


def find_run(path: str | Path) -> RunFolder:
    """The finished run in a folder; raises `RecipeError` when there is none."""
    run = RunFolder(Path(path))
    if not (run.path / "recipe.yaml").exists():
        raise RecipeError(f"{path} is not a run", "`graft runs` lists them")
    if not run.finished():
        state = run.read("status.json").get("state", "unknown")
        raise RecipeError(f"{path}: the run is not finished ({state})", "run it again to the end")
    return run


def list_runs(folder: Path) -> list[dict[str, Any]]:
    """Every run below a folder: its path, method, data, state and quality."""
    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder", "give the folder that holds the runs")
    found = []
    for recipe in sorted(folder.rglob("recipe.yaml")):
        row: dict[str, Any] = {"run": str(recipe.parent), "method": "", "data": "", "state": "", "quality": None}
        try:
            run = RunFolder(recipe.parent)
            status, settings = run.read("status.json"), run.recipe() or {}
            if not status:  # a comparison's own recipe
                continue
            method = settings.get("method") or {"name": "base"}
            row |= {"method": method["name"], "data": settings.get("data", {}).get("train", "")}
            row |= {"quality": run.read("report.json").get("quality"), "state": status["state"]}
        except GraftError:  # one damaged folder must not hide the others
            row["state"] = "damaged"
        found.append(row)
    return found
