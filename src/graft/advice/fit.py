"""The change that makes a choice fit, and what the next choices take beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graft.advice.case import Case, Watch, suits
from graft.advice.choice import Choice, Statement, as_json
from graft.advice.evidence import Evidence
from graft.advice.rules import MANY
from graft.errors import ResourceError, UsageError
from graft.methods.base import read_method
from graft.planning.plan import Plan

ALTERNATIVES = 2
"""Next choices that are planned beside the recommended one."""


@dataclass(frozen=True)
class Alternative:
    """A next choice, and what it takes beside the recommended one."""

    label: str
    peak: int | None
    run_seconds: float | None
    fits: bool | None
    words: str


def fitting(case: Case, choice: Choice, watch: Watch | None) -> tuple[Plan, list[str], list[Statement]]:
    """The plan of a choice, with the change that makes it fit."""
    settings = choice.settings
    plan = case.plan(settings, case.memory, watch)
    first = plan.estimates[0]
    if first.error is not None:
        raise UsageError(f"{first.label} cannot be used on {case.model}: {first.error}")
    changes: dict[str, str] = {}
    if first.fits is False:
        if first.change is None:
            least = first.changed_peak or first.peak
            raise ResourceError(
                f"nothing fits: {case.model} takes {size(least)} at least, {size(least - case.memory)} too much",
                "take a smaller model, or more memory (--memory, --device)",
            )
        changes = dict(part.split("=", 1) for part in first.change.split())
        if "method" in changes:  # the settings of another method are none of its own
            settings = [line for line in settings if not line.startswith("method.")]
            for setting in ("r", "lora_alpha", "target_modules", "learning_rate"):
                choice.told.pop(setting, None)
        settings = _replaced(settings, changes)
        plan = case.plan(settings, case.memory, watch)
        if plan.estimates[0].fits is not True:
            raise ResourceError(f"{first.change} was to make it fit, and does not", "give more memory (--memory)")
    estimate = plan.estimates[0]
    reason = (
        f"without it {size(first.peak)}, with {'this' if len(changes) < 2 else 'all changes'} {size(estimate.peak)}"
    )
    for name, value in changes.items():
        choice.say(name, value, f"makes it fit: {reason}", "planned", "graft plan")
    told = plan.settings
    for name, value in (("per_device_train_batch_size", told["micro_batch"]),
                        ("gradient_accumulation_steps", told["accumulation"]),
                        ("gradient_checkpointing", told["gradient_checkpointing"])):  # fmt: skip
        if name not in choice.told:
            choice.say(
                name, value, f"fits as it is: {size(estimate.peak)} of {size(case.memory)}", "planned", "graft plan"
            )
    return plan, settings, list(choice.told.values())


def _replaced(settings: Sequence[str], changes: Mapping[str, str]) -> list[str]:
    kept = [line for line in settings if line.partition("=")[0].rpartition(".")[2] not in changes]
    return kept + [f"{name}={value}" for name, value in changes.items()]


def alternatives(
    case: Case, settings: Sequence[str], plan: Plan, evidence: Sequence[Evidence], watch: Watch | None
) -> list[Alternative]:
    """The next choices, planned as they are, in passes of the same size."""
    chosen, seconds = plan.estimates[0], case.seconds(plan)
    found = []
    for label, others in _next(case, settings, plan)[:ALTERNATIVES]:
        try:
            planned = case.plan(others, None, watch)
        except UsageError as error:
            found.append(Alternative(label, None, None, None, str(error)))
            continue
        estimate, time = planned.estimates[0], case.seconds(planned)
        if estimate.error is not None:
            found.append(Alternative(label, None, None, None, estimate.error))
            continue
        fits = estimate.peak <= case.memory
        words = f"{size(estimate.peak)}, {_signed(estimate.peak - chosen.peak)} beside {size(chosen.peak)}"
        if time is not None and seconds:
            words += f"; {time / seconds:.2g} times its time"
        words += "" if fits else "; does not fit"
        words += _measured_gap(label, chosen.label, evidence)
        found.append(Alternative(label, estimate.peak, time, fits, words))
    return found


_OWN = ("method", "quantization")


def _next(case: Case, settings: Sequence[str], plan: Plan) -> list[tuple[str, list[str]]]:
    """Labels and settings of what else might be taken."""
    label, quantization = plan.estimates[0].label, plan.settings["quantization"]
    rest = [line for line in settings if line.partition("=")[0].split(".")[0] not in _OWN]
    bits = f"quantization={as_json(quantization)}"
    options: list[tuple[str, list[str]]] = []
    if (case.rows or 0) > MANY and label != "adalora":
        options.append(("adalora", ["method=adalora", bits, *rest]))
    if label != "lora":
        options.append(("lora", ["method=lora", "target_modules=[all-linear]", bits, *rest]))
    elif quantization is None:
        options.append(("lora on nf4", _replaced(settings, {"quantization": "nf4"})))
    else:
        options.append(("lora in 16 bits", _replaced(settings, {"quantization": "null"})))
    if label != "full" and suits(read_method("full"), case.goal):
        options.append(("full", ["method=full", "quantization=null", *rest]))
    elif label != "dora":
        options.append(("dora", ["method=dora", bits, *rest]))
    return options


def _measured_gap(label: str, chosen: str, evidence: Sequence[Evidence]) -> str:
    if not evidence:
        return ""
    verdict = evidence[0].verdict(label, chosen)
    if verdict is None:
        return ""
    outcome, difference, low, high = verdict
    said = "no clear difference in quality" if outcome == "tie" else f"measured {outcome}"
    return f"; {said} ({100 * difference:+.1f} points, {100 * low:.1f} to {100 * high:.1f})"


def size(count: int) -> str:
    """Bytes in GB or MB of 2**30 and 2**20."""
    return f"{count / 2**30:.1f} GB" if abs(count) >= 2**30 else f"{count / 2**20:.0f} MB"


def _signed(count: int) -> str:
    return f"{'+' if count >= 0 else '−'}{size(abs(count))}"
