"""Running sides, each in a process of its own, and what is kept of them."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed import work as works
from benchmarks.speed.sections import Group, Side

ROOT = Path(__file__).parents[2]
_GIVEN = dict(os.environ)
"""The environment as it came: torch puts variables of its own there when it is loaded."""
LIMIT = 1800
"""Seconds after which a side is given up."""

Step = Callable[[str | None], None]
"""Called with what comes next, and with None when a process is over."""


def environment(threads: int | None) -> dict[str, str]:
    """The environment of every side, Graft's and the peers': that of this command, offline, and so many threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = str(threads or _GIVEN.get("OMP_NUM_THREADS") or cores)
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": count}
    return {**_GIVEN, **fixed, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def variables() -> dict[str, str]:
    """What of that environment changes how fast libraries compute, beside the number of threads."""
    told = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "MALLOC_", "TORCH", "GLIBC_TUNABLES", "LD_PRELOAD")
    return {key: value for key, value in sorted(_GIVEN.items()) if key.startswith(told)}


def json_of(command: Sequence[str], threads: int | None) -> dict[str, Any]:
    """The JSON on a command's last line; `error` with its last words where it fails."""
    try:
        run = subprocess.run(
            [sys.executable, *command], env=environment(threads), cwd=ROOT, capture_output=True, text=True,
            timeout=LIMIT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {LIMIT} s"}
    lines = [line for line in run.stdout.splitlines() if line.strip()]
    if run.returncode == 0 and lines:
        result: dict[str, Any] = json.loads(lines[-1])
        return result
    said = [line.strip() for line in run.stderr.splitlines() if line.strip()]
    last = next((line for line in reversed(said) if not line.startswith(("warnings.warn", "^"))), "")
    return {"error": (last or f"exit code {run.returncode}")[:300]}


class Drive:
    """The groups of a section, run side by side."""

    def __init__(self, given: Any, tell: Step) -> None:
        self.rounds: int = given.rounds
        self.threads: int | None = given.threads
        self.graft: list[str] = given.graft
        self.extra: bool = given.extra
        self.only: list[str] | None = given.only
        self.tell = tell

    def sides(self, group: Group) -> list[Side]:
        """The sides that are asked for."""
        wanted = [side for side in group.sides if self.only is None or side.name in self.only]
        return [side for side in wanted if self.extra or not side.extra or self.only is not None]

    def processes(self, group: Group, rounds: int | None = None) -> int:
        """Processes that a group takes."""
        count = self.rounds if rounds is None else rounds
        sides = self.sides(group)
        trials = sum(len(side.variants) for side in sides if len(side.variants) > 1)
        return trials + sum(1 if side.few else count for side in sides)

    def run(self, group: Group, rounds: int | None = None) -> dict[str, Any]:
        """Every round of a group: what each side measured, and which variants were taken."""
        with tempfile.TemporaryDirectory(prefix="graft-bench-") as place:
            rows = works.rows_for(group.work, group.rows, group.held)
            data = works.write(group.work, Path(place) / "whole", rows, group.held)
            few = {**rows, "train": rows["train"][: group.trial_rows]}
            works.write(group.work, Path(place) / "trial", few, held=0)
            sides = self.sides(group)
            taken, trials = self._choose(group, sides, Path(place) / "trial")
            count = self.rounds if rounds is None else rounds
            found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
            for number in range(1, count + 1):
                # Every other round backwards: what warms up or tires with time falls on all sides alike.
                for side in sides if number % 2 else reversed(sides):
                    if side.few and number > 1:
                        continue
                    self.tell(f"{group.name}: {side.name}, round {number}")
                    found[side.name].append(
                        self._side(Path(place) / ("trial" if side.few else "whole"), taken[side.name], number)
                    )
        about = {
            side.name: {"about": side.about, "variant": taken[side.name], "trials": trials.get(side.name, {}),
                        "few": side.few, "rounds": found[side.name]}
            for side in sides
        }  # fmt: skip
        settings = {"model": group.work.model, "method": group.work.method, "batch": group.work.batch,
                    "learning_rate": group.work.rate, "kind": group.work.kind, "held": group.held}  # fmt: skip
        return {"settings": settings, "data": data, "sides": about, "parameters": parameters(group.work.model)}

    def _side(self, folder: Path, variant: str, seed: int) -> dict[str, Any]:
        command = ["-m", "benchmarks.speed.side", str(folder), "--side", variant, "--seed", str(seed)]
        if variant.startswith("graft"):
            command += [word for setting in self.graft for word in ("--graft", setting)]
        return self.measured(command)

    def measured(self, command: Sequence[str]) -> dict[str, Any]:
        """The JSON on a command's last line, with this drive's threads."""
        found = json_of(command, self.threads)
        self.tell(None)
        return found

    def _choose(
        self, group: Group, sides: Sequence[Side], folder: Path
    ) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """The variant of each side: the fastest on the trial's rows where there are several."""
        taken: dict[str, str] = {}
        trials: dict[str, dict[str, Any]] = {}
        for side in sides:
            taken[side.name] = side.variants[0]
            if len(side.variants) == 1:
                continue
            told: dict[str, Any] = {}
            for variant in side.variants:
                self.tell(f"{group.name}: trial of {variant}")
                found = self._side(folder, variant, 1)
                told[variant] = found.get("seconds", found.get("error"))
            timed = {variant: value for variant, value in told.items() if isinstance(value, float)}
            if timed:
                taken[side.name] = min(timed, key=lambda variant: timed[variant])
            trials[side.name] = told
        return taken, trials


def parameters(model: str) -> dict[str, int]:
    """Parameters of a base: in all, in its layers' matrices, and in its output head (the embeddings, where tied)."""
    from graft.model import load_base

    base = load_base(model)
    head = base.model.get_output_embeddings()
    inner = [site for site in base.sites if site.linear and site.layer is not None and site.columns is None]
    return {
        "all": base.parameter_count(),
        "body": sum(site.d_in * site.d_out for site in inner),
        "head": head.weight.numel() if head is not None else 0,
    }
