"""Findings in what a run produced: how it ended, what it predicts, and what it cost."""

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

from graft.diagnosis.curve import Curve, Evaluation, Finding, setting

JUDGED = 50
"""Optimizer steps before a model is judged by what it answers: short trial runs are not."""
ENDED = 0.8
"""Share of answers that should end. Untuned SmolLM2-135M ends 83 %, every tuned one 100 %."""
LOST_ROWS = 0.01
"""Share of rows that train nothing, or are cut, that is told."""
FEW_TOKENS = 1.5
"""Supervised tokens of a row in the median below which only the end of turn is trained: an answer takes one more."""
FORGOT = {"points": 45.0, "nats": 0.75}
"""What a probe may lose. Of 23 methods on film reviews one loses more points in the mean of its seeds, of six on chats
one more nats."""
MEMORY = 1.5
"""Times its prediction that peak memory must be: in docs/plan.md what a process grew by was at most 1.27 times it."""
EVALUATING = 0.5
"""Share of a run's time that evaluation takes when it is most of it."""
WAITED = 20.0
"""Seconds of evaluation below which nobody waits for it: in a run of seconds its share follows the machine's load."""
SAME_ANSWERS = 20
"""Answers that must be there before all being equal says something."""


def ended_early(curve: Curve) -> Finding | None:
    """A run that failed, was stopped, or whose process is gone."""
    state, at = curve.facts.state, f"after step {curve.last}" if curve.last else "before its first step"
    if state == "failed":
        return Finding("failed", "serious", "certain", f"{at}: {curve.facts.cause or 'no cause was recorded'}")
    if state == "stopped":
        return Finding("stopped", "note", "certain", f"{at}: {curve.facts.cause or 'interrupted'}")
    if state == "lost":
        return Finding(
            "killed", "serious", "certain", f"{at} its process was gone, and it had not finished",
            ("the system ended it, which out of memory looks like", "the machine was restarted"),
            setting(curve.facts, "training.gradient_checkpointing", True),
        )  # fmt: skip
    return None


def unreadable_lines(curve: Curve) -> Finding | None:
    """Lines of the log that are not whole."""
    if not curve.unreadable:
        return None
    return Finding(
        "damaged log", "note", "certain",
        f"{curve.unreadable} lines of {curve.source} cannot be read and are left out",
        ("the process was ended while it wrote, or the disk was full",),
    )  # fmt: skip


def one_label(curve: Curve) -> Finding | None:
    """A classifier that gives every row the same label."""
    seen = [one for one in curve.evaluations if "most_predicted" in one.figures]
    if not seen or seen[-1].figures["most_predicted"] < 1.0 or curve.last < JUDGED:
        return None
    if seen[-1].figures.get("majority", 0.0) >= 1.0:
        return Finding(
            "one label", "serious", "certain", f"step {seen[-1].number}: all validation rows have the same label",
            ("a file that is sorted by label, of which a part was taken",),
        )  # fmt: skip
    always = [one.number for one in seen if one.figures["most_predicted"] >= 1.0]
    return Finding(
        "one label", "serious", "certain",
        f"step {seen[-1].number}: every validation row is given the same label, as in {len(always)} of {len(seen)} "
        f"evaluations; quality {_percent(seen[-1].quality)}",
        (
            "a learning rate at which it collapsed, or never left the start",
            "one label far more frequent than the others",
            "labels that do not depend on the texts",
        ),
    )  # fmt: skip


def no_gain(curve: Curve) -> Finding | None:
    """A result that is not above the untouched base's, or that of always giving the most frequent label."""
    report, base = curve.facts.report, curve.facts.base
    quality, low, high = (report.get(key) for key in ("quality", "quality_low", "quality_high"))
    if quality is None or low is None or curve.last < JUDGED:
        return None
    majority = (report.get("figures") or {}).get("majority")
    if majority is not None and low <= majority:
        return Finding(
            "no better than the majority", "serious" if quality <= majority else "warning", "certain",
            f"quality {quality:.1%} ({low:.1%} to {high:.1%}); the most frequent label alone gives {majority:.1%}",
            ("one label far more frequent than the others", "too few epochs or too low a rate", "labels of chance"),
        )  # fmt: skip
    before = base.get("quality")
    if before is not None and low <= before:
        words = "below" if high is not None and high < before else "not clearly above"
        return Finding(
            "no better than the base", "warning", "certain" if words == "below" else "likely",
            f"quality {quality:.1%} ({low:.1%} to {high:.1%}) is {words} the untouched base's {before:.1%}",
            ("too few rows or epochs, or a rate outside the method's range", "a task that the base already does"),
        )  # fmt: skip
    return None


def never_ends(curve: Curve) -> Finding | None:
    """Answers that do not end by themselves."""
    last: Evaluation | None = next((one for one in reversed(curve.evaluations) if "ended" in one.figures), None)
    shares = [(curve.facts.report.get("figures") or {}).get("ended"), None if last is None else last.figures["ended"]]
    share = next((share for share in shares if share is not None), None)
    if share is None or share >= ENDED or curve.last < JUDGED:
        return None
    policy = not curve.measured_by_loss
    at_first = next((step.watched["ended"] for step in curve.steps if "ended" in step.watched), 1.0) if policy else 1.0
    where = "of the test rows" if shares[0] is not None else f"at step {last.number}" if last is not None else ""
    return Finding(
        # A policy may be cut off on purpose, as it was from the first step on.
        "answers do not end", "note" if at_first < ENDED else "serious" if share < 0.05 else "warning", "likely",
        f"{share:.0%} of the answers {where} ended by themselves, the others at max_new_tokens"
        + (f"; {at_first:.0%} of those that the policy drew in the first step" if policy else ""),
        (
            *(["a reward that does not mind: objective.unended_penalty"] if policy else []),
            "the end of a turn is not trained: rows cut at their end, or a template without it",
            "max_new_tokens below the length of the answers",
            "too little training for the model to learn where answers end",
        ),
    )  # fmt: skip


def one_answer(curve: Curve) -> Finding | None:
    """A chat model that says the same whatever it is asked."""
    answers = [str(row.get("answer", "")).strip() for row in curve.facts.answers]
    wanted = {str(row.get("reference", "")).strip() for row in curve.facts.answers}
    if len(answers) < SAME_ANSWERS or len(set(answers)) > 1 or len(wanted) == 1 or curve.last < JUDGED:
        return None
    said = f"{answers[0][:30]!r}" if answers[0] else "nothing"
    return Finding(
        "one answer", "serious", "certain",
        f"all {len(answers)} answers are the same ({said}), where {len(wanted)} different ones are right",
        ("a learning rate at which it collapsed", "one answer far more frequent than the others in the training rows"),
    )  # fmt: skip


def rows_lost(curve: Curve) -> Finding | None:
    """Training rows that were left out or cut."""
    told = [line for line in curve.facts.log if re.match(r"[\d,]+ of [\d,]+ (rows|texts)", line)]
    lines = [
        line for line in told if _share(line) > LOST_ROWS and re.search(r"0 trained tokens| cut to |skipped", line)
    ]
    weak = [
        line for line in curve.facts.log if "do not teach where an answer ends" in line and _share(line) > LOST_ROWS
    ]
    if not lines and not weak:
        return None
    worst = max(map(_share, lines + weak))
    longest = next((found for line in curve.facts.log if (found := re.search(r"longest ([\d,]+)\)", line))), None)
    changes = setting(curve.facts, "data.max_length", int(longest[1].replace(",", ""))) if longest and lines else {}
    return Finding(
        "rows lost", "warning" if worst > 0.05 else "note", "certain", "; ".join(lines + weak),
        ("max_length below the length of the rows", "rows without an answer"), changes,
    )  # fmt: skip


def few_tokens(curve: Curve) -> Finding | None:
    """Rows in which next to nothing is trained."""
    for line in curve.facts.log:
        found = re.match(r"[\d,]+ of [\d,]+ rows kept: [\d,]+ supervised tokens \(a row has ([\d,]+)", line)
        if found and int(found[1].replace(",", "")) < FEW_TOKENS:
            return Finding(
                "few trained tokens", "warning", "likely", line,
                ("answers that are empty, or that the template does not mark", "train_on: last where turns are many"),
            )  # fmt: skip
    return None


def forgetting(curve: Curve) -> Finding | None:
    """What was not trained, and got much worse than in the untouched base."""
    report, base = curve.facts.report, curve.facts.base
    unit = str(report.get("forgetting_unit", "points"))
    factor = -1.0 if unit == "nats" else 100.0
    before: Mapping[str, Any] = base.get("probes") or {}
    after: Mapping[str, Any] = report.get("probes") or {}
    lost = {name: factor * (before[name] - after[name]) for name in after if name in before}
    if not lost or max(lost.values()) <= FORGOT.get(unit, FORGOT["points"]):
        return None
    worst = max(lost, key=lambda name: lost[name])
    return Finding(
        "forgetting", "warning", "certain",
        f"{worst}, which was not trained, is worse by {lost[worst]:.3g} {unit} than in the untouched base "
        f"({before[worst]:.3g}, now {after[worst]:.3g})",
        ("a high learning rate, or many epochs", "a method that changes much: bottleneck and prompt forget less"),
    )  # fmt: skip


def memory_above(curve: Curve) -> Finding | None:
    """Peak memory far above what was predicted, or passes that had to be made smaller."""
    halved = [line for line in curve.facts.log if line.startswith("out of memory: passes of")]
    if halved:
        return Finding(
            "memory ran out", "note", "certain", halved[-1],
            ("a longer batch than the rehearsed one, or other processes",),
            setting(curve.facts, "training.gradient_checkpointing", True),
        )  # fmt: skip
    expected, peak = (curve.facts.report.get(key) for key in ("expected_memory_bytes", "peak_memory_bytes"))
    if not expected or not peak or peak <= MEMORY * expected:
        return None
    return Finding(
        "memory above plan", "note", "certain",
        f"{peak / 2**20:,.0f} MiB at the peak, {expected / 2**20:,.0f} MiB were expected",
        ("memory that the C library does not give back", "an operation that the plan does not know"),
    )  # fmt: skip


def slow_evaluation(curve: Curve) -> Finding | None:
    """Evaluation that takes more of the run than training does."""
    took = sum(one.seconds or 0.0 for one in curve.evaluations)
    trained = next((step.seconds for step in reversed(curve.steps) if step.seconds is not None), None)
    if took < WAITED or trained is None or took <= EVALUATING * (took + trained):
        return None
    per, total = took / len(curve.evaluations), curve.facts.total or curve.last
    every = max(1, int(total / max(1, int(trained / per / 4))))
    return Finding(
        "slow evaluation", "note", "certain",
        f"{len(curve.evaluations)} evaluations took {took:,.0f} s, training {trained:,.0f} s",
        ("evaluations too often", "more validation rows, or longer answers, than are needed"),
        setting(curve.facts, "training.eval_steps", min(every, total)) if len(curve.evaluations) > 1 else {},
    )  # fmt: skip


def not_compiled(curve: Curve) -> Finding | None:
    """Compiling that failed, so that steps take longer."""
    said = next((line for line in curve.facts.log if line.startswith("compiling failed")), None)
    if said is None:
        return None
    causes = ("a compiler or a headers package that is missing: `graft doctor` without a run looks",)
    return Finding("not compiled", "note", "certain", said, causes, setting(curve.facts, "engine.compile", False))


def _share(line: str) -> float:
    """The share that `a of b …` tells."""
    found = re.match(r"([\d,]+) of ([\d,]+)", line)
    if not found:
        return 0.0
    part, whole = (int(text.replace(",", "")) for text in found.groups())
    return part / whole if whole else 0.0


def _percent(value: float | None) -> str:
    return "unknown" if value is None or not isfinite(value) else f"{value:.1%}"
