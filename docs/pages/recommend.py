"""docs/recommend.md: the rules of recommendations."""

from graft.advice.rules import RULES


def recommend_page() -> str:
    """docs/recommend.md."""
    lines = ["| when | rule | source |", "|---|---|---|"]
    lines += [f"| {rule.when} | {rule.says} | {rule.source} |" for rule in RULES.values()]
    parts = [
        "# Recommendations",
        "`graft recommend RECIPE` says which method and settings to take. Comparisons below `runs/` (`--runs`) of the same model and"
        " the same kind of objective come first, then these rules of the field; a rule that a measurement contradicts yields to it, and"
        " the output says so. What is recommended is planned, and changed until it fits. The round numbers in the rules are custom:"
        " the papers bear out the direction, not the figure. Graft plans for one device, so of the rule of full fine-tuning only the"
        " number of rows is looked at.",
        "This page is written by `make docs`.",
        "\n".join(lines),
    ]
    return "\n\n".join(parts) + "\n"
