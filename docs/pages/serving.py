"""docs/serving-speed.md: what benchmarks/serving.py gave."""

import statistics

from pages.kept import kept

THROUGH = "through `graft.generate`"
"""How batches ran in results that do not say it."""


def slowdown(each: dict[str, list[float]], name: str) -> float:
    """How many times the base's latency a variant has: the median over the rounds."""
    return statistics.median(own / base for own, base in zip(each[name], each["base"], strict=True))


def serving_page() -> str:
    """docs/serving-speed.md."""
    run = kept("serving")
    machine, found = run["environment"], run["throughput"]
    tokens = run["rows"] * run["written"]
    batches = ["| batch of 8 | tokens/s | processor time, s |", "| --- | ---: | ---: |"]
    for name, times in found.items():
        pace = tokens / statistics.median(times["seconds"])
        batches.append(f"| {name} | {pace:,.0f} | {statistics.median(times['processor']):.2f} |")
    faster = ["| times as fast | by time | by processor time |", "| --- | ---: | ---: |"]
    for name, ratio in run["ratios"]["seconds"].items():
        faster.append(f"| {name} | {ratio:.2f} | {run['ratios']['processor'][name]:.2f} |")
    variants = list(next(iter(run["latency"].values())))
    late = ["| batch 1, ms | " + " | ".join(variants) + " |", "| --- |" + " ---: |" * len(variants)]
    for figure, each in run["latency"].items():
        cells = [f"{1000 * statistics.median(each[variants[0]]):.1f}"]
        cells += [f"{1000 * statistics.median(each[name]):.1f} ({slowdown(each, name):.2f})" for name in variants[1:]]
        late.append(f"| {figure} | " + " | ".join(cells) + " |")
    mixes = "; ".join(f"*{name}*: {', '.join(mix)}" for name, mix in run["mixes"].items())
    parts = [
        "# Speed of serving",
        "Rows of one batch can go through different adapters of different methods. The parts of all adapters at a"
        " place run as one batched product where they have that form (LoRA, DoRA, AdaLoRA, (IA)³, bottleneck and parallel adapters); others"
        " run one after another on their own rows. Training and compiled code use a product for each adapter.",
        "This page is written by `make docs` from `docs/results/serving.json`.",
        f"{run['model']}, {run['rows']} requests of {run['read']} tokens in and {run['written']} out, greedy, each through an adapter of its own,"
        f" {run.get('through', THROUGH)}; {mixes}. The adapters are random, LoRA of rank 8 at queries and"
        " values, the others with their defaults. peft decodes with transformers' `generate`, with the cache and without gradients: one request"
        " after another (`set_adapter`; several methods each with a base of their own), or LoRA in one batch (`adapter_names`).",
        "\n".join(batches),
        "\n".join(faster),
        "## Latency at batch 1",
        "One row: the processor time of a decoded token after 32, and of a forward pass without the scores of words. In brackets: times the base's"
        " of the same round. LoRA at queries and values, bottleneck adapters after both blocks of every layer.",
        "\n".join(late),
        f"`{run['command']}`, {run['created']}, {run['rounds']} rounds, cases alternating, {run['dtype']}; {machine['cpu']}, {machine['threads']}"
        f" {'thread' if machine['threads'] == 1 else 'threads'} of {machine['cores']} cores; where other work shares the machine, processor time says more"
        f" than time; Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}, peft {machine['peft']}.",
    ]
    return "\n\n".join(parts) + "\n"
