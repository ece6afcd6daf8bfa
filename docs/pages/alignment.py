"""The measured part of docs/alignment.md and its curves: what benchmarks/alignment.py gave."""

from collections.abc import Sequence
from typing import Any

from pages.kept import ROOT, kept, number, signed

Panel = tuple[str, Sequence[tuple[float, float]], float | None]
"""A title, points (step, value), and a level to draw across."""

WIDTH, HEIGHT, EDGE = 250, 130, 34
"""Of a panel, in pixels, with the space for its labels."""
INK, LINE, LEVEL = "#7a7a7a", "#3b7dd8", "#d0762b"
"""Seen on white and on black."""


def drawn(panels: Sequence[Panel]) -> str:
    """Small curves beside each other, as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(panels)}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="10" fill="{INK}">'
    ]
    for number_, panel in enumerate(panels):
        parts.append(f'<g transform="translate({WIDTH * number_} 0)">{"".join(one_panel(*panel))}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def one_panel(title: str, points: Sequence[tuple[float, float]], level: float | None) -> list[str]:
    """A title, the ends of both axes, the curve."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    low, high = min([*values, *([] if level is None else [level])]), max([*values, *([] if level is None else [level])])
    low, high = (low, high) if high > low else (low - 1, high + 1)

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - steps[0]) / max(1, steps[-1] - steps[0])
        up = (value - low) / (high - low)
        return EDGE + across * (WIDTH - EDGE - 12), HEIGHT - 18 - up * (HEIGHT - 40)

    line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
    left, bottom = EDGE - 4, HEIGHT - 18
    said = [
        f'<text x="{EDGE}" y="12" font-size="11">{title}</text>',
        f'<text x="{left}" y="{bottom}" text-anchor="end">{low:.3g}</text>',
        f'<text x="{left}" y="28" text-anchor="end">{high:.3g}</text>',
        f'<text x="{EDGE}" y="{HEIGHT - 4}">step {steps[0]:g}</text>',
        f'<text x="{WIDTH - 12}" y="{HEIGHT - 4}" text-anchor="end">{steps[-1]:g}</text>',
    ]
    if level is not None:
        (x, y), (end, _) = place(steps[0], level), place(steps[-1], level)
        said.append(f'<path d="M{x:.1f},{y:.1f}H{end:.1f}" stroke="{LEVEL}" stroke-dasharray="4 3" fill="none"/>')
    return [*said, f'<polyline points="{line}" stroke="{LINE}" stroke-width="1.5" fill="none"/>']


def curve(run: dict[str, Any], name: str) -> list[tuple[float, float]]:
    """The steps at which a figure was watched, and its values."""
    return [(step, value) for step, value in run["curve"][name] if value is not None]


def evaluated(run: dict[str, Any]) -> list[tuple[float, float]]:
    """The quality at each evaluation, in percent."""
    return [(step, 100 * value) for step, value in run["evaluations"]]


RUNS = [name for name in ("reward", "dpo", "grpo", "ppo") if name in kept("alignment")]
PICTURES = [f"docs/images/alignment-{name}.svg" for name in RUNS]


def picture(path: str) -> str:
    """One of the pictures of docs/alignment.md."""
    run = kept("alignment")
    name = path.removesuffix(".svg").split("-")[-1]
    found = run[name]
    if name == "reward":
        return drawn([("pair accuracy, validation, %", evaluated(found), 50.0)])
    watched = {
        "dpo": {"margin": "margin", "accuracy": "accuracy of the step's pairs"},
        "grpo": {"reward": "reward of drawn answers", "silent": "silent groups, share", "kl": "KL, nats a token"},
        "ppo": {"reward": "reward of drawn answers", "kl": "KL, nats an answer; target", "ended": "answers that end"},
    }
    level = {("ppo", "kl"): found.get("kl_target"), ("dpo", "margin"): 0.0}
    return drawn([(title, curve(found, key), level.get((name, key))) for key, title in watched[name].items()])


def with_interval(found: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    """A difference and its interval."""
    if scale == 1:
        return f"{found[0]:+.2f} ({found[1]:+.2f} to {found[2]:+.2f})".replace("-", "−")
    return f"{signed(scale * found[0])} ({signed(scale * found[1])} to {signed(scale * found[2])})"


def table() -> str:
    """What was reached, and what it took."""
    run = kept("alignment")
    lines = [
        "| run | figure on held-out rows | start | end | change | minutes of training | in all |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in RUNS:
        one = run[name]
        took = f"{number(one['train_seconds'] / 60, 1)} | {number(one['seconds'] / 60, 1)}"
        if name in ("reward", "dpo"):
            low, high = (number(100 * one[f"quality_{end}"], 1) for end in ("low", "high"))
            right = f"{number(100 * one['quality'], 1)} ({low} to {high})"
            lines.append(f"| `{name}` | pairs ordered right, % | 50.0 | {right} | | {took} |")
        if "task" in one:
            task = one["task"]
            start, end = (number(100 * task[key], 1) for key in ("start", "end"))
            change = with_interval(task["difference"])
            lines.append(
                f"| `{name}` | exact match of {task['rows']} questions, % | {start} | {end} | {change} | {took} |"
            )
        if name == "ppo":
            start, end = number(one["start"], 2), number(one["end"], 2)
            change = with_interval(one["difference"], 1)
            lines.append(
                f"| `ppo` | learned reward of {one['rows']} greedy answers | {start} | {end} | {change} | {took} |"
            )
    ppo = run["ppo"]
    lines += [
        "",
        f"PPO's answers are {number(ppo['kl'], 1)} nats ({number(ppo['kl_interval'][0], 1)} to {number(ppo['kl_interval'][1], 1)}) from the reference"
        f" in the mean of its last ten drawings; the target is {ppo['kl_target']:g}."
        f" Runs on the task start from {run['warm']['steps']} steps of supervised tuning, `ppo` from one epoch of it. Differences are paired over the"
        " same rows; in brackets 95 % intervals. A reward is counted in standard deviations of the reward model's test answers.",
        "",
        "`python -m benchmarks.alignment runs/alignment`: " + "; ".join(where(run)) + ".",
    ]
    for name in RUNS:
        lines += ["", f"![curves of {name}](images/alignment-{name}.svg)"]
    return "\n".join(lines)


def where(run: dict[str, Any]) -> list[str]:
    """Which runs ran on which machine."""
    places: dict[str, list[str]] = {}
    for name in RUNS:
        machine = run[name]["machine"]
        threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
        place = f"{machine['cpu']}, {machine['dtype']}, {threads}, torch {machine['torch']}"
        places.setdefault(place, []).append(f"`{name}`")
    return [f"{', '.join(names)} on {place}" for place, names in places.items()]


def samples() -> str:
    """Answers before and after, for docs/results.md."""
    run = kept("alignment")
    lines = ["| run | prompt | start | end |", "|---|---|---|---|"]
    for name in ("dpo", "grpo", "ppo"):
        for sample in run.get(name, {}).get("task", run.get(name, {})).get("samples", ()):
            cells = [_cell(sample[key]) for key in ("prompt", "start", "end")]
            scores = [f" ({score:+.1f})".replace("-", "−") if name == "ppo" else "" for score in sample["scores"]]
            lines.append(f"| {name} | {cells[0]} | {cells[1]}{scores[0]} | {cells[2]}{scores[1]} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """The end of a text, in a cell of a table."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= 160 else "…" + line[-159:]


def alignment_page() -> str:
    """docs/alignment.md with its measured part."""
    text = (ROOT / "docs" / "alignment.md").read_text(encoding="utf-8")
    start, end = (
        "<!-- measured: written by `make docs` from docs/results/alignment.json -->",
        "<!-- end of measured -->",
    )
    before, after = text.split(start)[0], text.split(end)[1]
    return f"{before}{start}\n{table()}\n{end}{after}"
