"""The parts of the page that are no trainings of one work side by side: methods, the comparison, starting."""

from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.speed.figures import of_rounds

_MIB = 2**20


def ruled(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown; the first column is text."""
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    rule = "|" + "|".join([" --- ", *[" ---: "] * (len(head) - 1)]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _ratio(peer: float | None, ours: float | None) -> str:
    return f"{peer / ours:.2f}" if peer and ours else "–"


# Methods -------------------------------------------------------------------------------------------


def _by_model(section: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for group in section["groups"].values():
        found.setdefault(group["settings"]["model"], {})[group["settings"]["method"]["name"]] = group
    return found


def _method_rows(groups: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, group in groups.items():
        sides = {side: told["rounds"] for side, told in group["sides"].items()}
        failed = [
            f"{side} failed: {one['error']}" for side, rounds in sides.items() for one in rounds if "error" in one
        ]
        done = {side: [one for one in rounds if "error" not in one] for side, rounds in sides.items()}
        ours, theirs = done.get("graft", []), done.get("peft best", [])
        cells = [name]
        for key, scale in (("step_ms", 1.0), ("peak_bytes", 1 / _MIB)):
            pair = of_rounds(ours, key), of_rounds(theirs, key)
            cells += ["–" if value is None else f"{value * scale:,.0f}" for value in pair] + [_ratio(pair[1], pair[0])]
        rows.append(cells if not failed else [*cells[:-1], f"{cells[-1]} ({'; '.join(failed)})"])
    return rows


_METHODS = ["method", "Graft ms/step", "peft ms/step", "ratio", "Graft MiB", "peft MiB", "ratio"]


def methods(section: dict[str, Any]) -> list[str]:
    """A table for each model."""
    parts = []
    for model, groups in _by_model(section).items():
        first = next(iter(groups.values()))
        steps = first["data"]["rows"] // first["settings"]["batch"]
        peer = first["sides"].get("peft best", {})
        tried = ", ".join(
            f"`{variant}` {value:.1f} s" if isinstance(value, float) else f"`{variant}` failed"
            for variant, value in peer.get("trials", {}).items()
        )
        about = (
            f"{model}, batches of {first['settings']['batch']}, {steps} steps of which the first three are left out of "
            f"the median, the same settings and rows on both sides; peft with Trainer as `{peer.get('variant', '–')}`"
        )
        parts += [about + (f", the fastest with LoRA in a trial: {tried}." if tried else "."),
                  ruled(_METHODS, _method_rows(groups))]  # fmt: skip
    return parts


# Comparison ----------------------------------------------------------------------------------------


def _compare_rows(section: dict[str, Any]) -> list[list[str]]:
    ours = of_rounds(section["sides"].get("graft", {"rounds": []})["rounds"], "seconds")
    rows = []
    for name, side in section["sides"].items():
        told = side["rounds"][0]
        if "error" in told:
            rows.append([name, f"failed: {told['error']}", "", ""])
            continue
        seconds = of_rounds(side["rounds"], "seconds")
        quality = ", ".join(f"{label} {value:.0%}" for label, value in told["quality"].items() if value is not None)
        rows.append([name, f"{seconds:,.0f}", "" if name.startswith("graft") else _ratio(seconds, ours), quality])
    return rows


def compare(section: dict[str, Any]) -> list[str]:
    """Wall time of each side."""
    settings = section["settings"]
    about = (
        f"The demo comparison (`recipes/demo.yaml`) on {settings['model']}, cut to {settings['rows']:,} training rows, "
        f"{settings['evaluated']:,} test rows and the methods that peft and Trainer have: "
        f"{', '.join(settings['methods'])}. Wall time of everything, from the start of the first process to the end of "
        "the last."
    )
    sides = "\n".join(f"- *{name}*: {side['about']}" for name, side in section["sides"].items())
    return [about, ruled(["side", "seconds", "ratio", "accuracy on the test rows"], _compare_rows(section)), sides]


# Starting ------------------------------------------------------------------------------------------


def _start_rows(section: dict[str, Any]) -> list[list[str]]:
    rows = []
    for model, sides in section["times"].items():
        if model == "help":
            continue
        times = {side: [one for one in known if not isinstance(one, str)] for side, known in sides.items()}
        middle = {side: median(known) if known else None for side, known in times.items()}
        shown = [
            f"{middle[side]:.2f}" if middle.get(side) else f"failed: {next(iter(sides.get(side, [])), 'not run')}"
            for side in ("graft", "trainer")
        ]
        rows.append([model, *shown, _ratio(middle.get("trainer"), middle.get("graft"))])
    return rows


_START = ["model", "`graft train`, s", "peft and Trainer, s", "ratio"]


def start(section: dict[str, Any]) -> list[str]:
    """`graft --help`, and the first step."""
    helps = section["times"]["help"]
    about = (
        f"`graft --help` takes {median(helps):.2f} s (median of {len(helps)}). From the start of the process to the "
        "end of the first optimizer step of LoRA on 200 rows of like length, `graft train` beside the least script "
        "with peft and Trainer (`benchmarks/speed/first_step.py`):"
    )
    return [about, ruled(_START, _start_rows(section))]


# The screen ----------------------------------------------------------------------------------------


def tables(name: str, section: dict[str, Any]) -> list[Table]:
    """A section's figures for a terminal of 80 columns."""
    found = []
    if name == "methods":
        short = ["method", "Graft ms", "peft ms", "ratio", "Graft MiB", "peft MiB", "ratio"]
        for model, groups in _by_model(section).items():
            found.append(_screen(model, short, _method_rows(groups)))
    elif name == "compare":
        found.append(_screen(name, ["side", "seconds", "ratio", "accuracy"], _compare_rows(section)))
    else:
        helps = f"graft --help: {median(section['times']['help']):.2f} s; first step:"
        found.append(_screen(helps, ["model", "Graft s", "Trainer s", "ratio"], _start_rows(section)))
    return found


def _screen(title: str, head: list[str], rows: list[list[str]]) -> Table:
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    return table
