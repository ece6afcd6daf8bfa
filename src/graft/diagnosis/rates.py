"""Which learning rates a method bears.

From the sweeps in docs/log.md (MiniLM-L6, 22.7 M parameters, every method) and the comparison of SmolLM2-135M: on the
small base methods fail at 2 (VeRA), 2.9 (BitFit) and 4 times (MAM) their default and the others still learn at 2 to 5
times; on the larger one LoRA is best at 10 times its default for large bases, which is half of its default for small
ones. In between, and above, nothing was swept: the limit falls evenly on a logarithmic scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log10

from graft.diagnosis.curve import Facts

SMALL, LARGE = 1e8, 7e9
"""Parameters of a base at which the defaults for small bases end, and for which those for large ones were published."""
LEAST = 1_000_000
"""Parameters below which no range is known: such bases are random models for tests, which bear far more."""
ABOVE_SMALL, ABOVE_LARGE = 5.0, 10.0
"""Times the default that a method still bears: the largest factor at which any method learned in the sweeps."""
ALIGNING = {"dpo", "grpo", "ppo"}
"""Objectives that move a trained model a little: their usual rates are a tenth of those of supervised tuning."""
BELOW_ALIGNING = 10.0
BELOW_SMALL, BELOW_LARGE = 20.0, 10.0
"""A default divided by this is too small. At a twentieth LoHa reached 74.5 % where its default reached 83.1 % in an
epoch; LoRA on bases of billions at a tenth, which is what full fine-tuning takes, hardly moves."""


@dataclass(frozen=True)
class Range:
    """Peak learning rates."""

    low: float
    default: float
    high: float


def bearable(facts: Facts) -> Range | None:
    """The range of a run's method on its base. Without the base's size it reaches over bases of every size. None for an
    unknown method, for bases below `LEAST`, and where only the head trains, which bears far more.
    """
    from graft.methods.base import methods

    parameters, kind = facts.parameters, methods().get(facts.method or "")
    if kind is None or (parameters is not None and parameters < LEAST):
        return None
    method = facts.recipe.get("method")
    if isinstance(method, Mapping) and method.get("last_layers") == 0:
        return None
    small, large = kind.rate_small, kind.rate_large
    further = BELOW_ALIGNING if facts.objective in ALIGNING else 1.0
    if parameters is None:
        return Range(min(small / BELOW_SMALL, large / BELOW_LARGE) / further, small, ABOVE_SMALL * small)
    if parameters < SMALL:
        return Range(small / BELOW_SMALL / further, small, ABOVE_SMALL * small)
    way = min(1.0, log10(parameters / SMALL) / log10(LARGE / SMALL))
    high = 10 ** ((1 - way) * log10(ABOVE_SMALL * small) + way * log10(ABOVE_LARGE * large))
    return Range(large / BELOW_LARGE / further, large, max(high, ABOVE_LARGE * large))


def lower(facts: Facts) -> dict[str, float]:
    """The rate to try instead of one that was too high: the method's default where that is lower, else a third."""
    known, peak = bearable(facts), facts.peak_rate
    if peak is None:
        return {}
    return {key_of(facts): known.default if known is not None and known.default < peak / 2 else _rounded(peak / 3)}


def higher(facts: Facts) -> dict[str, float]:
    """The rate to try instead of one that was too low: the method's default where that is higher, else three times."""
    known, peak = bearable(facts), facts.peak_rate
    if peak is None:
        return {}
    new = known.default if known is not None and known.default > 2 * peak else _rounded(3 * peak)
    return {key_of(facts): min(1.0, new)}


def key_of(facts: Facts) -> str:
    """What the learning rate is called where the run was set up."""
    return "method.learning_rate" if facts.kind == "graft" else "learning_rate"


def rate_words(facts: Facts) -> str:
    """The learning rate as a cause, with the range of the method where it is known."""
    known, peak = bearable(facts), facts.peak_rate
    if known is not None and peak is not None and peak > known.high:
        return f"a learning rate of {peak:g}, where {facts.method} bears up to {known.high:.2g}"
    if known is not None and peak is not None and peak < known.low:
        return f"a learning rate of {peak:g}, where {facts.method} needs {known.low:.2g} at least"
    return f"a learning rate too high for this run ({'unknown' if peak is None else f'{peak:g}'} at its peak)"


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")
