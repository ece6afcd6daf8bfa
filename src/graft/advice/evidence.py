"""What finished comparisons say of a model: which of the methods that were measured are best, and which are tied."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.errors import GraftError
from graft.methods.base import Method, read_method
from graft.planning.catalogue import find


@dataclass(frozen=True)
class Measured:
    """One method of a comparison."""

    label: str
    method: Method
    quality: float
    low: float
    high: float
    """Share of right answers and its 95 % interval, 0 to 1."""
    memory: int | None
    """Peak bytes of the training process."""
    seconds: float | None
    """Of training, a mean over seeds."""
    latency: float | None
    """Milliseconds, merged where the method merges, else attached."""


@dataclass(frozen=True)
class Evidence:
    """A finished comparison on the same model and with the same kind of objective."""

    file: str
    rows: int
    """Training rows."""
    test: int
    seeds: int
    metric: str
    created: str
    quantization: str | None
    """Of the base that was measured."""
    methods: tuple[Measured, ...]
    verdicts: tuple[Mapping[str, Any], ...]
    """As in comparison.json: `first`, `second`, `outcome`, `difference`, `low`, `high`, `p`."""

    @property
    def words(self) -> str:
        """Where it stands and how much it rests on."""
        seeds = "1 seed, so of these trained models only" if self.seeds == 1 else f"{self.seeds} seeds"
        return f"{self.file} ({self.rows:,} training and {self.test:,} test rows, {seeds})"

    def verdict(self, first: str, second: str) -> tuple[str, float, float, float] | None:
        """Outcome, difference of quality and its interval, `first` minus `second`; None where it is not there."""
        for one in self.verdicts:
            if (one["first"], one["second"]) == (first, second):
                return one["outcome"], one["difference"], one["low"], one["high"]
            if (one["first"], one["second"]) == (second, first):
                turned = {"better": "worse", "worse": "better"}.get(one["outcome"], one["outcome"])
                return turned, -one["difference"], -one["high"], -one["low"]
        return None

    def tied(self, best: Measured, among: list[Measured]) -> list[Measured]:
        """`best` and what shows no clear difference from it, the highest quality first."""
        found = [other for other in among if other is best or self._is_tie(best, other)]
        return sorted(found, key=lambda one: -one.quality)

    def _is_tie(self, best: Measured, other: Measured) -> bool:
        verdict = self.verdict(best.label, other.label)
        return verdict is not None and verdict[0] == "tie"


def gather(runs: Path, model: str, objective: str) -> tuple[list[Evidence], list[str]]:
    """The comparisons below a folder for a model (by name, or by the fingerprint that it has in one of them) and a kind
    of objective: the most seeds first, then the most test rows. With them a line for each file that cannot be read.
    """
    notes: list[str] = []
    read = []
    for file in sorted(runs.rglob("comparison.json")):
        try:
            given = json.loads(file.read_text(encoding="utf-8"))
            read.append((_parse(file, given), given["model"], given["objective"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, GraftError) as error:
            said = (str(error).splitlines() or [""])[0][:80]
            notes.append(f"{file} is left out: it cannot be read as a comparison ({type(error).__name__}: {said})")
    prints = {told.get("fingerprint") for _, told, _ in read if _same(told["name"], model)} - {None, ""}
    found = [
        one
        for one, told, kind in read
        if kind == objective and one.methods and (_same(told["name"], model) or told.get("fingerprint") in prints)
    ]
    return sorted(found, key=lambda one: (one.seeds, one.test, one.created), reverse=True), notes


def _same(name: str, other: str) -> bool:
    known, wanted = find(name), find(other)
    return name == other or (known is not None and known == wanted)


def _parse(file: Path, given: Mapping[str, Any]) -> Evidence:
    from graft.compare import labels

    # `methods` of a stored recipe stand in the order of the rows, which are labelled by them.
    methods = [read_method(one, str(file)) for one in given["recipe"]["methods"]]
    by_label = dict(zip(labels(methods), methods, strict=True))
    rows = [row for row in given["rows"] if row["status"] == "done" and row["label"] in by_label]
    return Evidence(
        str(file), given["data"]["train"], given["data"]["test"], len(given["seeds"]), given["metric"],
        str(given["created"]), given["recipe"].get("quantization"),
        tuple(_measured(row, by_label[row["label"]]) for row in rows), tuple(given["verdicts"]),
    )  # fmt: skip


def _measured(row: Mapping[str, Any], method: Method) -> Measured:
    rate = row["learning_rate"]
    if rate is not None:
        method = method.model_copy(update={"learning_rate": rate})
    latency = row["merged_latency_ms"] if row["merged_latency_ms"] is not None else row["latency_ms"]
    memory = row["peak_memory_bytes"]
    return Measured(
        row["label"], method, row["quality"], row["quality_low"], row["quality_high"],
        None if memory is None else round(memory), row["train_seconds"], latency,
    )  # fmt: skip
