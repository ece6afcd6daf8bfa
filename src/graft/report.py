"""A comparison as a page that opens offline, as a terminal table, and in a few sentences.

`comparison` is the content of `comparison.json`: title, created, command, model, data, objective, seeds,
environment, rows, verdicts and notes. Quality, transfer, trainable fraction and verdicts are shares in
0..1; forgetting is in percentage points, positive where quality was lost; sizes are bytes (1 GB = 10^9),
times seconds, latencies milliseconds. Any figure may be None; a row with status "failed" has a cause.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from graft.files import write_text

Row = Mapping[str, Any]

# Plotly's marker names and the same shapes as characters; 8 shapes with 7 colours (report.css) tell 56 apart.
_MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
_GLYPHS = "●■◆▲✚✖★▼"
_COLOURS = 7

_SCOPE = {
    False: "One seed: intervals and p values cover which test rows were drawn, not training luck. "
    "Trained again with another seed, a method may land elsewhere.",
    True: "Several seeds: intervals and p values cover which test rows were drawn and training luck.",
}


def write_report(comparison: Mapping[str, Any], path: Path) -> None:
    """Write `comparison` as one HTML page of about 5 MB that loads nothing; it is complete or not there.

    Raises `ResourceError` where the file cannot be written.
    """
    from plotly.offline import get_plotlyjs  # slow to import, and only a page needs it

    rows = comparison["rows"]
    assets = files("graft")
    parts = {
        "title": _html(comparison.get("title") or "Comparison of methods"),
        "css": (assets / "report.css").read_text(encoding="utf-8"),
        "summary": " ".join(map(_html, summary(comparison))),
        "table": _table(rows),
        "legend": "".join(f"<li>{_key(mark)} {mark['name']}</li>" for mark in _marks(rows) if mark["done"]),
        "qualities": _html("; ".join(f"{row['label']} {_QUALITY.text(row)}" for row in rows if _done(row))),
        "matrix": _matrix(comparison),
        "scope": _SCOPE[len(comparison.get("seeds") or []) > 1],
        "setup": "".join(f"<dt>{_html(key)}</dt><dd>{_html(text)}</dd>" for key, text in _setup(comparison)),
        "notes": "".join(f"<li>{_html(note)}</li>" for note in comparison.get("notes") or ["None."]),
        # "<" would end the script element, whatever the quotes around it.
        "data": json.dumps(_plot_data(rows), allow_nan=False).replace("<", "\\u003c"),
        "plotly": get_plotlyjs(),
    }
    template = (assets / "report.html").read_text(encoding="utf-8")
    # One pass, so that braces inside the data are not filled in.
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template))


# --- the parts of the page ---


def _marks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Name, colour and shape of every row, the same in the table and in all plots; a base is grey."""
    marks = []
    trained = 0
    for row in rows:
        mark = {"name": _html(row["label"]), "done": _done(row), "colour": "--base", "marker": "circle-open"}
        mark["glyph"] = "○"
        if row.get("method") != "base":
            mark["colour"] = f"--c{trained % _COLOURS}"
            mark["marker"] = _MARKERS[trained % len(_MARKERS)]
            mark["glyph"] = _GLYPHS[trained % len(_MARKERS)]
            trained += 1
        marks.append(mark)
    return marks


def _key(mark: dict[str, Any]) -> str:
    return f'<span class="key" style="color:var({mark["colour"]})" aria-hidden="true">{mark["glyph"]}</span>'


def _plot_data(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Finished rows with their marks; text is escaped, because Plotly reads labels as HTML."""
    kept = ["quality", "quality_low", "quality_high", "peak_memory_bytes", "train_seconds", "adapter_bytes"]
    kept += ["forgetting", "transfer", "curve"]
    pairs = zip(rows, _marks(rows), strict=True)
    return [
        {**mark, "name": _safe(str(row["label"])), **{key: _safe(row.get(key)) for key in kept}}
        for row, mark in pairs
        if _done(row)
    ]


def _safe(value: Any) -> Any:
    """`value` with escaped text and without numbers that JSON lacks (nan, inf)."""
    if isinstance(value, Mapping):
        return {_safe(str(key)): _safe(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_safe(inner) for inner in value]
    # Quotes stay: Plotly knows &lt; but would show &quot; as it stands.
    return escape(_clean(value), quote=False) if isinstance(value, str) else _number(value)


def _table(rows: Sequence[Row]) -> str:
    """Header and rows of the figures; `data-value` is what a click on a header sorts by."""
    forgetting = _each("forgetting", "Forgetting on {}, points", _points, rows)
    transfer = _each("transfer", "Transfer to {}, %", _percent, rows)
    columns = [*_TRAINING, *_SERVING, *forgetting, *transfer, *_REST]
    columns = [column for column in columns if any(column.value(row) is not None for row in rows)]
    heads = ["Method", *(column.head for column in columns)]
    buttons = (f'<th scope="col"><button type="button">{_html(head)}</button></th>' for head in heads)
    html = [f"<thead><tr>{''.join(buttons)}</tr></thead><tbody>"]
    for row, mark in zip(rows, _marks(rows), strict=True):
        html.append(f'<tr><th scope="row" data-value="{mark["name"]}">{_key(mark)} {mark["name"]}</th>')
        if _done(row):
            cells = [("" if (v := column.value(row)) is None else v, column.text(row)) for column in columns]
            html += [f'<td data-value="{value}">{_html(text)}</td>' for value, text in cells]
        else:
            cause = _html(_cause(row))
            html.append(f'<td class="failed" colspan="{len(columns)}"><span>failed: {cause}</span></td>')
        html.append("</tr>")
    return "".join([*html, "</tbody>"])


def _matrix(comparison: Mapping[str, Any]) -> str:
    """Header and rows of the verdicts, the row's method against the column's."""
    found = _both_ways(comparison)
    labels = list(dict.fromkeys(first for first, _ in found))
    heads = "".join(f'<th scope="col">{_html(label)}</th>' for label in labels)
    html = [f'<thead><tr><th scope="col">Method</th>{heads}</tr></thead><tbody>']
    for first in labels:
        html.append(f'<tr><th scope="row">{_html(first)}</th>')
        for second in labels:
            verdict = found.get((first, second))
            html.append(_verdict_cell(f"{first} minus {second}", verdict) if verdict else "<td></td>")
        html.append("</tr>")
    return "".join([*html, "</tbody>"])


def _verdict_cell(what: str, verdict: Mapping[str, Any]) -> str:
    sign = {"better": "+", "worse": "−", "tie": "="}[verdict["outcome"]]
    gaps = [_points(100 * gap) for gap in verdict["gaps"]]
    hint = f"{what}: {gaps[1]} points (95 %: {gaps[0]} to {gaps[2]}), " if gaps else f"{what}: "
    p = _p(verdict["p"])
    text = f"<b>{sign} {verdict['outcome']}</b><br>{_html(p)}"
    return f'<td class="{verdict["outcome"]}" title="{_html(hint + p)}">{text}</td>'


def _setup(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run and on what, as (name, text); what is not known is left out."""
    model, data = comparison.get("model") or {}, comparison.get("data") or {}
    environment = dict(comparison.get("environment") or {})
    parameters, memory = _number(model.get("parameters")), _number(environment.pop("memory_bytes", None))
    size = parameters and f"{_count(parameters)} parameters"
    splits = (("train", "training"), ("validation", "validation"), ("test", "test"))
    facts: dict[str, list[Any]] = {
        "command": [comparison.get("command")],
        "created": [comparison.get("created")],
        "model": [model.get("name"), model.get("architecture"), size],
        "data": [data.get("name"), *(f"{data[key]} {name} rows" for key, name in splits if data.get(key))],
        "labels": data.get("labels") or [],
        "objective": [comparison.get("objective")],
        "seeds": comparison.get("seeds") or [],
        "dtype": [environment.pop("dtype", None), environment.pop("dtype_reason", None)],
        "memory": [memory and _bytes(memory)],
        **{str(key).replace("_", " "): [value] for key, value in environment.items()},
    }
    texts = ((key, ", ".join(str(part) for part in parts if part is not None)) for key, parts in facts.items())
    return [(key, text) for key, text in texts if text]


# --- the terminal and the sentences ---


def terminal_table(comparison: Mapping[str, Any], width: int | None = None) -> Group:
    """The comparison for the terminal: two stacked tables that fit 80 columns, one from `width` 130 on.

    A column without any figure is left out. Why a method failed stands in `summary`.
    """
    rows = comparison["rows"]
    beside = _SERVING + _BESIDE
    tables = []
    for block in [_TRAINING + beside] if width and width >= 130 else [_TRAINING, beside]:
        columns = [column for column in block if any(column.value(row) is not None for row in rows)]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
        table.add_column("method", overflow="fold", vertical="bottom", max_width=24)
        for column in columns:
            table.add_column(column.short, justify="right", no_wrap=True, vertical="bottom")
        for row in rows:
            cells = [column.text(row) for column in columns] if _done(row) else ["failed"]
            table.add_row(Text(_clean(row["label"])), *map(Text, cells))
        if set(columns) & set(_BESIDE):
            table.caption = "forgets: on the worst probe; transfer: mean of data sets"
        if columns:
            tables.append(table)
    return Group(*tables)


def summary(comparison: Mapping[str, Any]) -> list[str]:
    """What was found, in plain sentences: leaders, those behind, the cheapest, forgetting, failures."""
    rows = [row for row in comparison["rows"] if _done(row) and _QUALITY.value(row) is not None]
    if not rows:
        return ["No method has a result.", *_failures(comparison["rows"])]
    found = _both_ways(comparison)
    best = max(rows, key=lambda row: float(row["quality"]))
    against = {row["label"]: found.get((best["label"], row["label"]), {}) for row in rows if row is not best}
    ps = [verdict["p"] for verdict in against.values() if verdict.get("outcome") == "tie"]
    behind = [label for label, verdict in against.items() if verdict.get("outcome") == "better"]
    leaders = [best, *(row for row in rows if against.get(row["label"], {}).get("outcome") == "tie")]
    said = [*_leading(leaders, ps, behind), *_cheapest(leaders), *_forgetting(rows)]
    return [*map(_clean, said), *_failures(comparison["rows"])]


def _leading(leaders: list[Row], ps: list[Any], behind: list[str]) -> list[str]:
    names = [f"{row['label']} ({_percent(row['quality'])} %)" for row in leaders]
    doubt = f"between them ({_p(ps[0])})" if len(ps) == 1 else f"between {leaders[0]['label']} and the others"
    said = [f"{_join(names)} lead; no clear difference {doubt}."]
    if len(leaders) == 1:
        said = [f"{names[0]} has the highest quality."]
    said += [
        f"No method is clearly better than the untouched {row['label']}."
        for row in leaders
        if row.get("method") == "base"
    ]
    if behind:
        said.append(f"{_join(behind)} {'is' if len(behind) == 1 else 'are'} clearly behind.")
    return said


def _cheapest(leaders: list[Row]) -> list[str]:
    """Which of several leading methods needs least, where that was measured."""
    trained = [row for row in leaders if row.get("method") != "base"]
    wins: dict[str, list[str]] = {}
    costs = (("least memory", _MEMORY), ("shortest training", _TIME), ("smallest adapter", _SIZE))
    for what, column in costs:
        known = [(value, row) for row in trained if (value := column.value(row)) is not None]
        if len(trained) > 1 and known:
            row = min(known, key=lambda pair: pair[0])[1]
            wins.setdefault(row["label"], []).append(f"the {what} ({column.text(row)})")
    parts = [f"{label} has {_join(facts)}" for label, facts in wins.items()]
    return [f"Among the leaders, {'; '.join(parts)}."] if parts else []


def _forgetting(rows: list[Row]) -> list[str]:
    trained = (row for row in rows if row.get("method") != "base")
    losses = [(row["label"], worst) for row in trained if (worst := _worst(row))]
    if not losses:
        return []
    label, (points, probe) = max(losses, key=lambda pair: pair[1])
    if points < 0.05:
        return ["No method lost quality on a probe."]
    return [f"{label} forgot most: {_points(points)} points on {probe}."]


def _failures(rows: Sequence[Row]) -> list[str]:
    return [_clean(f"{row['label']} failed: {_cause(row).rstrip('.')}.") for row in rows if not _done(row)]


def _both_ways(comparison: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Every verdict as (first, second) and, turned round, (second, first); gaps are low, middle, high."""
    turned = {"better": "worse", "worse": "better", "tie": "tie"}
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for verdict in comparison.get("verdicts") or []:
        first, second, outcome, p = (verdict[key] for key in ("first", "second", "outcome", "p"))
        known = [_number(verdict.get(key)) for key in ("low", "difference", "high")]
        gaps = [gap for gap in known if gap is not None] if None not in known else []
        table[first, second] = {"outcome": outcome, "p": p, "gaps": gaps}
        table[second, first] = {"outcome": turned[outcome], "p": p, "gaps": [-gap for gap in reversed(gaps)]}
    return table


# --- figures and how they are written ---


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{_plain(value)} {units[power]}".rstrip()


def _bytes(value: float) -> str:
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def _count(value: float) -> str:
    return _scaled(value, ("", "k", "M", "B"))


def _seconds(value: float) -> str:
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _points(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}".replace("-", "−")  # + 0.0 turns -0.0 into 0.0


def _p(p: Any) -> str:
    if _number(p) is None:
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _clean(value: Any) -> str:
    """`value` on one line without control characters, which could drive a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def _html(value: Any) -> str:
    return escape(_clean(value))


def _join(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _done(row: Row) -> bool:
    return bool(row.get("status") != "failed")


def _cause(row: Row) -> str:
    return str(row.get("cause") or "no cause was recorded")


class _Column(NamedTuple):
    """One figure of a row: `head` is for the page, `short` for the terminal, `value` sorts."""

    head: str
    short: str
    value: Callable[[Row], float | None]
    text: Callable[[Row], str]


def _column(head: str, short: str, show: Callable[[float], str], *path: str) -> _Column:
    """The figure at `path` in a row."""

    def value(row: Row) -> float | None:
        found: Any = row
        for key in path:
            found = (found or {}).get(key)
        return _number(found)

    return _computed(head, short, show, value)


def _computed(head: str, short: str, show: Callable[[float], str], value: Callable[[Row], float | None]) -> _Column:
    def text(row: Row) -> str:
        figure = value(row)
        return "–" if figure is None else show(figure)

    return _Column(head, short, value, text)


def _each(part: str, head: str, show: Callable[[float], str], rows: Sequence[Row]) -> list[_Column]:
    """A column for every probe of "forgetting" or every data set of "transfer"."""
    names = dict.fromkeys(name for row in rows for name in row.get(part) or {})
    return [_column(head.format(name), "", show, part, name) for name in names]


def _quality(row: Row) -> str:
    mean, low, high = (_number(row.get(key)) for key in ("quality", "quality_low", "quality_high"))
    if mean is None:
        return "–"
    bounds = "" if low is None or high is None else f" ({_percent(low)}–{_percent(high)})"
    return _percent(mean) + bounds


def _worst(row: Row) -> tuple[float, str] | None:
    """Points and name of the probe that lost most."""
    known = [(_number(points), probe) for probe, points in (row.get("forgetting") or {}).items()]
    return max(((points, probe) for points, probe in known if points is not None), default=None)


def _mean_transfer(row: Row) -> float | None:
    known = [share for share in map(_number, (row.get("transfer") or {}).values()) if share is not None]
    return sum(known) / len(known) if known else None


def _seed_count(row: Row) -> float | None:
    seeds = row.get("seeds")
    return len(seeds) if isinstance(seeds, list) else _number(seeds)


_QUALITY = _Column("Quality, %", "quality, %", lambda row: _number(row.get("quality")), _quality)
_MEMORY = _column("Peak memory", "memory", _bytes, "peak_memory_bytes")
_TIME = _column("Train time", "time", _seconds, "train_seconds")
_SIZE = _column("Adapter size", "adapter", _bytes, "adapter_bytes")
_TRAINING = [
    _QUALITY,
    _column("Trained parameters", "trained", _count, "trainable_parameters"),
    _MEMORY,
    _TIME,
    _SIZE,
]
_SERVING = [
    _column("Examples/s", "examples/s", _plain, "examples_per_second"),
    _column("Latency, ms", "latency,\nms", _plain, "latency_ms"),
    _column("Latency merged, ms", "merged,\nms", _plain, "merged_latency_ms"),
]
_BESIDE = [
    _computed("", "forgets,\npoints", _points, lambda row: (_worst(row) or [None])[0]),
    _computed("", "transfer,\n%", _percent, _mean_transfer),
]
_REST = [
    _column("Trained, %", "", lambda share: f"{100 * share:.3g}", "trainable_fraction"),
    _column("Learning rate", "", lambda rate: f"{rate:.3g}".replace("e-0", "e-"), "learning_rate"),
    _computed("Seeds", "", _plain, _seed_count),
]
