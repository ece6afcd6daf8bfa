"""The guard of a run: the detectors of `graft doctor`, asked while the run trains."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from graft.diagnosis.advice import advice
from graft.diagnosis.broken import IN_A_ROW, not_finite
from graft.diagnosis.curve import Curve, Evaluation, Facts, Step
from graft.diagnosis.diagnose import STOPPING, WATCHING, diagnose
from graft.errors import GuardError

LONGEST_TEXT = 2_000
"""Characters of a row's text that are kept."""
CHECKS = 50
"""A run of n steps is looked at every n / 50 steps, at 20 at first: work for all of it grows by n log n, and what needs
stopping is seen with 2 % of the steps to spare."""
TOLD_NOTES = {"spike"}
"""Findings that are worth a line while a run trains, though they are notes of a finished one."""


@dataclass(frozen=True)
class Row:
    """A row of a batch, for a person to look at."""

    place: str
    """File and line."""
    text: str
    """Its tokens as text."""


@dataclass
class RunGuard:
    """Watches one run. It raises `GuardError` for what cannot become good, and says everything else once.

    The loop asks `may_step` before an optimizer step, and tells `after_step` and `after_evaluation`. A run that goes on
    after an interruption tells `resumed` first, with what it had logged. At the last of `facts.total` steps nothing is
    left to be stopped: what would have is said, and the run ends with its figures.
    """

    facts: Facts
    say: Callable[[str], None]
    bad_batch: Path | None = None
    """Where rows of batches that gave no numbers are written; nowhere when left out."""
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    skipped: int = 0
    """Optimizer steps that were left out in a row."""
    told: set[str] = field(default_factory=set)
    """Findings that were said."""

    @property
    def curve(self) -> Curve:
        """The run so far."""
        return Curve("this run", self.steps, self.evaluations, self.facts)

    def resumed(self, steps: Iterable[Step], evaluations: Iterable[Evaluation] = ()) -> None:
        """Take over what an interrupted run had logged; nothing of it is said or raised again."""
        self.steps, self.evaluations = list(steps), list(evaluations)
        self.skipped = 0
        for step in reversed(self.steps):
            if step.finite:
                break
            self.skipped += 1
        self.told = {finding.name for finding in diagnose(self.curve, (*STOPPING, *WATCHING))}

    def may_step(self, step: int, loss: float, norm: float, rows: Callable[[], Sequence[Row]]) -> bool:
        """Whether the optimizer may use this gradient. Where loss or norm is no number the step is left out, and its
        rows are written to `bad_batch`; the third time in a row `GuardError` is raised.
        """
        if isfinite(loss) and isfinite(norm):
            self.skipped = 0
            return True
        self.skipped += 1
        given = rows()
        if self.bad_batch is not None:
            write_rows(self.bad_batch, step, loss, norm, given)
        first = ", ".join(row.place for row in given[:3]) + (" …" if len(given) > 3 else "")
        if self.skipped >= IN_A_ROW:
            last = Step(step, loss, norm=norm)
            found = not_finite(Curve("this run", [*self.steps, last], self.evaluations, self.facts))
            assert found is not None
            kept = "" if self.bad_batch is None else f"; the rows are in {self.bad_batch}"
            raise GuardError(
                f"step {step}: {_what(loss, norm)}, for the {_nth(self.skipped)} time in a row; rows {first}",
                advice(found) + kept,
            )
        self.say(f"step {step}: {_what(loss, norm)}, so its {len(given)} rows are left out: {first}")
        return False

    def after_step(self, step: Step) -> None:
        """Note a step, also one that was left out. Raises `GuardError`."""
        self.steps.append(step)
        count = len(self.steps)
        if count <= IN_A_ROW * 2 or count % max(20, count // CHECKS) == 0 or step.loss == 0:
            self._look()

    def after_evaluation(self, seen: Evaluation) -> None:
        """Note an evaluation. Raises `GuardError`."""
        self.evaluations.append(seen)
        self._look()

    def _look(self) -> None:
        found = diagnose(self.curve, (*STOPPING, *WATCHING))
        if not all(step.finite for step in self.steps):
            # `may_step` tells of steps sooner, and with their rows.
            found = [finding for finding in found if finding.name != "not finite"]
        over = self.facts.total is not None and self.curve.last >= self.facts.total
        for finding in found:
            if finding.stops and not over:
                raise GuardError(finding.evidence, advice(finding))
            if (finding.level != "note" or finding.name in TOLD_NOTES) and finding.name not in self.told:
                self.told.add(finding.name)
                self.say("; ".join(filter(None, (f"{finding.name}: {finding.evidence}", advice(finding)))))


def write_rows(path: Path, step: int, loss: float, norm: float, rows: Sequence[Row]) -> None:
    """Add the rows of a batch to a file of JSON lines: step, loss, gradient norm, place and text of each."""
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            told = {"step": step, "loss": str(loss), "grad_norm": str(norm), "place": row.place}
            file.write(json.dumps(told | {"text": row.text[:LONGEST_TEXT]}, ensure_ascii=False) + "\n")


def rows_of(examples: Sequence[Any], tokenizer: Any) -> list[Row]:
    """The rows of a batch as text; without a tokenizer, as numbers. Of a pair both answers are written, of an answer
    that a policy drew what was drawn."""
    return [Row(one.place, _text(one, tokenizer)) for one in examples]


def _text(example: Any, tokenizer: Any) -> str:
    from graft.alignment.pairs import Pair
    from graft.objectives.classify import LabelledExample

    def read(ids: Sequence[int]) -> str:
        return " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(list(ids)))

    if isinstance(example, Pair):
        better, worse = (read(side.ids)[: LONGEST_TEXT // 2] for side in (example.chosen, example.rejected))
        return f"chosen: {better}\nrejected: {worse}"
    return read(example.input_ids if isinstance(example, LabelledExample) else example.ids)


def _what(loss: float, norm: float) -> str:
    return f"the loss is {loss}" if not isfinite(loss) else f"the gradient's norm is {norm}"


def _nth(count: int) -> str:
    return {2: "second", 3: "third"}.get(count, f"{count}th")
