"""A comparison as a page that opens offline, as a terminal table, and in a few sentences.

`comparison` is the content of `comparison.json`: title, created, command, model, data, objective, seeds,
environment, rows, verdicts and notes. Quality, transfer, trainable fraction and verdicts are shares in
0..1; forgetting is in percentage points, positive where quality was lost; sizes are bytes (1 GB = 10^9),
times seconds, latencies milliseconds. Any figure may be None; a row with status "failed" has a cause.
"""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from graft.figures import (
    FIGURES,
    MEMORY,
    QUALITY,
    REST,
    SERVING,
    SIZE,
    TIME,
    TRAINING,
    Row,
    as_bytes,
    as_count,
    as_html,
    as_nats,
    as_number,
    as_p,
    as_percent,
    as_points,
    beside,
    cause_of,
    columns_of,
    is_done,
    joined,
    one_line,
    worst_probe,
)
from graft.files import write_text

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

    Raises `ResourceError` where the disk refuses, `UsageError` for a path that can be no file.
    """
    from plotly.offline import get_plotlyjs  # slow to import, and only a page needs it

    rows = comparison["rows"]
    assets = files("graft")
    parts = {
        "title": as_html(comparison.get("title") or "Comparison of methods"),
        "css": (assets / "report.css").read_text(encoding="utf-8"),
        "summary": " ".join(map(as_html, summary(comparison))),
        "table": _table(comparison),
        "legend": "".join(f"<li>{_key(mark)} {mark['name']}</li>" for mark in _marks(rows) if mark["done"]),
        "qualities": as_html("; ".join(f"{row['label']} {QUALITY.text(row)}" for row in rows if is_done(row))),
        "matrix": _matrix(comparison),
        "scope": _SCOPE[len(comparison.get("seeds") or []) > 1],
        "setup": "".join(f"<dt>{as_html(key)}</dt><dd>{as_html(text)}</dd>" for key, text in _setup(comparison)),
        "notes": "".join(f"<li>{as_html(note)}</li>" for note in comparison.get("notes") or ["None."]),
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
        mark = {"name": as_html(row["label"]), "done": is_done(row), "colour": "--base", "marker": "circle-open"}
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
        if is_done(row)
    ]


def _safe(value: Any) -> Any:
    """`value` with escaped text and without numbers that JSON lacks (nan, inf)."""
    if isinstance(value, Mapping):
        return {_safe(str(key)): _safe(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_safe(inner) for inner in value]
    # Quotes stay: Plotly knows &lt; but would show &quot; as it stands.
    return escape(one_line(value), quote=False) if isinstance(value, str) else as_number(value)


def _unit(comparison: Mapping[str, Any]) -> str:
    """What forgetting is counted in: points, or nats per token."""
    return str(comparison.get("forgetting_unit") or "points")


def _table(comparison: Mapping[str, Any]) -> str:
    """Header and rows of the figures; `data-value` is what a click on a header sorts by."""
    rows, unit = comparison["rows"], _unit(comparison)
    forgetting = columns_of(
        "forgetting", f"Forgetting on {{}}, {unit}", as_points if unit == "points" else as_nats, rows
    )
    transfer = columns_of("transfer", "Transfer to {}, %", as_percent, rows)
    columns = [*TRAINING, *FIGURES, *SERVING, *forgetting, *transfer, *REST]
    columns = [column for column in columns if any(column.value(row) is not None for row in rows)]
    heads = ["Method", *(column.head for column in columns)]
    buttons = (f'<th scope="col"><button type="button">{as_html(head)}</button></th>' for head in heads)
    html = [f"<thead><tr>{''.join(buttons)}</tr></thead><tbody>"]
    for row, mark in zip(rows, _marks(rows), strict=True):
        html.append(f'<tr><th scope="row" data-value="{mark["name"]}">{_key(mark)} {mark["name"]}</th>')
        if is_done(row):
            cells = [("" if (v := column.value(row)) is None else v, column.text(row)) for column in columns]
            html += [f'<td data-value="{value}">{as_html(text)}</td>' for value, text in cells]
        else:
            cause = as_html(cause_of(row))
            html.append(f'<td class="failed" colspan="{len(columns)}"><span>failed: {cause}</span></td>')
        html.append("</tr>")
    return "".join([*html, "</tbody>"])


def _matrix(comparison: Mapping[str, Any]) -> str:
    """Header and rows of the verdicts, the row's method against the column's."""
    found = _both_ways(comparison)
    labels = list(dict.fromkeys(first for first, _ in found))
    heads = "".join(f'<th scope="col">{as_html(label)}</th>' for label in labels)
    html = [f'<thead><tr><th scope="col">Method</th>{heads}</tr></thead><tbody>']
    for first in labels:
        html.append(f'<tr><th scope="row">{as_html(first)}</th>')
        for second in labels:
            verdict = found.get((first, second))
            html.append(_verdict_cell(f"{first} minus {second}", verdict) if verdict else "<td></td>")
        html.append("</tr>")
    return "".join([*html, "</tbody>"])


def _verdict_cell(what: str, verdict: Mapping[str, Any]) -> str:
    sign = {"better": "+", "worse": "−", "tie": "="}[verdict["outcome"]]
    gaps = [as_points(100 * gap) for gap in verdict["gaps"]]
    hint = f"{what}: {gaps[1]} points (95 %: {gaps[0]} to {gaps[2]}), " if gaps else f"{what}: "
    p = as_p(verdict["p"])
    text = f"<b>{sign} {verdict['outcome']}</b><br>{as_html(p)}"
    return f'<td class="{verdict["outcome"]}" title="{as_html(hint + p)}">{text}</td>'


def _setup(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run and on what, as (name, text); what is not known is left out."""
    model, data = comparison.get("model") or {}, comparison.get("data") or {}
    environment = dict(comparison.get("environment") or {})
    parameters, memory = as_number(model.get("parameters")), as_number(environment.pop("memory_bytes", None))
    size = parameters and f"{as_count(parameters)} parameters"
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
        "memory": [memory and as_bytes(memory)],
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
    losses = beside(_unit(comparison))
    told = [column for column in FIGURES if column.short and any(column.value(row) is not None for row in rows)]
    # With losses beside it, the rate of training rows would not fit 80 columns; the page has it.
    second = [*(SERVING[1:] if told else SERVING), *told, *losses]
    tables = []
    for block in [TRAINING + second] if width and width >= 130 else [TRAINING, second]:
        columns = [column for column in block if any(column.value(row) is not None for row in rows)]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
        table.add_column("method", overflow="fold", vertical="bottom", max_width=24)
        for column in columns:
            table.add_column(column.short, justify="right", no_wrap=True, vertical="bottom")
        for row in rows:
            cells = [column.text(row) for column in columns] if is_done(row) else ["failed"]
            table.add_row(Text(one_line(row["label"])), *map(Text, cells))
        if any(column in losses for column in columns):
            table.caption = "forgets: on the worst probe; transfer: mean of data sets"
        if columns:
            tables.append(table)
    return Group(*tables)


def summary(comparison: Mapping[str, Any]) -> list[str]:
    """What was found, in plain sentences: leaders, those behind, the cheapest, forgetting, failures."""
    rows = [row for row in comparison["rows"] if is_done(row) and QUALITY.value(row) is not None]
    if not rows:
        return ["No method has a result.", *_failures(comparison["rows"])]
    found = _both_ways(comparison)
    best = max(rows, key=lambda row: float(row["quality"]))
    against = {row["label"]: found.get((best["label"], row["label"]), {}) for row in rows if row is not best}
    ps = [verdict["p"] for verdict in against.values() if verdict.get("outcome") == "tie"]
    behind = [label for label, verdict in against.items() if verdict.get("outcome") == "better"]
    leaders = [best, *(row for row in rows if against.get(row["label"], {}).get("outcome") == "tie")]
    said = [*_leading(leaders, ps, behind), *_cheapest(leaders), *_forgetting(rows, _unit(comparison)), *_ranks(rows)]
    return [*map(one_line, said), *_failures(comparison["rows"])]


def _leading(leaders: list[Row], ps: list[Any], behind: list[str]) -> list[str]:
    names = [f"{row['label']} ({as_percent(row['quality'])} %)" for row in leaders]
    doubt = f"between them ({as_p(ps[0])})" if len(ps) == 1 else f"between {leaders[0]['label']} and the others"
    said = [f"{joined(names)} lead; no clear difference {doubt}."]
    if len(leaders) == 1:
        said = [f"{names[0]} has the highest quality."]
    said += [
        f"No method is clearly better than the untouched {row['label']}."
        for row in leaders
        if row.get("method") == "base"
    ]
    if behind:
        said.append(f"{joined(behind)} {'is' if len(behind) == 1 else 'are'} clearly behind.")
    return said


def _cheapest(leaders: list[Row]) -> list[str]:
    """Which of several leading methods needs least, where that was measured."""
    trained = [row for row in leaders if row.get("method") != "base"]
    wins: dict[str, list[str]] = {}
    costs = (("least memory", MEMORY), ("shortest training", TIME), ("smallest adapter", SIZE))
    for what, column in costs:
        known = [(value, row) for row in trained if (value := column.value(row)) is not None]
        if len(trained) > 1 and known:
            row = min(known, key=lambda pair: pair[0])[1]
            wins.setdefault(row["label"], []).append(f"the {what} ({column.text(row)})")
    parts = [f"{label} has {joined(facts)}" for label, facts in wins.items()]
    return [f"Among the leaders, {'; '.join(parts)}."] if parts else []


def _forgetting(rows: list[Row], unit: str) -> list[str]:
    trained = (row for row in rows if row.get("method") != "base")
    losses = [(row["label"], worst) for row in trained if (worst := worst_probe(row))]
    if not losses:
        return []
    label, (points, probe) = max(losses, key=lambda pair: pair[1])
    if points < (0.05 if unit == "points" else 0.005):
        return ["No method lost quality on a probe."]
    lost = f"{as_points(points)} points" if unit == "points" else f"{as_nats(points)} nats per token"
    return [f"{label} forgot most: {lost} on {probe}."]


def _ranks(rows: list[Row]) -> list[str]:
    """One training, many ranks: the quality at each."""
    said = []
    for row in rows:
        if row.get("by_rank"):
            at = ", ".join(f"{rank}: {as_percent(quality)} %" for rank, quality in row["by_rank"].items())
            said.append(f"{row['label']}, quality by rank from one training: {at}.")
    return said


def _failures(rows: Sequence[Row]) -> list[str]:
    return [one_line(f"{row['label']} failed: {cause_of(row).rstrip('.')}.") for row in rows if not is_done(row)]


def _both_ways(comparison: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Every verdict as (first, second) and, turned round, (second, first); gaps are low, middle, high."""
    turned = {"better": "worse", "worse": "better", "tie": "tie"}
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for verdict in comparison.get("verdicts") or []:
        first, second, outcome, p = (verdict[key] for key in ("first", "second", "outcome", "p"))
        known = [as_number(verdict.get(key)) for key in ("low", "difference", "high")]
        gaps = [gap for gap in known if gap is not None] if None not in known else []
        table[first, second] = {"outcome": outcome, "p": p, "gaps": gaps}
        table[second, first] = {"outcome": turned[outcome], "p": p, "gaps": [-gap for gap in reversed(gaps)]}
    return table
