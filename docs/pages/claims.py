"""docs/claims.md: what people say about fine-tuning, measured."""

from pages.duplicates import duplicates_section, duplicates_verdict
from pages.numbers import numbers_table

CLAIMS = {"Duplicated rows make a model repeat itself": (duplicates_verdict, duplicates_section)}
"""Each claim with its verdict in a line and its section."""


def claims_page() -> str:
    """docs/claims.md."""
    lines = ["| claim | verdict |", "|---|---|"]
    parts = []
    for title, (verdict, section) in CLAIMS.items():
        lines.append(f"| [{title}](#{title.lower().replace(' ', '-')}) | {verdict()} |")
        parts += [f"## {title}", section()]
    head = [
        "# Claims",
        "What people say about fine-tuning, measured with Graft. Each is one model and one set of data: a verdict says what happened"
        " here and what a comparison has to hold equal; it is not a law.",
        "This page is written by `make docs` from `docs/results/`.",
        "\n".join(lines),
    ]
    more = [
        "## Numbers people repeat",
        "Counts and plans are made by `python docs/claims.py` on the shapes of the models, with the parts and the training step that a run"
        " has; a plan here is of live tensors, without what a card's libraries and its allocator take beside (600 MiB and 5 %"
        " are what `graft plan` adds). What is measured comes from `docs/results/all-methods.json`, whose times are rough ([results.md](results.md)).",
        numbers_table(),
    ]
    return "\n\n".join([*head, *more, *parts]) + "\n"
