"""What finished comparisons say of a case."""

from collections.abc import Sequence
from dataclasses import replace

from graft.advice.case import Case, suits
from graft.advice.choice import Choice
from graft.advice.evidence import Evidence, Measured


def candidates(one: Evidence, case: Case) -> list[Measured]:
    """The methods of a comparison that serve the goal."""
    return [row for row in one.methods if suits(row.method, case.goal)]


def by_measurement(case: Case, one: Evidence, ruled: Choice, yielded: list[str]) -> Choice:
    """What a comparison says, where the rules' method stays if it is among the best."""
    among = candidates(one, case)
    best = max(among, key=lambda row: row.quality)
    ties = one.tied(best, among)
    same = [row for row in ties if row.method.name == ruled.method.name]
    pick = _picked(case, same or ties)
    choice = Choice(pick.method, ruled.quantization, dict(ruled.training), dict(ruled.told))
    quality = f"{pick.label}: {one.metric} {100 * pick.quality:.1f} % ({100 * pick.low:.1f} to {100 * pick.high:.1f})"
    rest = [row.label for row in ties if row is not pick]
    beside = f"; no clear difference from {_few(rest)}" if rest else "; clearly better than the others"
    choice.say("method", pick.method.name, quality + beside, "measured", one.words)
    if not same:
        yielded.append(_contradiction(one, ruled, pick, among))
    own = pick.method.model_dump(mode="json")
    for setting in ("r", "lora_alpha", "target_modules", "learning_rate"):
        choice.told.pop(setting, None)
        if setting not in own or (setting == "target_modules" and own[setting] is None):
            continue
        choice.say(setting, own[setting], f"as it was measured in {pick.label}", "measured", one.words)
        before = ruled.told.get(setting)
        if before is not None and before.basis == "rule" and before.value != own[setting]:
            yielded.append(f"{setting} = {before.value} by rule: {own[setting]} is what was measured")
    if pick.method.in_place:
        choice.quantization = None
        choice.say("quantization", None, f"{pick.method.name} trains the base's own weights", "default", "Graft")
    elif choice.quantization != one.quantization:
        kept = choice.told["quantization"]
        there = "was measured on a base in " + (one.quantization or "16 or 32 bits")
        choice.told["quantization"] = replace(kept, reason=f"{kept.reason}; {pick.label} {there}")
    return choice


def _picked(case: Case, ties: list[Measured]) -> Measured:
    """Of methods without a clear difference, that which serves the goal best; for quality the highest."""
    if case.goal == "memory" and all(row.memory is not None for row in ties):
        return min(ties, key=lambda row: row.memory or 0)
    if case.goal == "latency" and all(row.latency is not None for row in ties):
        return min(ties, key=lambda row: row.latency or 0.0)
    return ties[0]


def _contradiction(one: Evidence, ruled: Choice, pick: Measured, among: list[Measured]) -> str:
    name = ruled.method.name
    rivals = sorted((row for row in among if row.method.name == name), key=lambda row: -row.quality)
    if not rivals:
        return f"method = {name} by rule: it was not measured in {one.file}, and {pick.label} was"
    found = one.verdict(pick.label, rivals[0].label)
    said = "" if found is None else f" by {100 * found[1]:.1f} points ({100 * found[2]:.1f} to {100 * found[3]:.1f})"
    return f"method = {name} by rule: {pick.label} was measured better than {rivals[0].label}{said}, {one.words}"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
