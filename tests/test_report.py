import copy
import json
import math
import os
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from graft.errors import ResourceError
from graft.report import summary, terminal_table, write_report

METHODS = {
    # label: quality, trained parameters, memory, seconds, adapter, latency, merged, probe "general", rate
    "base": (0.612, 0, None, None, 0, 8.1, None, 0.0, None),
    "full": (0.861, 22_713_216, 1.21e9, 142.0, 90_852_864, 8.1, 8.1, 6.4, 5e-5),
    "frozen": (0.732, 770, 2.9e8, 31.0, 3_200, 8.1, 8.1, 0.0, 1e-3),
    "lora": (0.853, 147_456, 6.1e8, 88.0, 592_000, 10.4, 8.1, 1.9, 5e-4),
    "bottleneck": (0.847, 301_824, 6.4e8, 84.0, 1_210_000, 10.9, None, 2.2, 1e-3),
    "prefix": (0.801, 92_160, 5.4e8, 79.0, 370_000, 9.2, None, 0.9, 1e-2),
    "prompt": (0.705, 7_680, 5.6e8, 91.0, 31_500, 9.9, None, -0.3, 3e-2),
}
TIES = {("full", "lora"): 0.31, ("full", "bottleneck"): 0.2, ("lora", "bottleneck"): 1.0, ("frozen", "prompt"): 0.08}


def one_row(label: str) -> dict:
    quality, trained, memory, seconds, size, latency, merged, lost, rate = METHODS[label]
    steps = range(20, 201, 20) if seconds else ()
    curve = [
        {
            "step": step,
            "examples": 16 * step,
            "train_loss": 0.69 * math.exp(-step * quality / 150) + 0.02 * math.sin(step),
            "validation_quality": 0.5 + (quality - 0.5) * (1 - math.exp(-step / 60)) if step % 40 == 0 else None,
        }
        for step in steps
    ]
    return {
        "label": label,
        "method": label,
        "quality": quality,
        "quality_low": quality - 0.022,
        "quality_high": quality + 0.019,
        "trainable_parameters": trained,
        "trainable_fraction": trained / 22_713_216,
        "peak_memory_bytes": memory,
        "train_seconds": seconds,
        "examples_per_second": 3200 / seconds if seconds else None,
        "adapter_bytes": size,
        "latency_ms": latency,
        "merged_latency_ms": merged,
        "forgetting": {"general": lost, "questions": lost / 2 + 0.1},
        "transfer": {"film reviews": quality - 0.05, "tweets": quality - 0.12},
        "learning_rate": rate,
        "seeds": [0, 1, 2],
        "curve": curve,
        "status": "done",
        "cause": None,
    }


def failed_row(label: str, cause: str) -> dict:
    empty = dict.fromkeys(one_row("base"))
    return {**empty, "label": label, "method": label, "status": "failed", "cause": cause}


def make(seeds: int = 3) -> dict:
    labels = list(METHODS)
    verdicts = []
    for position, first in enumerate(labels):
        for second in labels[position + 1 :]:
            gap = METHODS[first][0] - METHODS[second][0]
            p = TIES.get((first, second))
            outcome = "tie" if p else "better" if gap > 0 else "worse"
            ends = {"difference": gap, "low": gap - 0.02, "high": gap + 0.021, "p": p or 0.0004}
            verdicts.append({"first": first, "second": second, "outcome": outcome, **ends})
    return {
        "title": "Sentiment of product reviews",
        "created": "2025-11-22T10:15:00+00:00",
        "command": "graft compare recipe.yaml --seeds 3",
        "model": {"name": "small-encoder", "parameters": 22_713_216, "architecture": "bert"},
        "data": {"name": "reviews", "train": 3200, "validation": 400, "test": 1000, "labels": ["bad", "good"]},
        "objective": "classify",
        "seeds": list(range(seeds)),
        "environment": {
            "python": "3.11.9",
            "torch": "2.11.0",
            "transformers": "5.17.0",
            "cpu": "Example CPU at 2.4 GHz",
            "cores": 2,
            "memory_bytes": 25_000_000_000,
            "dtype": "float32",
            "dtype_reason": "this CPU has no bfloat16 units",
        },
        "rows": [*map(one_row, labels), failed_row("ia3", "out of memory after step 12")],
        "verdicts": verdicts,
        "notes": ["The learning rates are tuned defaults.", "lora: 2 targets matched 12 layers."],
    }


def make_nasty() -> dict:
    comparison = make(1)
    names = {"lora": "</script><script>document.title='owned'</script>", "full": "a&b \"<b>bold</b>\" 'q' %{x} {{css}}"}
    names["prefix"] = "a-very-long-name-of-a-method-" * 3 + "\x1b[31m\nnext [red]line[/red]"
    text = json.dumps(comparison)
    comparison = json.loads(text)
    for row in comparison["rows"]:
        row["label"] = names.get(row["label"], row["label"])
        if row["forgetting"]:
            row["forgetting"] = {"<img src=x onerror=alert(1)>": row["forgetting"]["general"], "</script>": None}
    for verdict in comparison["verdicts"]:
        for end in ("first", "second"):
            verdict[end] = names.get(verdict[end], verdict[end])
    comparison["title"] = comparison["command"] = "<script>alert(1)</script>"
    comparison["notes"] = ["<a href='http://example.org'>x</a>"]
    comparison["rows"][2]["quality"] = float("nan")
    comparison["rows"][4]["curve"] = None
    comparison["rows"][5]["cause"] = None
    return comparison


class Page(HTMLParser):
    """Elements with their attributes, text outside scripts and styles, and the scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append("")
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if not self.open:
            self.text += data
        elif self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.styles[-1] += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(make(), path)
    return Page(path)


@pytest.fixture(scope="module")
def nasty(tmp_path_factory) -> Page:
    path = tmp_path_factory.mktemp("nasty") / "report.html"
    write_report(make_nasty(), path)
    return Page(path)


def terminal(comparison: dict, width: int = 80, **options) -> str:
    out = StringIO()
    Console(file=out, width=width, color_system=None, legacy_windows=False).print(terminal_table(comparison, **options))
    return out.getvalue()


# --- sentences ---


def test_summary_names_leaders_cheapest_forgetting_and_failures():
    assert summary(make()) == [
        "full (86.1 %), lora (85.3 %) and bottleneck (84.7 %) lead; "
        "no clear difference between full and the others.",
        "base, frozen, prefix and prompt are clearly behind.",
        "Of these, lora has the least memory (610 MB) and the smallest adapter (592 kB); "
        "bottleneck has the shortest training (1 min 24 s).",
        "full forgot most: 6.4 points on general.",
        "ia3 failed: out of memory after step 12.",
    ]


def pick(comparison: dict, *labels: str) -> dict:
    comparison = copy.deepcopy(comparison)
    comparison["rows"] = [row for row in comparison["rows"] if row["label"] in labels]
    comparison["verdicts"] = [v for v in comparison["verdicts"] if {v["first"], v["second"]} <= set(labels)]
    return comparison


def test_summary_of_two_leaders_gives_p():
    sentences = summary(pick(make(), "full", "lora", "prompt"))
    assert sentences[0] == "full (86.1 %) and lora (85.3 %) lead; no clear difference between them (p = 0.31)."
    assert sentences[1] == "prompt is clearly behind."


def test_summary_of_one_leader_and_of_a_lone_row():
    assert summary(pick(make(), "full", "prompt"))[:2] == [
        "full (86.1 %) has the highest quality.",
        "prompt is clearly behind.",
    ]
    assert summary(pick(make(), "full"))[0] == "full (86.1 %) has the highest quality."


def test_summary_says_when_nothing_beats_the_base():
    comparison = pick(make(), "base", "prompt")
    comparison["verdicts"][0].update(outcome="tie", p=0.4)
    assert "No method is clearly better than the untouched base." in summary(comparison)


def test_summary_without_results():
    comparison = pick(make(), "ia3")
    assert summary(comparison) == ["No method has a result.", "ia3 failed: out of memory after step 12."]


def test_summary_without_forgetting():
    comparison = pick(make(), "frozen", "prompt")
    for row in comparison["rows"]:
        row["forgetting"] = {"general": 0.0}
    assert "No method lost quality on a probe." in summary(comparison)


# --- terminal ---


@pytest.mark.parametrize("comparison", [make(1), make(3), make_nasty()], ids=["one", "three", "nasty"])
def test_terminal_table_fits_80_columns(comparison):
    lines = terminal(comparison).splitlines()
    assert len(lines) > 15
    assert max(map(cell_len, lines)) <= 80
    assert "…" not in "".join(lines)


def test_terminal_table_has_figures_and_causes():
    shown = terminal(make())
    for text in ("85.3 (83.1–87.2)", "147 k", "610 MB", "1 min 28 s", "592 kB", "10.4", "36.4", "6.4"):
        assert text in shown
    assert "ia3 failed: out of memory after step 12." in shown
    assert len(re.findall(r"^ *lora ", shown, re.MULTILINE)) == 2


def test_wide_terminal_has_one_table():
    shown = terminal(make(), width=150, **{"width": 150} if False else {})
    assert len(re.findall(r"^ *lora ", shown, re.MULTILINE)) == 2
