"""Findings in how a run was set up and how it learned: rates, overfitting, too short a run, too few rows."""

from math import ceil, isfinite, sqrt

from graft.diagnosis.curve import Curve, Evaluation, Finding, mean, setting
from graft.diagnosis.rates import bearable, key_of

RISE = 1.3
"""Times its best that the evaluation loss must be in all later evaluations, two at least: of healthy runs with 504
validation rows single ones reach 1.33 times it."""
FELL = 0.9
"""Share of its earlier mean below which the training loss went on falling meanwhile."""
EARLY = 0.7
"""Share of the run after which a best step is not early."""
STILL = 0.2
"""Share by which the loss must fall in the last evaluation to be falling fast. A rate that falls to 0 gives some 1 to
10 % to a run that is done."""
GOOD = 0.98
"""A quality at which no more is to be had."""
FEW_STEPS = 20
"""Optimizer steps below which a run says little: at the default warm-up of 6 % it has hardly one step of it."""
FEW_ROWS = 30
"""Validation rows below which an accuracy is known to 18 points at best, so that choosing a step by it is chance."""


def rate_outside(curve: Curve) -> Finding | None:
    """A peak learning rate outside what the method bears on a base of this size."""
    known, peak, method = bearable(curve.facts), curve.facts.peak_rate, curve.facts.method
    if known is None or peak is None or known.low <= peak <= known.high * 1.000001:
        return None
    many = "" if curve.facts.parameters is None else f" on a base of {curve.facts.parameters / 1e6:,.0f} M parameters"
    return Finding(
        "learning rate", "warning", "likely",
        f"the learning rate is {peak:g} at its peak; {method}{many} bears {known.low:.2g} to {known.high:.2g}, its "
        f"default is {known.default:g}",
        ("a rate of another method or another size of base",), {key_of(curve.facts): known.default},
    )  # fmt: skip


def overfit(curve: Curve) -> Finding | None:
    """An evaluation loss that rises while the training loss falls."""
    seen = [one for one in curve.evaluations if one.loss is not None and isfinite(one.loss)]
    if len(seen) < 3 or not curve.measured_by_loss:
        return None
    best = min(seen, key=_loss)
    later = [one for one in seen if one.number > best.number]
    if best.number > EARLY * curve.last or len(later) < 2 or min(map(_loss, later)) <= RISE * _loss(best):
        return None
    before, after = _around(curve, best.number, later[-1].number)
    if not after < FELL * before:
        return None
    qualities = [one.quality for one in later if one.quality is not None]
    kept = curve.facts.keeps_best and curve.facts.kind == "graft"
    still = curve.facts.best_by == "quality" and best.quality is not None and max(qualities, default=0) > best.quality
    said = "" if best.quality is None or not qualities else f"; quality {best.quality:.1%}, then {qualities[-1]:.1%}"
    epochs = _epochs_until(curve, best.number)
    return Finding(
        "overfit", "note" if still else "warning", "likely",
        f"the evaluation loss is lowest at step {best.number} ({_loss(best):.3g}) and {_loss(later[-1]):.3g} at step "
        f"{later[-1].number}, while the training loss went from {before:.3g} to {after:.3g}{said}"
        + ("; the run ends with its best step" if kept else ""),
        ("too many passes over these rows", "too few rows, or copies among them", "more parameters than the rows bear"),
        ({} if epochs is None else setting(curve.facts, "training.num_train_epochs", epochs))
        | ({} if kept else setting(curve.facts, "training.load_best_model_at_end", True)),
    )  # fmt: skip


def underfit(curve: Curve) -> Finding | None:
    """An evaluation loss that was still falling fast when the run ended."""
    seen = [one for one in curve.evaluations if one.loss is not None and isfinite(one.loss)]
    if not curve.ended or len(seen) < 4 or curve.facts.few_on_purpose or not curve.measured_by_loss:
        return None
    last, before = seen[-1], seen[-2]
    if _loss(last) > (1 - STILL) * _loss(before) or _loss(last) > min(map(_loss, seen)):
        return None
    if last.quality is not None and before.quality is not None:
        step = sqrt(max(last.quality * (1 - last.quality), 1e-4) / (curve.facts.validation_rows or 50))
        if last.quality >= GOOD or last.quality < before.quality + step:
            return None
    epochs = curve.facts.epochs
    return Finding(
        "still learning", "note", "likely",
        f"the evaluation loss fell from {_loss(before):.3g} at step {before.number} to {_loss(last):.3g} at the last, "
        f"step {last.number}" + ("" if last.quality is None else f", with quality {last.quality:.1%}"),
        ("the run ended early: more epochs", "a learning rate that could be higher"),
        {} if epochs is None else setting(curve.facts, "training.num_train_epochs", 2 * epochs),
    )  # fmt: skip


def few_steps(curve: Curve) -> Finding | None:
    """A run with hardly any optimizer steps."""
    facts = curve.facts
    total = facts.total if facts.total is not None else curve.last if curve.ended else None
    if total is None or total >= FEW_STEPS or facts.few_on_purpose:
        return None
    changes: dict[str, object] = {}
    if facts.epochs is not None:
        changes = setting(facts, "training.num_train_epochs", float(ceil(facts.epochs * FEW_STEPS / max(1, total))))
    return Finding(
        "few steps", "note", "certain",
        f"{total} optimizer steps in all, {int(total * facts.warmup)} of them with a rising learning rate",
        ("few rows for the batch size", "too few epochs"), changes,
    )  # fmt: skip


def long_warmup(curve: Curve) -> Finding | None:
    """A warm-up that takes most of the run."""
    if curve.facts.warmup <= 0.5:
        return None
    return Finding(
        "long warm-up", "note", "certain", f"the learning rate rises for {curve.facts.warmup:.0%} of the steps",
        ("warmup_ratio is a share of the run, not a number of steps",),
        setting(curve.facts, "training.warmup_ratio", 0.06),
    )  # fmt: skip


def few_validation_rows(curve: Curve) -> Finding | None:
    """Validation rows too few to choose a step by."""
    rows = curve.facts.validation_rows
    if rows is None or rows >= FEW_ROWS or not curve.facts.keeps_best:
        return None
    half = 1.96 * sqrt(0.25 / rows)
    return Finding(
        "few validation rows", "note", "certain",
        f"{rows} validation rows: a quality of 50 % is known to ±{100 * half:.0f} points, so the best step is "
        "chosen by chance",
        ("a small validation file, or a small val_size",), {},
    )  # fmt: skip


def _loss(one: Evaluation) -> float:
    return float("inf") if one.loss is None else one.loss


def _around(curve: Curve, best: int, last: int) -> tuple[float, float]:
    """The mean training loss up to a step (of as many steps as follow it) and after it."""
    after = [step.loss for step in curve.steps if best < step.number <= last and isfinite(step.loss)]
    before = [step.loss for step in curve.steps if step.number <= best and isfinite(step.loss)][-max(1, len(after)) :]
    return mean(before), mean(after)


def _epochs_until(curve: Curve, step: int) -> float | None:
    """Epochs that end at a step, with a tenth more."""
    if curve.facts.epochs is None or not curve.last or curve.facts.few_on_purpose:
        return None
    return max(0.1, float(f"{curve.facts.epochs * step / (curve.facts.total or curve.last) * 1.1:.1f}"))
