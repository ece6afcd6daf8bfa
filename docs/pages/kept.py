"""Comparisons and measurements that were kept, and how numbers are written."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def kept(name: str) -> dict[str, Any]:
    """A comparison that was kept."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def keep(run: str, name: str) -> None:
    """Keep a comparison for the documentation."""
    comparison = json.loads((Path(run) / "comparison.json").read_text(encoding="utf-8"))
    for row in comparison["rows"]:
        row.pop("curve")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(comparison, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def signed(value: float) -> str:
    """With its sign, one digit behind the point."""
    return f"{value:+.1f}".replace("-", "−")


def number(value: float, digits: int) -> str:
    """A number without the sign of a rounded zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")
