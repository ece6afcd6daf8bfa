"""Labels that are few, rare, or the same but for case, spaces or the way they are written."""

from collections.abc import Iterator, Mapping

from graft.curation.findings import EXAMPLES, Example, Finding, Severity

_NOTHING = {"nan", "none", "null", "n/a", "na", "unknown", "?", "-"}
_FEW = 0.04
"""Share of the rows that a label would have if all were equally frequent, below which it is told."""


def label_findings(labels: Mapping[str, int], places: Mapping[str, str]) -> Iterator[Finding]:
    """What is wrong with labels; `labels` counts their rows and `places` has the first row of each."""
    total = sum(labels.values())
    if not total:
        return

    def finding(name: str, severity: Severity, concerned: list[str], means: str, advice: str) -> Finding:
        count = sum(labels[label] for label in concerned)
        examples = tuple(Example(places[label], f"{label!r}: {labels[label]:,} rows") for label in concerned[:EXAMPLES])
        return Finding(name, count, count / total, severity, means, advice, examples)

    if len(labels) == 1:
        yield finding("one-label", "error", list(labels), "all rows have the same label", "add rows of another label")
        return
    folded: dict[str, list[str]] = {}
    for label in labels:
        folded.setdefault(" ".join(label.casefold().split()), []).append(label)
    twins = [label for given in folded.values() if len(given) > 1 for label in given]
    if twins:
        means = "labels differ by case or spaces only, so they count as different"
        yield finding("label-spelling", "warning", twins, means, "write each label in one way")
    numbers = [label for label in labels if _is_number(label)]
    if 0 < len(numbers) < len(labels):
        fewer = min(numbers, [label for label in labels if label not in numbers], key=len)
        means = f"{len(numbers)} of {len(labels)} labels are numbers, the others words"
        yield finding("label-kinds", "warning", fewer, means, "use names or numbers, not both")
    nothing = [label for label in labels if label.strip().casefold() in _NOTHING]
    if nothing:
        yield finding("label-missing", "warning", nothing, "a label says that there is none", "drop these rows")
    rare = [label for label in labels if labels[label] == 1]
    if rare:
        means = "a label with one row is in training or in the test, never in both"
        yield finding("label-rare", "warning", rare, means, "add rows, or join labels")
    small = [label for label, count in labels.items() if 1 < count < _FEW * total / len(labels)]
    if small:
        means = "labels have so few rows that a model can do well without ever giving them"
        yield finding("label-balance", "note", small, means, "add rows, and do not read accuracy alone")


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True
