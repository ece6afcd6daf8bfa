"""What to change: the settings that findings name, as lines of a diff and as assignments of a command line."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from graft.diagnosis.curve import Finding


def assignments(findings: Sequence[Finding]) -> list[str]:
    """`key=value` of every change, each key once: the first finding that names it decides."""
    chosen: dict[str, Any] = {}
    for finding in findings:
        for key, value in finding.changes.items():
            chosen.setdefault(key, value)
    return [f"{key}={_written(value)}" for key, value in chosen.items()]


def diff(recipe: Mapping[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """What changes remove from recipe.yaml and add to it, by dotted key. Without a recipe, what they add."""
    lines = []
    for key, value in changes.items():
        found: Any = recipe
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if recipe:
            lines.append(f"- {key}: {_written(found)}")
        lines.append(f"+ {key}: {_written(value)}")
    return lines


def advice(finding: Finding) -> str:
    """The ranked causes of a finding, and the settings to try, in one line."""
    told = []
    if finding.causes:
        ranked = [f"{rank}. {cause}" for rank, cause in enumerate(finding.causes, 1)]
        one = len(ranked) == 1
        told.append(f"likely cause: {finding.causes[0]}" if one else f"likely causes: {', '.join(ranked)}")
    if finding.changes:
        told.append(f"try {' '.join(assignments([finding]))}")
    return "; ".join(told)


def _written(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(yaml.safe_dump(value, default_flow_style=True, width=10_000)).removesuffix("...\n").strip()
