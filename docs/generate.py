"""Writes the parts of the documentation that follow from the code and from kept results: `make docs`.

A test checks that they are current. `python docs/generate.py keep RUN NAME` keeps the comparison in the folder RUN as
docs/results/NAME.json, without its learning curves.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from graft.data.load import DataConfig
from graft.families import FAMILIES
from graft.methods.base import methods
from graft.methods.table import served_by
from graft.objectives.base import objectives
from graft.recipe import Recipe
from graft.train.loop import Training

HERE = Path(__file__).parent
ROOT = HERE.parent


def settings(cls: type[BaseModel]) -> str:
    """A table of a section's settings."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in cls.model_fields.items():
        if field.description and field.description.startswith("Not used"):
            continue
        default = "required" if field.is_required() else f"`{field.default}`" if field.default_factory is None else "…"
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {default} | {meaning} |")
    return "\n".join(lines)


def recipe_page() -> str:
    """docs/recipes.md."""
    parts = [
        "# Recipes",
        "A recipe is a YAML file; `graft schema` prints its JSON schema, which editors can check against. On the command line"
        " `key=value` replaces a setting: by its bare name where only one section has it, by `section.key` otherwise. Spellings of"
        " other tools (`lr`, `epochs`, `rank`, `batch_size`, …) are read too.",
        "This page is written by `make docs`.",
        "## The recipe",
        settings(Recipe),
        "## data",
        settings(DataConfig),
        "## training",
        settings(Training),
    ]
    for name, objective in objectives().items():
        parts += [f"## objective: {name}", objective.__doc__ or "", settings(objective)]
    for name, method in methods().items():
        parts += [f"## method: {name}", method.__doc__ or "", settings(method)]
    return "\n\n".join(parts) + "\n"


def methods_page() -> str:
    """docs/methods.md."""
    lines = ["| method | function | sees | changes | composition | merges | served by | source |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, method in methods().items():
        view = method.unified
        lines.append(
            f"| `{name}` | {view.function} | {view.sees} | {view.changes} | {view.composition} "
            f"| {'yes' if method.mergeable else 'no'} | {served_by(method)} "
            f"| {method.source} |"
        )
    parts = [
        "# Methods",
        "The methods in the unified view of He et al. (2022, arXiv 2110.04366): h is the output of the place that is changed, Δh what"
        " the method adds, s a scale, λ a softmax weight. `graft methods --model NAME` adds the number of parameters on a base;"
        " [recipes.md](recipes.md) has the settings.",
        "This page is written by `make docs`.",
        "\n".join(lines),
        "*served by*: what serves an adapter attached to its base (PEFT only where its classifier pools as the adapter does, vLLM only"
        " LoRA on decoders without a task head; the card in an adapter folder says it of that folder). A method that merges can be made part of the base (`graft merge`),"
        " and the result runs wherever the base does.",
        "## The matrix",
        matrix(),
        "## References",
        "Methods that `peft` has (LoRA with rsLoRA, ranks by site and embeddings, DoRA, AdaLoRA with its penalty and every step of its"
        " schedule, VeRA, (IA)³, prefix, prompt and P-tuning) equal it to 1e-5 in outputs, loss and gradients on tiny Llama (grouped"
        " queries), GPT-2 and BERT models, and each reads the other's folders with equal logits (`tests/test_peft.py`,"
        " `tests/test_peft_more.py`, `tests/test_adalora.py`, `tests/test_bridge.py`). The others are compared with formulas written out in"
        " `tests/test_formulas.py`.",
        "Where Graft differs from `peft` on purpose: AdaLoRA's default scale is LoRA's, and triplets of equal importance are pruned one by"
        " one, never below the budget; DoRA's dropout leaves the input of the frozen weight alone; (IA)³ sits at keys and values on"
        " every architecture (on GPT-2 at the fused projection, as in peft); a pooler reads the row's first token, not the first virtual one, unless `pool: virtual`.",
        "What cannot work is refused: rows of one T5 batch cannot have relative-position tables of their own (full fine-tuning"
        " that is not exclusive, mixed by row), and T5 takes rows padded on the right only.",
    ]
    return "\n\n".join(parts) + "\n"


def matrix() -> str:
    """How many pairs of a method and an architecture are tested, and which are refused."""
    reasons = [
        (name, kind, reason)
        for name, method in methods().items()
        for kind, family in FAMILIES.items()
        if (reason := method.refuses(family)) is not None
    ]
    pairs = len(methods()) * len(FAMILIES) - len(reasons)
    text = (
        f"{len(methods())} methods on {len(FAMILIES)} architectures: {pairs} pairs, on tiny random models of each. Tested on every"
        " pair: the shapes and the start; that what trains moves and nothing else does; equal gradients with recomputed activations;"
        " rows alone and in one batch with all other methods (but for the exception below), padded on either side; stacking; detaching"
        " bit for bit; saving; merging (BitFit only where linears have biases); and, but for encoders, generating with and without a"
        " cache (`tests/test_methods.py`). Mistral and Gemma 3 are there with"
        " sliding windows shorter than the rows, Gemma 3 is its text model (`gemma3_text`)."
    )
    if not reasons:
        return f"{text} No pair is refused."
    lines = ["| refused method | architecture | reason |", "|---|---|---|"]
    lines += [f"| `{name}` | {kind} | {reason} |" for name, kind, reason in reasons]
    return f"{text} Refused before a model is loaded:\n\n" + "\n".join(lines)


def kept(name: str) -> dict[str, Any]:
    """A comparison that was kept."""
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))


def results_table(comparison: dict[str, Any]) -> str:
    """A comparison as a table."""
    lines = [
        "| method | quality, % | forgets, points | other texts, % | parameters trained | peak memory | training | adapter | latency (merged), ms | rate |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in comparison["rows"]:
        quality = f"{100 * row['quality']:.1f} ({100 * row['quality_low']:.1f} to {100 * row['quality_high']:.1f})"
        transfer = sum(row["transfer"].values()) / len(row["transfer"])
        trained = row["train_seconds"] is not None
        merged = f"{row['merged_latency_ms']:.1f}" if row["merged_latency_ms"] is not None else "–"
        cells = [
            row["label"],
            quality,
            f"{max(row['forgetting'].values()):.1f}" if trained else "–",
            f"{100 * transfer:.1f}",
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


def demo_table() -> str:
    """What stands in the README."""
    comparison = kept("demo")
    return f"{results_table(comparison)}\n\n{described(comparison)}"


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
        " bf16 runs, and DyLoRA draws its ranks from seed and step: their rows can differ a little from what the code gives now.",
        "This page is written by `make docs` from `docs/results/`.",
    ]
    for path in sorted((HERE / "results").glob("*.json")):
        comparison = kept(path.stem)
        parts += [f"## {path.stem}", described(comparison), results_table(comparison), verdict_lines(comparison)]
    return "\n\n".join(parts) + "\n"


def readme() -> str:
    """README.md with the table of the demo."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start, end = "<!-- demo table: written by `make docs` from docs/results/demo.json -->", "<!-- end of demo table -->"
    before, after = text.split(start)[0], text.split(end)[1]
    return f"{before}{start}\n{demo_table()}\n{end}{after}"


def keep(run: str, name: str) -> None:
    """Keep a comparison for the documentation."""
    comparison = json.loads((Path(run) / "comparison.json").read_text(encoding="utf-8"))
    for row in comparison["rows"]:
        row.pop("curve")
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(
        json.dumps(comparison, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


PAGES = {
    "docs/recipes.md": recipe_page,
    "docs/methods.md": methods_page,
    "docs/results.md": results_page,
    "README.md": readme,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        keep(*sys.argv[2:])
    for name, page in PAGES.items():
        (ROOT / name).write_text(page(), encoding="utf-8")
        print(name)
