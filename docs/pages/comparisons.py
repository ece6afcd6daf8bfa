"""docs/results.md and the tables of the README that are comparisons."""

from typing import Any

from pages.alignment import samples
from pages.kept import RESULTS, kept


def results_table(comparison: dict[str, Any]) -> str:
    """A comparison as a table; of language models with loss and the share of answers that ended."""
    nats = comparison.get("forgetting_unit") == "nats"
    heads = ["method", f"{comparison['metric']}, %" if nats else "quality, %", *(["loss", "ended, %"] if nats else [])]
    heads += ["forgets, nats" if nats else "forgets, points", "other data, %" if nats else "other texts, %"]
    heads += ["parameters trained", "peak memory", "training", "adapter", "latency (merged), ms", "rate"]
    moved = any(row["transfer"] for row in comparison["rows"])
    heads = [head for head in heads if moved or not head.startswith("other")]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in comparison["rows"]:
        quality = f"{100 * row['quality']:.1f} ({100 * row['quality_low']:.1f} to {100 * row['quality_high']:.1f})"
        trained = row["train_seconds"] is not None
        merged = f"{row['merged_latency_ms']:.1f}" if row["merged_latency_ms"] is not None else "–"
        further = [f"{row['figures']['loss']:.2f}", f"{100 * row['figures']['ended']:.0f}"] if nats else []
        worst = max(row["forgetting"].values(), default=0.0)
        forgets = (f"{worst:.2f}" if nats else f"{worst:.1f}").replace("-", "−")
        transfer = [f"{100 * sum(row['transfer'].values()) / len(row['transfer']):.1f}"] if moved else []
        cells = [
            row["label"],
            quality,
            *further,
            forgets if trained else "–",
            *transfer,
            f"{row['trainable_parameters']:,} ({row['trainable_fraction']:.2%})" if trained else "–",
            f"{row['peak_memory_bytes'] / 2**30:.2f} GiB" if trained else "–",
            f"{row['train_seconds']:.0f} s" if trained else "–",
            f"{row['adapter_bytes'] / 1e6:.2f} MB" if trained else "–",
            f"{row['latency_ms']:.1f} ({merged})" if trained else f"{row['latency_ms']:.1f}",
            f"{row['learning_rate']:g}" if trained else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def described(comparison: dict[str, Any]) -> str:
    """How a kept comparison was run."""
    machine, data = comparison["environment"], comparison["data"]
    seeds = comparison["seeds"]
    return (
        f"`{comparison['command']}`, {comparison['created'][:10]}, commit {(machine['commit'] or 'unknown')[:7]}: {data['train']:,} training rows, {data['test']:,} test rows, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['dtype']} ({machine['dtype_reason']}); Python {machine['python']}, "
        f"torch {machine['torch']}, transformers {machine['transformers']}."
    )


def verdict_lines(comparison: dict[str, Any]) -> str:
    """The pairs that differ clearly, and the ties; with more than eight rows, those of the best row only."""
    if len(comparison["rows"]) > 8:
        return best_lines(comparison)
    clear, ties = [], []
    for verdict in comparison["verdicts"]:
        first, second = verdict["first"], verdict["second"]
        if verdict["outcome"] == "tie":
            ties.append(f"{first} and {second} (p = {verdict['p']:.2g})")
            continue
        better, worse = (first, second) if verdict["outcome"] == "better" else (second, first)
        clear.append(f"{better} over {worse} ({100 * abs(verdict['difference']):.1f} points, p = {verdict['p']:.2g})")
    return f"Clear differences: {'; '.join(clear) or 'none'}.\n\nNo clear difference: {'; '.join(ties) or 'none'}."


def best_lines(comparison: dict[str, Any]) -> str:
    """What is clearly worse than the row of the highest quality, and what is not; quality by rank where there is one."""
    best = max(comparison["rows"], key=lambda row: row["quality"])["label"]
    ties, worse = [], []
    for verdict in comparison["verdicts"]:
        if best in (verdict["first"], verdict["second"]):
            other = verdict["second"] if verdict["first"] == best else verdict["first"]
            points = f"{other} ({100 * abs(verdict['difference']):.1f} points, p = {verdict['p']:.2g})"
            (ties if verdict["outcome"] == "tie" else worse).append(points)
    lines = [f"Against {best}, the highest: no clear difference for {'; '.join(ties) or 'none'}."]
    lines.append(f"Clearly worse: {'; '.join(worse) or 'none'}.")
    for row in comparison["rows"]:
        if row.get("by_rank"):
            ranks = ", ".join(f"{rank}: {100 * quality:.1f}" for rank, quality in row["by_rank"].items())
            lines.append(f"{row['label']} at each rank from one training (mean of the seeds, %): {ranks}.")
    return "\n\n".join(lines)


def results_page() -> str:
    """docs/results.md."""
    parts = [
        "# Results",
        "Kept comparisons, with their recipes. Quality is accuracy on test rows, with its 95 % interval; forgetting is the worst of"
        " two retrieval probes, in points of recall@10; *other texts* is the mean accuracy on tweets, product reviews and editorials"
        " without training on them. Verdicts are paired over the same test rows (and seeds), Holm-adjusted. The machines are shared"
        " and noisy: `movie-reviews` ran on one thread beside other work, and of `all-methods` two trials at a time, on one thread each,"
        " beside other work, so of their times only the order of size means something. *rate* is the learning rate, each method's own"
        " default from the sweeps in [log.md](log.md); `movie-reviews` has the defaults of an earlier sweep. Since the commit of `all-methods`, DoRA and (IA)³ keep their scales in fp32 in"
        " bf16 runs, and DyLoRA draws its ranks from seed and step: their rows can differ a little from what the code gives now."
        " `family-methods` is of a chat model: quality is the share of its answers that are exact, forgetting the nats per token that the loss on"
        " general texts rose by, *other data* exact match on questions of another task; its trials ran one after another beside other work, with"
        " rates that were chosen once, but for LoRA's two: the first is that of many recipes, and too small here.",
        " All were measured before the engine (decision 7), so times and memory are larger than they would be now.",
        "This page is written by `make docs` from `docs/results/`.",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        comparison = kept(path.stem)
        if "rows" not in comparison or "verdicts" not in comparison:  # in claims.md and benchmarks.md
            continue
        parts += [f"## {path.stem}", described(comparison), results_table(comparison), verdict_lines(comparison)]
    parts += ["## alignment", "Answers of the policies of [alignment.md](alignment.md) to the first held-out prompts,"
              " before and after; for PPO with the learned reward.", samples()]  # fmt: skip
    return "\n\n".join(parts) + "\n"
