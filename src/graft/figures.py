"""The figures of a comparison's rows and how they are written: percent, bytes, seconds, intervals.

A figure is a number or None; None is written "–". Bytes are decimal (1 GB = 10^9).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

Row = Mapping[str, Any]
"""A row of comparison.json."""


def as_number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def scaled(value: float, units: tuple[str, ...]) -> str:
    """A value with the largest of `units` (steps of 1,000) that keeps it above 1."""
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{as_plain(value)} {units[power]}".rstrip()


def as_bytes(value: float) -> str:
    """Bytes, in decimal units."""
    return scaled(value, ("B", "kB", "MB", "GB", "TB"))


def as_count(value: float) -> str:
    """A count, in thousands or more."""
    return scaled(value, ("", "k", "M", "B"))


def as_seconds(value: float) -> str:
    """Seconds, or minutes and hours."""
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def as_plain(value: float) -> str:
    """Three figures."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def as_percent(value: float) -> str:
    """A share as percent, without the sign."""
    return f"{100 * value:.1f}"


def as_points(value: float) -> str:
    """Percentage points, with a minus sign."""
    return f"{round(value, 1) + 0.0:.1f}".replace("-", "−")  # + 0.0 turns -0.0 into 0.0


def as_nats(value: float) -> str:
    """Nats per token, with a minus sign."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def as_p(p: Any) -> str:
    """A p value."""
    if as_number(p) is None:
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def one_line(value: Any) -> str:
    """`value` on one line without control characters, which could drive a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def as_html(value: Any) -> str:
    """`value` escaped for a page."""
    return escape(one_line(value))


def joined(names: Sequence[str]) -> str:
    """Names as a phrase: a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def is_done(row: Row) -> bool:
    """Whether a row has results."""
    return bool(row.get("status") != "failed")


def cause_of(row: Row) -> str:
    """Why a row has none."""
    return str(row.get("cause") or "no cause was recorded")


class Column(NamedTuple):
    """One figure of a row: `head` is for the page, `short` for the terminal, `value` sorts."""

    head: str
    short: str
    value: Callable[[Row], float | None]
    text: Callable[[Row], str]


def column(head: str, short: str, show: Callable[[float], str], *path: str) -> Column:
    """The figure at `path` in a row."""

    def value(row: Row) -> float | None:
        found: Any = row
        for key in path:
            found = (found or {}).get(key)
        return as_number(found)

    return computed(head, short, show, value)


def computed(head: str, short: str, show: Callable[[float], str], value: Callable[[Row], float | None]) -> Column:
    """A column whose figure is worked out from a row."""

    def text(row: Row) -> str:
        figure = value(row)
        return "–" if figure is None else show(figure)

    return Column(head, short, value, text)


def columns_of(part: str, head: str, show: Callable[[float], str], rows: Sequence[Row]) -> list[Column]:
    """A column for every probe of "forgetting" or every data set of "transfer"."""
    names = dict.fromkeys(name for row in rows for name in row.get(part) or {})
    return [column(head.format(name), "", show, part, name) for name in names]


def as_quality(row: Row) -> str:
    """Quality with its interval, in percent."""
    mean, low, high = (as_number(row.get(key)) for key in ("quality", "quality_low", "quality_high"))
    if mean is None:
        return "–"
    bounds = "" if low is None or high is None else f" ({as_percent(low)}–{as_percent(high)})"
    return as_percent(mean) + bounds


def worst_probe(row: Row) -> tuple[float, str] | None:
    """Points and name of the probe that lost most."""
    known = [(as_number(points), probe) for probe, points in (row.get("forgetting") or {}).items()]
    return max(((points, probe) for points, probe in known if points is not None), default=None)


def mean_transfer(row: Row) -> float | None:
    """Mean accuracy over the other data sets."""
    known = [share for share in map(as_number, (row.get("transfer") or {}).values()) if share is not None]
    return sum(known) / len(known) if known else None


def seed_count(row: Row) -> float | None:
    """How many seeds a row is over."""
    seeds = row.get("seeds")
    return len(seeds) if isinstance(seeds, list) else as_number(seeds)


QUALITY = Column("Quality, %", "quality, %", lambda row: as_number(row.get("quality")), as_quality)
MEMORY = column("Peak memory", "memory", as_bytes, "peak_memory_bytes")
TIME = column("Train time", "time", as_seconds, "train_seconds")
SIZE = column("Adapter size", "adapter", as_bytes, "adapter_bytes")
TRAINING = [
    QUALITY,
    column("Trained parameters", "trained", as_count, "trainable_parameters"),
    MEMORY,
    column("Expected memory", "", as_bytes, "expected_memory_bytes"),
    TIME,
    column("Expected time", "", as_seconds, "expected_seconds"),
    SIZE,
]
SERVING = [
    column("Examples/s", "examples/s", as_plain, "examples_per_second"),
    column("Latency, ms", "latency,\nms", as_plain, "latency_ms"),
    column("Latency merged, ms", "merged,\nms", as_plain, "merged_latency_ms"),
]
FIGURES = [
    column("Loss", "loss", as_plain, "figures", "loss"),
    column("Perplexity", "", as_plain, "figures", "perplexity"),
    column("Answers ended, %", "ended, %", as_percent, "figures", "ended"),
]


def beside(unit: str) -> list[Column]:
    """What a comparison shows beside quality: forgetting, counted in `unit`, and transfer."""
    show = as_points if unit == "points" else as_nats
    return [
        computed("", f"forgets,\n{unit}", show, lambda row: (worst_probe(row) or [None])[0]),
        computed("", "transfer,\n%", as_percent, mean_transfer),
    ]


REST = [
    column("Trained, %", "", lambda share: f"{100 * share:.3g}", "trainable_fraction"),
    column("Learning rate", "", lambda rate: f"{rate:.3g}".replace("e-0", "e-"), "learning_rate"),
    computed("Seeds", "", as_plain, seed_count),
]
