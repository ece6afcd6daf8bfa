import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
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
TIES = {
    ("full", "lora"): 0.31,
    ("full", "bottleneck"): 0.2,
    ("lora", "bottleneck"): 1.0,
    ("frozen", "prompt"): 0.08,
}


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
        "data": {
            "name": "reviews",
            "train": 3200,
            "validation": 400,
            "test": 1000,
            "labels": ["bad", "good"],
        },
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
    names = {
        "lora": "</script><script>document.title='owned'</script>",
        "full": "a&b \"<b>bold</b>\" 'q' %{x} {{css}}",
    }
    names["prefix"] = "a-very-long-name-of-a-method-" * 3 + "\x1b[31m\nnext [red]line[/red]"
    text = json.dumps(comparison)
    comparison = json.loads(text)
    for row in comparison["rows"]:
        row["label"] = names.get(row["label"], row["label"])
        if row["forgetting"]:
            row["forgetting"] = {
                "<img src=x onerror=alert(1)>": row["forgetting"]["general"],
                "</script>": None,
            }
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


def terminal(comparison: dict, columns: int = 80, width: int | None = None) -> str:
    out = StringIO()
    Console(file=out, width=columns, color_system=None).print(terminal_table(comparison, width))
    return out.getvalue()


# --- sentences ---


def test_summary_names_leaders_cheapest_forgetting_and_failures():
    assert summary(make()) == [
        "full (86.1 %), lora (85.3 %) and bottleneck (84.7 %) lead; no clear difference between full and the others.",
        "base, frozen, prefix and prompt are clearly behind.",
        "Among the leaders, lora has the least memory (610 MB) and the smallest adapter (592 kB); "
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


def test_summary_when_the_base_leads_alone():
    comparison = pick(make(), "base", "prompt")
    comparison["rows"][0]["quality"] = 0.9
    comparison["verdicts"][0].update(outcome="better", p=0.001)
    assert summary(comparison)[:3] == [
        "base (90.0 %) has the highest quality.",
        "No method is clearly better than the untouched base.",
        "prompt is clearly behind.",
    ]


# --- terminal ---


@pytest.mark.parametrize("comparison", [make(1), make(3), make_nasty()], ids=["one", "three", "nasty"])
def test_terminal_table_fits_80_columns(comparison):
    shown = terminal(comparison)
    assert len(shown.splitlines()) > 20
    assert max(map(cell_len, shown.splitlines())) <= 80
    assert "…" not in shown
    assert "\x1b" not in shown


def test_terminal_table_has_the_figures():
    shown = terminal(make())
    for text in ("85.3 (83.1–87.2)", "147 k", "610 MB", "1 min 28 s", "592 kB", "10.4", "36.4", "6.4"):
        assert text in shown
    assert re.search(r"ia3 +failed", shown)
    assert len(re.findall(r"^ lora ", shown, re.MULTILINE)) == 2


def test_wide_terminal_has_one_table():
    shown = terminal(make(), columns=150, width=150)
    assert len(re.findall(r"^ lora ", shown, re.MULTILINE)) == 1


def test_terminal_table_leaves_out_columns_without_figures():
    comparison = make()
    for row in comparison["rows"]:
        row["latency_ms"] = row["transfer"] = None
    shown = terminal(comparison)
    assert "latency" not in shown
    assert "transfer, " not in shown


def test_markup_in_labels_is_not_obeyed():
    comparison = pick(make(), "lora")
    comparison["rows"][0]["label"] = "[red]x[/red]"
    assert "[red]x[/red]" in terminal(comparison)


# --- page ---


def rows_of(page: Page, table: str) -> list[dict]:
    """The attributes of the row headers and cells of one table."""
    ids = [position for position, (_, attributes) in enumerate(page.elements) if attributes.get("id") == table]
    after = page.elements[ids[0] + 1 :]
    end = next((i for i, (tag, _) in enumerate(after) if tag == "section"), len(after))
    return [{"tag": tag, **attributes} for tag, attributes in after[:end] if tag in ("th", "td")]


def test_page_loads_nothing(page, nasty):
    for parsed in (page, nasty):
        loading = [
            value
            for _, attributes in parsed.elements
            for key, value in attributes.items()
            if key in ("src", "href", "srcset", "data", "action", "poster")
        ]
        assert loading == []
        assert len(parsed.styles) == 1
        assert not re.search(r"url\(|@import|http", parsed.styles[0])
        policy = next(
            meta["content"] for meta in parsed.all("meta") if "content" in meta and "default-src" in meta["content"]
        )
        assert policy.startswith("default-src 'none'")
        assert "http" not in policy


def test_page_has_plotly_once_and_the_data(page):
    assert len(page.scripts) == 3
    assert sum("Plotly.react(place" in script for script in page.scripts) == 1
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1
    data = json.loads(page.scripts[0])
    assert [method["name"] for method in data] == list(METHODS)
    assert len({(method["colour"], method["marker"]) for method in data}) == len(METHODS)
    assert len(data[3]["curve"]) == 10


def test_page_says_what_was_found_and_how(page):
    for sentence in summary(make()):
        assert sentence in page.text
    for text in (
        "graft compare recipe.yaml --seeds 3",
        "3200 training rows",
        "25 GB",
        "no bfloat16",
        "2.11.0",
    ):
        assert text in page.text
    assert "Several seeds:" in page.text
    assert "The learning rates are tuned defaults." in page.text
    assert "failed: out of memory after step 12" in page.text


def test_page_with_one_seed_says_what_it_cannot_know(nasty):
    assert "One seed:" in nasty.text
    assert "not training luck" in nasty.text


def test_tables_are_accessible(page):
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("caption")) == len(page.all("table")) == 2
    assert {head["scope"] for head in page.all("th")} == {"row", "col"}
    plots = [div for div in page.all("div") if div.get("class") == "plot"]
    assert len(plots) == 8
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    assert "lora 85.3 (83.1–87.2)" in plots[0]["aria-label"]


def test_figures_table_sorts_by_exact_values(page):
    cells = rows_of(page, "figures")
    heads = [cell for cell in cells if cell.get("scope") == "col"]
    assert len(heads) == 16
    names = [cell["data-value"] for cell in cells if cell.get("scope") == "row"]
    assert names == [*METHODS, "ia3"]
    values = [cell["data-value"] for cell in cells if cell["tag"] == "td" and "data-value" in cell]
    assert len(values) == len(METHODS) * (len(heads) - 1)
    assert values[:3] == ["0.612", "0.0", ""]


def test_matrix_gives_each_pair_both_ways(page):
    cells = [cell for cell in rows_of(page, "verdicts") if cell["tag"] == "td"]
    assert len(cells) == len(METHODS) ** 2
    outcomes = [cell.get("class") for cell in cells]
    assert outcomes.count("better") == outcomes.count("worse") == 21 - len(TIES)
    assert outcomes.count("tie") == 2 * len(TIES)
    titles = {cell["title"] for cell in cells if "title" in cell}
    assert "full minus lora: 0.8 points (95 %: −1.2 to 2.9), p = 0.31" in titles
    assert "lora minus full: −0.8 points (95 %: −2.9 to 1.2), p = 0.31" in titles


def test_nasty_names_stay_text(nasty):
    assert len(nasty.scripts) == 3
    assert {"img", "a", "iframe"} & {tag for tag, _ in nasty.elements} == set()
    assert not [key for _, attributes in nasty.elements for key in attributes if key.startswith("on")]
    assert "</script><script>document.title='owned'</script>" in nasty.text
    assert "a&b \"<b>bold</b>\" 'q' %{x} {{css}}" in nasty.text
    assert "<" not in nasty.scripts[0]
    names = [method["name"] for method in json.loads(nasty.scripts[0])]
    assert "&lt;/script&gt;&lt;script&gt;document.title='owned'&lt;/script&gt;" in names
    assert not any(re.search("[<>]", text) for text in strings(json.loads(nasty.scripts[0])))


def strings(value) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in strings(part)]
    return [value] if isinstance(value, str) else []


def test_page_of_nulls(tmp_path):
    comparison = make()
    for row in comparison["rows"]:
        for key in set(row) - {"label", "method", "status"}:
            row[key] = None
    for key in ("verdicts", "notes", "environment", "model", "data", "title", "created", "command"):
        comparison[key] = None
    write_report(comparison, tmp_path / "report.html")
    assert "No method has a result." in Page(tmp_path / "report.html").text
    assert summary(comparison)[0] == "No method has a result."
    assert terminal(comparison).strip() == ""


def test_write_replaces_the_old_page_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "new folder" / "report.html"
    write_report(make(), path)
    write_report(make_nasty(), path)
    assert "One seed:" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        write_report(make(), path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_importing_the_module_does_not_import_plotly():
    code = "import sys, graft.report; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium to draw the page")
@pytest.mark.parametrize("comparison", [make(3), make_nasty()], ids=["plain", "nasty"])
def test_a_browser_draws_every_plot(comparison, tmp_path):
    write_report(comparison, tmp_path / "report.html")
    options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    options += " --disable-quic --disable-component-update --enable-logging=stderr"
    options += " --virtual-time-budget=5000 --dump-dom"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = ["chromium", *options.split(), profile, (tmp_path / "report.html").as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.count('class="main-svg"') >= 8
    assert "CONSOLE" not in run.stderr
    assert "<title>owned" not in run.stdout
