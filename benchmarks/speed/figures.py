"""Medians, ratios and shares of the stored rounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Line:
    """One side in a table. `ratio` is Graft's speed by this side's; None for Graft itself and where one is missing."""

    name: str
    error: str | None = None
    speed: float | None = None
    ratio: float | None = None
    padding: float | None = None
    step_ms: float | None = None
    peak: float | None = None
    loss: float | None = None
    low: float | None = None
    high: float | None = None
    nominal: float | None = None
    executed: float | None = None


def of_rounds(rounds: Sequence[dict[str, Any]], key: str) -> float | None:
    """The median of a figure over the rounds that have it."""
    known = [one[key] for one in rounds if one.get(key) is not None]
    return median(known) if known else None


def speed_of(rounds: Sequence[dict[str, Any]]) -> float | None:
    """The median of tokens per second, padding left out."""
    known = [one["useful_tokens"] / one["seconds"] for one in rounds if "seconds" in one]
    return median(known) if known else None


def lines(group: dict[str, Any], machine: dict[str, Any]) -> list[Line]:
    """Every side of a group."""
    ours = speed_of(group["sides"]["graft"]["rounds"]) if "graft" in group["sides"] else None
    return [_line(name, side["rounds"], ours, group, machine) for name, side in group["sides"].items()]


def _line(
    name: str, rounds: Sequence[dict[str, Any]], ours: float | None, group: dict[str, Any], machine: dict[str, Any]
) -> Line:
    done = [one for one in rounds if "error" not in one]
    if not done:
        return Line(name, error=rounds[0]["error"] if rounds else "not run")
    speed = speed_of(done)
    losses = [one["held_loss"] for one in done if one.get("held_loss") is not None]
    padded = [one for one in done if one.get("padded_tokens")]
    rate = _rate(done[0], machine)
    nominal = [_nominal(one, group["parameters"]) / rate for one in done] if rate else []
    executed = [_executed(one, group["parameters"]) / rate for one in padded] if rate else []
    return Line(
        name,
        speed=speed,
        ratio=None if name.startswith("graft") or not (ours and speed) else ours / speed,
        padding=median(1 - one["useful_tokens"] / one["padded_tokens"] for one in padded) if padded else None,
        step_ms=of_rounds(done, "step_ms"),
        peak=of_rounds(done, "peak_bytes"),
        loss=median(losses) if losses else None,
        low=min(losses) if len(losses) > 1 else None,
        high=max(losses) if len(losses) > 1 else None,
        nominal=median(nominal) if nominal else None,
        executed=median(executed) if executed else None,
    )


def _rate(one: dict[str, Any], machine: dict[str, Any]) -> float | None:
    """The measured rate of the format in which a side multiplies."""
    plain = one["format"].startswith("fp32") and "bf16" not in one["format"]
    return machine.get("fp32" if plain else "bf16")


def _nominal(one: dict[str, Any], parameters: dict[str, int]) -> float:
    """Operations per second that the rows' own tokens need, frozen weights taken."""
    return float(4 * parameters["all"] * one["useful_tokens"] / one["seconds"])


def _executed(one: dict[str, Any], parameters: dict[str, int]) -> float:
    """Operations per second that were done for all positions."""
    head = parameters["head"] * (one.get("head_positions") or 0)
    return float(4 * (parameters["body"] * one["padded_tokens"] + head) / one["seconds"])


def loss_verdict(group: dict[str, Any]) -> str:
    """Whether Graft's held-out loss is within what another seed alone changes."""
    losses = {
        name: [one["held_loss"] for one in side["rounds"] if one.get("held_loss") is not None]
        for name, side in group["sides"].items()
    }
    ours = losses.pop("graft", []) + losses.pop("graft compiled", [])
    peers = {name: values for name, values in losses.items() if values}
    spread = max((max(values) - min(values) for values in [ours, *peers.values()] if len(values) > 1), default=None)
    if not ours or not peers or spread is None:
        return ""
    middle = median(ours)
    far = {name: middle - median(values) for name, values in peers.items()}
    outside = {name: value for name, value in far.items() if abs(value) > spread}
    start = f"Between seeds of one side the held-out loss differs by up to {spread:.3f}. Graft's median "
    if not outside:
        return start + "is within that of every other side's."
    told = ", ".join(
        f"{abs(value):.3f} {'above' if value > 0 else 'below'} *{name}*" for name, value in outside.items()
    )
    rest = "; within it of the others" if len(outside) < len(far) else ""
    return start + f"is {told}{rest}."
