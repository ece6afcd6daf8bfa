"""README.md with its tables."""

from pages.comparisons import described, results_table
from pages.kept import ROOT, kept, signed


def demo_table() -> str:
    """What stands in the README."""
    comparison = kept("demo")
    return f"{results_table(comparison)}\n\n{described(comparison)}"


def chat_table() -> str:
    """Five methods on the questions of `make demo-chat`."""
    comparison = kept("family-methods")
    return f"{results_table(comparison)}\n\n{described(comparison)}"


def qlora_table() -> str:
    """LoRA on a base in bf16 and in nf4."""
    run = kept("qlora")
    lines = [
        "| base | weights of the base | exact match, % | peak memory of training | seconds a step |",
        "|---|---|---|---|---|",
    ]
    for label, row in run["rows"].items():
        quality, low, high = (100 * value for value in row["quality"])
        lines.append(
            f"| {'nf4' if label == 'QLoRA' else 'bf16'} ({label}) | {row['weights']['model'] / 1e6:.0f} MB | {quality:.1f} ({low:.1f} to {high:.1f})"
            f" | {row['peak_memory_bytes'] / 2**30:.2f} GiB | {row['seconds_per_step']:.2f} |"
        )
    difference, low, high, _ = (100 * value for value in run["difference"])
    machine = run["environment"]
    lines.append(
        f"\nQLoRA minus LoRA: {signed(difference)} points ({signed(low)} to {signed(high)}), paired over the same questions. `python benchmarks/qlora.py`,"
        f" commit {machine['commit'][:7]}: {machine['cpu']}, {machine['threads']} threads beside other work, torch {machine['torch']}."
    )
    return "\n".join(lines)


def readme() -> str:
    """README.md with the tables of the demos."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = {"demo": ("demo", demo_table), "chat": ("family-methods", chat_table), "qlora": ("qlora", qlora_table)}
    for place, (name, table) in tables.items():
        start = f"<!-- {place} table: written by `make docs` from docs/results/{name}.json -->"
        end = f"<!-- end of {place} table -->"
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n{table()}\n{end}{after}"
    return text
