"""Findings in loss and gradient: numbers that are none, zeros, spikes, divergence, no descent."""

from collections.abc import Sequence
from math import isfinite, isnan, sqrt
from statistics import pvariance

from graft.diagnosis.curve import Curve, Evaluation, Finding, Step, level_of, mean, setting, windows
from graft.diagnosis.rates import bearable, higher, lower, rate_words

IN_A_ROW = 3
"""Steps in a row that end a run when their loss is no number or exactly 0: one or two can be a bad batch."""
MEMORIZED = 1e-3
"""A loss that falls below this may underflow to exactly 0 in fp32 without any fault."""
SILENT_STEPS = 5
"""Steps in a row without any gradient that end a run: dropout or a rank of this step may silence one."""
NOTHING = 1e-12
"""A gradient norm that is none: in 136 real runs none was below 0.02 while the loss was above `MEMORIZED`."""
WIDTH = 20
"""Steps of a stretch whose median is the loss's level. In 136 real runs (23 methods, film reviews and chat) it rose to
2.2 times an earlier level at most, 1.1 times the first loss, and 0.88 times the first loss after it had been below
`SUNK`."""
SPIKE = 4.0
"""Times the level before it that a step's loss must be to be a spike."""
LOST = 0.5
"""Share of all that was learned that is lost when a spike is divergence: at small losses four times is little. In real
runs at most 0.3 was lost for `WIDTH` steps."""
ABOVE_START = 1.5
"""Times the first loss that a stretch must reach: real runs reach 2.5 times in single steps."""
SUNK = 0.75
"""Share of the first loss below which something was learned, so that returning to the first loss is a collapse."""
BACK = 0.95
"""Share of the first loss at which nothing that was learned is left."""
LEAST_STEPS = 100
"""Steps before a loss that has not fallen says something: LoRA on a classifier stays at chance for 20 to 30."""
CLIPPED = 30.0
"""Times the clipping norm that the median gradient must have. Full fine-tuning has 4 to 11, and learns."""
EXPLODED = 100.0
"""Times their earlier median that gradients must reach for `WIDTH` steps. Those of healthy runs reach 21 times."""


def not_finite(curve: Curve) -> Finding | None:
    """Loss or gradient that is no number, in training or in evaluation."""
    bad = [step for step in curve.steps if not step.finite]
    sick = [one for one in curve.evaluations if one.loss is not None and not isfinite(one.loss)]
    if not bad and not sick:
        return None
    stops = _longest_run([not step.finite for step in curve.steps]) >= IN_A_ROW
    evidence = _told_bad(curve, bad) if bad else f"step {sick[0].number}: the evaluation loss is {sick[0].loss}"
    grew = _grew(curve.steps, bad[0]) if bad else False
    causes = [rate_words(curve.facts), "rows that the bad batches hold (bad_batch.jsonl in the run folder has them)"]
    if len(bad) < IN_A_ROW and not grew:
        causes.reverse()
    if curve.facts.dtype in ("fp16", "float16"):
        causes.insert(0, "values beyond what fp16 holds; bf16 or fp32 hold them")
    return Finding(
        "not finite", "serious" if stops or sick else "warning", "certain", evidence, tuple(causes),
        lower(curve.facts), stops,
    )  # fmt: skip


def zero_loss(curve: Curve) -> Finding | None:
    """A loss of exactly 0, which did not get there by falling."""
    steps, count = curve.steps if curve.measured_by_loss else (), 0
    for index, step in enumerate(steps):
        count = count + 1 if step.loss == 0 and (step.norm is None or isfinite(step.norm)) else 0
        if count < IN_A_ROW:
            continue
        first = index - count + 1
        before = level_of([one.loss for one in steps[max(0, first - WIDTH) : first]])
        if not before <= MEMORIZED:
            start = "from the first step" if isnan(before) else f"{before:.3g} in the steps before"
            return Finding(
                "loss exactly 0", "serious", "certain",
                f"the loss is exactly 0 at steps {steps[first].number} to {step.number}, {start}",
                (
                    "no token or row bears loss: prompts that fill max_length, or a template that marks no answer",
                    "a loss that was no number and was replaced by 0, as transformers' Trainer does by default",
                    "an attention kernel that returns zeros",
                ),
                stops=True,
            )  # fmt: skip
    return None


def no_gradient(curve: Curve) -> Finding | None:
    """Gradients that are exactly zero while there is a loss."""
    silent = [step.norm is not None and abs(step.norm) < NOTHING and step.loss > MEMORIZED for step in curve.steps]
    if not any(silent) or _longest_run(silent) < min(SILENT_STEPS, len(silent)):
        return None
    where = [step.number for step, is_silent in zip(curve.steps, silent, strict=True) if is_silent]
    return Finding(
        "no gradient", "serious", "certain",
        f"the gradient's norm is 0 in {len(where)} of {len(silent)} steps, first at step {where[0]}, with a loss of "
        f"{curve.steps[-1].loss:.3g}",
        (
            "what trains is cut off from the loss: frozen, detached by activation checkpointing, or at unused sites",
            "every row's loss is the same whatever the model says, as with equal rewards",
        ),
        stops=len(silent) >= SILENT_STEPS,
    )  # fmt: skip


def exploding(curve: Curve) -> Finding | None:
    """Gradients that have grown far beyond those of the run's beginning and stay there."""
    norms = [step.norm for step in curve.steps if step.norm is not None and isfinite(step.norm)]
    if len(norms) < 2 * WIDTH:
        return None
    earlier, now = level_of(norms[:-WIDTH]), level_of(norms[-WIDTH:])
    if now <= EXPLODED * earlier or now <= EXPLODED * (curve.facts.clip or 1.0):
        return None
    return Finding(
        "gradients explode", "warning", "likely",
        f"the gradient's norm is {now:.3g} in the median of the last {WIDTH} steps, {earlier:.3g} before",
        (rate_words(curve.facts), "a few rows far longer or stranger than the rest"), lower(curve.facts),
    )  # fmt: skip


def clipped(curve: Curve) -> Finding | None:
    """Clipping that shortens nearly every step many times over, so that it decides the rate."""
    norms = [step.norm for step in curve.steps if step.norm is not None]
    clip = curve.facts.clip
    if clip is None or len(norms) < WIDTH or level_of(norms) <= CLIPPED * clip:
        return None
    share = sum(norm > clip for norm in norms) / len(norms)
    if share < 0.95:
        return None
    return Finding(
        "always clipped", "note", "certain",
        f"the gradient's norm is above max_grad_norm={clip:g} in {share:.0%} of the steps, "
        f"{level_of(norms):.3g} in the median",
        ("clipping decides the size of every step", rate_words(curve.facts)),
        setting(curve.facts, "training.max_grad_norm", float(f"{level_of(norms):.0e}")),
    )  # fmt: skip


def divergence(curve: Curve) -> Finding | None:
    """A loss that has risen and does not come back: far above its level, to its first value, or beyond it."""
    steps = curve.steps
    width = WIDTH if len(steps) >= 3 * WIDTH else WIDTH // 2
    if len(steps) < 2 * width or not curve.facts.best_by or not curve.measured_by_loss:
        return None
    start = level_of([step.loss for step in steps[:3]])
    levels = windows(steps[:-width], width)
    best = min((level for level in levels if not isnan(level)), default=start)
    last = [step.loss for step in steps[-width:] if isfinite(step.loss)]
    if not last:
        return None
    now, least = level_of(last), min(last)
    spiked = now > SPIKE * best and now - best > LOST * (start - best) and least > 2 * best and now > MEMORIZED
    beyond = max([now, *levels]) > ABOVE_START * start and now > BACK * start
    collapsed = best < SUNK * start and now > BACK * start and least > SUNK * start
    if not (spiked or beyond or collapsed):
        return None
    top = max((step for step in steps if isfinite(step.loss)), key=lambda step: step.loss)
    return Finding(
        "diverged", "serious", "certain" if beyond or spiked else "likely",
        f"the loss was {start:.3g} at first and {best:.3g} at its best, and is {now:.3g} in the last {width} points, "
        f"from step {steps[-width].number} to {steps[-1].number}, at most {top.loss:.3g} at step {top.number}",
        (rate_words(curve.facts), *_no_warmup(curve), "rows unlike the others, from where it began to rise"),
        lower(curve.facts) | ({} if curve.facts.warmup else setting(curve.facts, "training.warmup_ratio", 0.1)),
        stops=True,
    )  # fmt: skip


def spike(curve: Curve) -> Finding | None:
    """A step whose loss is far above everything before it, from which training came back."""
    steps = curve.steps if curve.measured_by_loss else ()
    start = level_of([step.loss for step in steps[:3]])
    for index in range(WIDTH, len(steps) - WIDTH):
        here = steps[index]
        before = level_of([step.loss for step in steps[index - WIDTH : index]])
        if here.loss > max(SPIKE * before, ABOVE_START * start) and isfinite(here.loss) and divergence(curve) is None:
            after = level_of([step.loss for step in steps[index + 1 : index + 1 + WIDTH]])
            return Finding(
                "spike", "note", "certain",
                f"step {here.number}: the loss is {here.loss:.3g}, {before:.3g} in the {WIDTH} steps before and "
                f"{after:.3g} after it",
                ("a batch with rows unlike the others", rate_words(curve.facts)),
            )  # fmt: skip
    return None


def no_descent(curve: Curve) -> Finding | None:
    """A loss that has not fallen since the first step. It stops a run only where the cause is in sight."""
    steps, facts = [step for step in curve.steps if isfinite(step.loss)], curve.facts
    if len(steps) < WIDTH or steps[-1].number - steps[0].number < LEAST_STEPS - 1 or not curve.measured_by_loss:
        return None
    if steps[-1].number < (facts.total or 0) / 4:  # a long run may fall slowly
        return None
    losses = [step.loss for step in steps]
    third = len(losses) // 3
    if not _flat(losses[:third], losses[-third:]) or not _flat(losses[: max(3, third // 3)], losses[-third:]):
        return None
    if losses[-1] < MEMORIZED or divergence(curve) is not None:
        return None
    known = bearable(facts)
    slow = known is not None and facts.peak_rate is not None and facts.peak_rate < known.low
    fast = known is not None and facts.peak_rate is not None and facts.peak_rate > known.high
    norms = [step.norm for step in steps[-third:] if step.norm is not None]
    faint = bool(norms) and level_of(norms) < 1e-6
    guessing = _guesses(curve, mean(losses[-third:]))
    causes = _descent_causes(curve, slow, fast, faint)
    half = facts.total is None or steps[-1].number >= facts.total / 2
    return Finding(
        "no descent", "serious" if guessing or slow or faint else "warning", "certain" if guessing else "likely",
        f"the loss has not fallen in {steps[-1].number} steps: {mean(losses[:third]):.4g} in the first third of them, "
        f"{mean(losses[-third:]):.4g} in the last" + (", no better than guessing" if guessing else ""),
        causes, (lower if fast else higher)(facts), stops=half and (guessing or slow or faint),
    )  # fmt: skip


def _descent_causes(curve: Curve, slow: bool, fast: bool, faint: bool) -> tuple[str, ...]:
    peak = "unknown" if curve.facts.peak_rate is None else f"{curve.facts.peak_rate:g} at its peak"
    told = [
        (slow or fast, rate_words(curve.facts)),
        (faint, "gradients near zero: what trains hardly reaches the loss"),
        (not (slow or fast), f"a learning rate too low for {curve.facts.method or 'what trains'} ({peak})"),
        (curve.facts.objective == "classify", "labels that do not depend on the texts"),
        (curve.facts.objective != "classify", "rows that the base already predicts as well as it can"),
    ]
    return tuple(words for holds, words in told if holds)


def _guesses(curve: Curve, loss: float) -> bool:
    """Whether a classifier is no better than always giving one label."""
    if curve.facts.objective != "classify" and curve.chance is None:
        return False
    seen: Evaluation | None = curve.evaluations[-1] if curve.evaluations else None
    if seen is not None and seen.quality is not None and seen.quality <= seen.figures.get("majority", 0.0) + 0.01:
        return True
    return curve.chance is not None and loss > 0.97 * curve.chance


def _flat(first: Sequence[float], last: Sequence[float]) -> bool:
    """Whether the mean has not fallen beyond 1 % and two standard errors."""
    error = sqrt(pvariance(first) / len(first) + pvariance(last) / len(last))
    return mean(first) - mean(last) < max(0.01 * abs(mean(first)), 2 * error)


def _longest_run(flags: Sequence[bool]) -> int:
    longest = run = 0
    for flag in flags:
        run = run + 1 if flag else 0
        longest = max(longest, run)
    return longest


def _told_bad(curve: Curve, bad: Sequence[Step]) -> str:
    first = bad[0]
    what = f"the loss is {first.loss}" if not isfinite(first.loss) else f"the gradient's norm is {first.norm}"
    good = [step for step in curve.steps if step.number < first.number and step.finite]
    said = f", {good[-1].loss:.3g} at step {good[-1].number} before it" if good else ""
    return f"step {first.number}: {what}{said}; {len(bad)} of {len(curve.steps)} steps are not finite"


def _grew(steps: Sequence[Step], bad: Step) -> bool:
    """Whether the gradient had grown tenfold in the five steps before a bad one."""
    norms = [step.norm for step in steps if step.number < bad.number and step.norm is not None and isfinite(step.norm)]
    return len(norms) >= 2 * SILENT_STEPS and level_of(norms[-SILENT_STEPS:]) > 10 * level_of(norms[:-SILENT_STEPS])


def _no_warmup(curve: Curve) -> tuple[str, ...]:
    return () if curve.facts.warmup else ("no warm-up",)
