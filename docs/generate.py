"""Writes the parts of the documentation that follow from the code and from kept results: `make docs`.

A test checks that they are current. `python docs/generate.py keep RUN NAME` keeps the comparison in the folder RUN as
docs/results/NAME.json, without its learning curves.
"""

import inspect
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from graft.data.load import DataConfig
from graft.engine.settings import Engine
from graft.families import FAMILIES
from graft.methods.base import methods
from graft.methods.table import served_by
from graft.objectives.base import objectives
from graft.recipe import Recipe
from graft.recommend import RULES
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
        "## engine",
        inspect.getdoc(Engine) or "",
        settings(Engine),
    ]
    for name, objective in objectives().items():
        parts += [f"## objective: {name}", inspect.getdoc(objective) or "", settings(objective)]
    for name, method in methods().items():
        parts += [f"## method: {name}", inspect.getdoc(method) or "", settings(method)]
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


def signed(value: float) -> str:
    """With its sign, one digit behind the point."""
    return f"{value:+.1f}".replace("-", "−")


def kept(name: str) -> dict[str, Any]:
    """A comparison that was kept."""
    return json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))


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
        " bf16 runs, and DyLoRA draws its ranks from seed and step: their rows can differ a little from what the code gives now."
        " `family-methods` is of a chat model: quality is the share of its answers that are exact, forgetting the nats per token that the loss on"
        " general texts rose by, *other data* exact match on questions of another task; its trials ran one after another beside other work, with"
        " rates that were chosen once, but for LoRA's two: the first is that of many recipes, and too small here.",
        " All were measured before the engine (decision 7), so times and memory are larger than they would be now.",
        "This page is written by `make docs` from `docs/results/`.",
    ]
    for path in sorted((HERE / "results").glob("*.json")):
        comparison = kept(path.stem)
        if "rows" not in comparison or "verdicts" not in comparison:  # in claims.md and benchmarks.md
            continue
        parts += [f"## {path.stem}", described(comparison), results_table(comparison), verdict_lines(comparison)]
    return "\n\n".join(parts) + "\n"


CONDITIONS = {
    "base": "not trained",
    "copies": "N rows, each several times in the file, one epoch",
    "spread": "that file with steps drawn without regard to length, where Graft puts rows of like length together",
    "cleaned": "that file through `graft data clean`: N rows, one epoch",
    "different": "as many rows as in *copies*, all different, one epoch",
    "epochs": "the N rows of *cleaned*, as many epochs as *copies* has copies",
}
"""The conditions of benchmarks/duplicates.py."""

COLUMNS = {
    "held_loss": ("loss, held-out texts", 1, 2),
    "train_loss": ("loss, the N rows", 1, 2),
    "repeated_3": ("repeated 3-grams, %", 100, 1),
    "repeated_4": ("repeated 4-grams, %", 100, 1),
    "repeated_4_to_end": ("4-grams up to the end, %", 100, 1),
    "doubled": ("a word doubled, %", 100, 1),
    "ended": ("ended, %", 100, 0),
    "copied": ("8 words of a row, %", 100, 0),
    "copied_when_prompted": ("the same, rows prompted, %", 100, 0),
    "longest_when_prompted": ("longest run, rows prompted", 1, 1),
    "distinct": ("different samples, %", 100, 0),
    "variety": ("different 4-grams, %", 100, 1),
}
"""The figures of benchmarks/duplicates.py: heading, factor, digits."""


def cell(figure: dict[str, Any], factor: int, digits: int) -> str:
    """A mean with its interval."""
    mean, low, high = (number(factor * value, digits) for value in figure["value"])
    return f"{mean} ({low} to {high})"


def number(value: float, digits: int) -> str:
    """A number without the sign of a rounded zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def duplicates_table(run: dict[str, Any]) -> str:
    """The conditions of one run of benchmarks/duplicates.py."""
    lines = ["| condition | steps | " + " | ".join(heading for heading, _, _ in COLUMNS.values()) + " |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for condition in (name for name in CONDITIONS if name in run["conditions"]):
        steps = run["trained"][condition][0]["steps"] if condition in run["trained"] else "–"
        figures = run["conditions"][condition]
        cells = [cell(figures[name], factor, digits) for name, (_, factor, digits) in COLUMNS.items()]
        lines.append(f"| {condition} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences_table(run: dict[str, Any]) -> str:
    """*copies* minus every other condition, paired, with the mean of each seed."""
    names = ("held_loss", "repeated_4", "repeated_4_to_end", "doubled", "longest_when_prompted", "variety")
    lines = [
        "| *copies* minus | " + " | ".join(COLUMNS[name][0] for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for condition in (name for name in CONDITIONS if name in run["differences"]):
        cells = []
        for name in names:
            _, factor, digits = COLUMNS[name]
            figure = run["differences"][condition][name]
            each = ", ".join(number(factor * mean, digits) for mean in figure["seeds"])
            cells.append(f"{cell(figure, factor, digits)}; {each}")
        lines.append(f"| {condition} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def duplicates_section() -> str:
    """What benchmarks/duplicates.py gave."""
    run = kept("duplicates")
    machine, n = run["environment"], run["rows"]
    conditions = [f"*{name}*: {what}" for name, what in CONDITIONS.items() if name in run["conditions"]]
    seconds = {name: statistics.mean(one["seconds"] for one in runs) for name, runs in run["trained"].items()}
    commits = " to ".join(dict.fromkeys(commit[:7] for commit in run["commits"]))
    parts = [
        "**Claim.** Duplicates in the training set make a model repeat itself; cleaning the data repairs it.",
        f"**Measured.** smollm2-135m, `objective: pretrain` on film reviews of 18 to 45 words (N = {n}, each {run['copies']} times),"
        " LoRA r = 16 on all linears, rate 1e-3, batch 8, the last step kept. " + "; ".join(conditions) + ".",
        f"`{run['command']}`, {run['created']}, the working tree after commit {commits}, seeds {', '.join(map(str, run['seeds']))}"
        f" (*spread*: seed {run['seeds'][0]} only); {machine['cpu']}, one thread beside other work, {machine['dtype']}; Python {machine['python']},"
        f" torch {machine['torch']}, transformers {machine['transformers']}. Training took "
        + ", ".join(f"{seconds[name]:.0f} s ({name})" for name in CONDITIONS if name in seconds)
        + "; the machine was shared, so of these only the order of size means something.",
        duplicates_table(run),
        f"*loss*: nats per token, {run['held_texts']} held-out texts. *repeated n-grams*: share of the n-grams of tokens of an output that stand"
        f" before in it (seq-rep-n, Welleck et al. 2020), in greedy continuations of 64 tokens of the first 5 words of {run['prompts']} held-out"
        " texts, without a stop; *up to the end*: the same before the model's own end of text (*ended*: how many have one). *a word doubled*: continuations, after the first words of held-out texts and of the N rows, in which a word"
        " stands twice or more in a row. *8 words of a row*:"
        " continuations with 8 words in a row of a training row, after the first words of held-out texts, and *rows prompted* after those of"
        f" {run['training_prompts']} of the N rows; *longest run*: most words in a row shared with one of the N rows. *different samples*, *different"
        f" 4-grams* (of words): among 8 samples (temperature 0.7) of each of {run['sampled_prompts']} held-out prompts. In brackets 95 % intervals over prompts or"
        " texts (bootstrap of the mean of the seeds); they do not hold the luck of the training, for which the next table has each seed.",
        differences_table(run),
        "Behind the semicolon the seeds one by one.",
        duplicates_words(run),
    ]
    return "\n\n".join(parts)


def mean_of(run: dict[str, Any], condition: str, name: str) -> str:
    """A figure of a condition, as the table has it."""
    _, factor, digits = COLUMNS[name]
    return f"{factor * run['conditions'][condition][name]['value'][0]:.{digits}f}"


def duplicates_words(run: dict[str, Any]) -> str:
    """The verdict in words; tests/test_claims.py checks that the figures bear them out."""

    def of(name: str, *conditions: str) -> list[str]:
        return [mean_of(run, condition, name) for condition in conditions]

    repeats = of("repeated_4", "base", "copies", "cleaned", "different", "epochs")
    whole = of("repeated_4_to_end", "copies", "cleaned", "different")
    twice = of("doubled", "base", "copies", "cleaned", "different", "epochs")
    held = of("held_loss", "base", "copies", "cleaned", "different", "epochs", "spread")
    seen, distinct = of("train_loss", "copies", "epochs"), run["distinct_rows_per_step"]
    recited = of("copied_when_prompted", "copies", "epochs", "spread")
    again = run["conditions"]["copies"]["copied"]["seeds"]
    first = {name: runs[0]["validation_loss"] for name, runs in run["trained"].items()}
    best = {name: min(losses, key=losses.__getitem__) for name, losses in first.items()}
    return "\n\n".join(
        [
            "**Verdict.** *Repetition: no more of it.* Trained on rows that stand ten times in the file, the model repeats"
            f" {repeats[1]} % of its 4-grams, less than before training ({repeats[0]} %), after cleaning ({repeats[2]} %) or on different rows"
            f" ({repeats[3]} %); up to the model's own end of text there is little in all of them ({whole[0]}, cleaned {whole[1]}, different {whole[2]} %). A word doubled is"
            f' there in {twice[1]} % of the continuations (one went on with "bizarrely" to the end) and in {twice[2]} % after cleaning, which is what the'
            f" claim says; but also in {twice[0]} % before training, {twice[3]} % with different rows and {twice[4]} % with epochs."
            f" One thing only *copies* has: with seed {run['seeds'][1]}, {round(again[1] * run['prompts'])} of {run['prompts']} continuations hold 8 words"
            ' of a training row, five of them the same ("the best movie of its kind since Brazil", after their own end of text); with'
            f" seed {run['seeds'][0]}, {round(again[0] * run['prompts']) or 'none'}.",
            "*Harm: real, and of another kind.* The copies were learned instead of anything that carries over: loss"
            f" {seen[0]} on their own texts, {held[1]} on held-out ones, where the untrained base has {held[0]}. Cleaning does"
            f" help: {held[2]}, in a tenth of the steps. The same budget on different rows helps most: {held[3]}.",
            "*But it is the passes, not the copies in the file.* The cleaned rows, without a duplicate among them, trained for as many steps"
            f" (*epochs*), are the worst of all: {held[4]} on held-out texts, {seen[1]} on their own, and {recited[1]} % of the continuations of a"
            f" training row's first words recite 8 words or more of a row ({recited[0]} % in *copies*). A copy is a weaker epoch, for the most part because Graft"
            " puts rows of like length into one step, where copies meet and count as one row of more weight: a step of *copies* has"
            f" {distinct['copies']:.1f} different rows of 8, one of *epochs* {distinct['epochs']:.0f}. Drawn without regard to length (*spread*, {distinct['spread']:.1f}"
            f" different rows) copies come to {held[5]}, most of the way to epochs, and recite in {recited[2]} %, less than half of it; the rest is not explained here.",
            "**What would have been concluded wrongly without *epochs*.** From *copies* and *cleaned* alone: duplicates ruin a model and make it double"
            " words, cleaning repairs both. But *cleaned* is better for having trained a tenth as long; cleaned data trained as long as before is worse than the"
            " duplicates were. Cleaning a file shortens an epoch: keep the number of epochs, not the number of steps.",
            "**What helps.** Cleaning, since it shows how few rows there are, and lets the same budget go to different ones; and the validation"
            f" loss, which was lowest at step {best['copies']} of *copies* and {best['epochs']} of *epochs*, of four evaluated ones (seed {run['seeds'][0]}):"
            " `load_best_model_at_end`, on by default and off here, ends there.",
            "**Limits.** One small model, short texts, one rate (high for ten passes), ten exact copies of every row. Not measured: a few rows"
            " copied very often among many others, near duplicates, dialogues, larger models.",
        ]
    )


def duplicates_verdict() -> str:
    """The verdict in a line."""
    run = kept("duplicates")
    losses = [mean_of(run, name, "held_loss") for name in ("copies", "cleaned", "different", "epochs")]
    return (
        f"Not seen: 4-grams repeated inside an output {mean_of(run, 'copies', 'repeated_4')} % with ten copies of each row, {mean_of(run, 'cleaned', 'repeated_4')} % cleaned."
        f" Copies do overfit (held-out loss {losses[0]}; cleaned {losses[1]}; different rows {losses[2]}), but as repeated passes do:"
        f" ten epochs of the cleaned rows are worse ({losses[3]})."
    )


CLAIMS = {"Duplicated rows make a model repeat itself": (duplicates_verdict, duplicates_section)}
"""Each claim with its verdict in a line and its section."""


def numbers_table() -> str:
    """The numbers that people repeat, beside what docs/claims.py and the kept comparisons give."""
    lines = ["| claim | Graft | verdict |", "|---|---|---|"]
    lines += [f"| {claim} | {found} | {verdict} |" for claim, found, verdict in [*counted(), *planned(), *compared()]]
    return "\n".join(lines)


def holds(good: bool, otherwise: str = "wrong") -> str:
    """A verdict in a word."""
    return "holds" if good else otherwise


def counted() -> list[tuple[str, str, str]]:
    """Claims on parameters, what is counted, and verdicts."""
    run = kept("claims")
    count, whole = run["counts"], run["parameters"]

    def share(name: str, model: str) -> float:
        return float(100 * count[name] / whole[model])

    saved = 100 * (1 - count["one_matrix"] / 1024**2)
    ways = {"bottleneck": 3.0, "lora": 0.5, "prefix": 0.1, "ptuning_v2": 0.2}
    shares = {way: share(f"bert_base_{way}", "bert-base") for way in ways}
    near = [way for way, said in ways.items() if said / 1.5 <= shares[way] <= said * 1.5]
    gpt, bert, code = count["gpt3_lora"], share("bert_base_lora", "bert-base"), count["codellama_lora"]
    return [
        (
            "a 1024×1024 weight at r = 8: 16,384 parameters, 98.4 % fewer",
            f"count: {count['one_matrix']:,}, {saved:.1f} % fewer",
            holds(count["one_matrix"] == 16_384 and f"{saved:.1f}" == "98.4"),
        ),
        ("BERT-base, r = 8 on q and v: 0.02 % trainable", f"count: {bert:.2f} %", holds(abs(bert - 0.02) < 0.005)),
        (
            "CodeLlama-13B, r = 8 on q and v: 13 M",
            f"count: {code / 1e6:.2f} M",
            holds(abs(code / 13e6 - 1) < 0.05, "wrong: half of it"),
        ),
        (
            "GPT-3 175B, LoRA: 4.7 M, 0.0027 %",
            f"count, r = 1 on q and v: {gpt / 1e6:.2f} M, {share('gpt3_lora', 'gpt3-175b'):.4f} %",
            holds(f"{gpt / 1e6:.1f}" == "4.7" and f"{share('gpt3_lora', 'gpt3-175b'):.4f}" == "0.0027"),
        ),
        (
            "RoBERTa-base, LoRA: 0.3 M of 125 M",
            f"count, r = 8 on q and v: {count['roberta_lora'] / 1e6:.2f} M of {whole['roberta-base'] / 1e6:.1f} M",
            holds(f"{count['roberta_lora'] / 1e6:.1f}" == "0.3"),
        ),
        (
            "adapters train about 3 %, LoRA 0.5 %, prefix 0.1 %, P-tuning v2 0.2 %",
            "count on BERT-base, Graft's defaults: " + ", ".join(f"{way} {part:.2f} %" for way, part in shares.items()),
            f"depends on the settings; here within half again: {', '.join(near) or 'none'}",
        ),
    ]


def planned() -> list[tuple[str, str, str]]:
    """Claims on memory, what is planned, and verdicts; a GB is 10**9 bytes, but 2**30 on a card."""
    run = kept("claims")
    whole, plan, bits = run["parameters"], run["plans"], run["bits"]
    kinds, full = plan["full_13b"]["kinds"], plan["full_13b"]["peak"]
    fp32, fp16 = 4 * whole["llama-2-13b"], 2 * whole["llama-2-7b"]
    held = kinds["weights"] + kinds["adapter"] + kinds["gradients"] + kinds["optimizer"]
    nf4 = plan["qlora_7b"]["kinds"]["weights"]
    saved, constants = 100 * (1 - nf4 / fp16), bits["constants_of_a_block"]
    rows = [
        ("13B in fp32 is 52 GB", f"count: {fp32 / 1e9:.1f} GB", holds(f"{fp32 / 1e9:.0f}" == "52")),
        (
            "full fine-tuning of 13B: 416 GB by the 1:1:6 rule",
            f"plan, fp32, one row of 512 tokens: {held / 1e9:.0f} GB of weights, gradients and optimizer, peak {full / 1e9:.0f} GB",
            holds(abs(full / 416e9 - 1) < 0.1, "wrong: AdamW keeps two numbers for a weight, not six"),
        ),
        (
            "full fine-tuning takes 3 to 4 times the model's size",
            f"plan: {held / fp32:.1f} times at rest, {full / fp32:.1f} at the peak",
            holds(
                full / fp32 <= 4.05,
                f"{'holds' if held / fp32 <= 4.05 else 'wrong'} at rest; the peak has activations too",
            ),
        ),
        ("7B in fp16: 14 GB", f"count: {fp16 / 1e9:.1f} GB", holds(13 <= fp16 / 1e9 <= 14.5)),
        ("7B, QLoRA weights: 3 to 4 GB", f"plan: {nf4 / 1e9:.2f} GB", holds(3e9 <= nf4 <= 4e9)),
    ]
    for name, title, limit in (("qlora_codellama", "CodeLlama-13B", 15), ("qlora_65b", "LLaMA-65B", 48)):
        peak = plan[name]["peak"] / 2**30
        words = f"plan, one row of 512 tokens, activations recomputed: {peak:.1f} GB"
        rows.append((f"{title}, QLoRA in {limit} GB", words, holds(peak <= limit)))
    rows += [
        (
            "4-bit saves 80 % of memory",
            f"plan: the weights of 7B shrink by {saved:.0f} % from 16 bits (embeddings and head stay)",
            holds(saved >= 79, "too high"),
        ),
        (
            "double quantization cuts the constants from 32 to about 8 bits",
            f"count: {constants:.3f} bits for a block of {bits['block']} weights",
            holds(8 <= constants < 8.5),
        ),
    ]
    return rows


def compared() -> list[tuple[str, str, str]]:
    """Claims that the kept comparison of all methods answers, and those that nothing here measured."""
    run = kept("all-methods")
    rows = {row["label"]: row for row in run["rows"]}
    gap = next(v for v in run["verdicts"] if {v["first"], v["second"]} == {"full", "lora"})
    sign = 1 if gap["first"] == "full" else -1
    low, high = sorted((100 * sign * gap["low"], 100 * sign * gap["high"]))
    points = 100 * sign * gap["difference"]
    full, lora, adalora = rows["full"], rows["lora"], rows["adalora"]
    memory = lora["peak_memory_bytes"] / full["peak_memory_bytes"]
    time, longer = lora["train_seconds"] / full["train_seconds"], adalora["train_seconds"] / lora["train_seconds"]
    gain = 100 * (adalora["quality"] - lora["quality"])
    served = kept("serving")
    slower = {
        name: {figure: 100 * (slowdown(each, name) - 1) for figure, each in served["latency"].items()}
        for name in ("merged LoRA", "attached LoRA", "bottleneck")
    }
    forgot = [max(row["forgetting"].values()) for row in (full, lora)]
    told = f"{run['model']['name']}, {len(run['seeds'])} seeds"

    return [
        (
            "LoRA within 1 to 2 points of full fine-tuning",
            f"measured ({told}): full minus LoRA {signed(points)} points ({signed(low)} to {signed(high)})",
            holds(low >= -2 and high <= 2, "not seen" if low > 2 or high < -2 else "open: the interval reaches beyond"),
        ),
        (
            "LoRA needs 2/3 of the memory and half of the time",
            f"measured ({told}): {memory:.2f} of the memory, {time:.2f} of the time",
            holds(memory <= 0.7 and time <= 0.55, "not seen here: a small model; the claim is of BERT-base"),
        ),
        (
            "AdaLoRA takes nearly twice as long for under 1 %",
            f"measured ({told}): {longer:.2f} times as long, {signed(gain)} points",
            holds(1.6 <= longer <= 2.2 and gain < 1, "not seen here"),
        ),
        (
            "merged LoRA has the latency of the base; adapters +15 to +30 %",
            f"measured ({served['model']}, batch 1, {served['dtype']}, [serving-speed.md](serving-speed.md)): "
            + "; ".join(f"{name} {spread(found)} %" for name, found in slower.items()),
            latency_verdict(slower),
        ),
        ("full fine-tuning's learning rate (2e-5) does not work for LoRA", "not measured here yet", "open"),
        (
            "full fine-tuning forgets more than LoRA",
            f"measured ({told}): worst probe {signed(forgot[0])} against {signed(forgot[1])} points",
            holds(forgot[0] > forgot[1], "not seen here") + "; without an interval",
        ),
    ]


def slowdown(each: dict[str, list[float]], name: str) -> float:
    """How many times the base's latency a variant has: the median over the rounds."""
    return statistics.median(own / base for own, base in zip(each[name], each["base"], strict=True))


def spread(found: dict[str, float]) -> str:
    """The least and the largest of some percentages."""
    low, high = (f"{value:+.0f}".replace("-", "−") for value in (min(found.values()), max(found.values())))
    return f"{low} to {high}"


def latency_verdict(slower: dict[str, dict[str, float]]) -> str:
    """What was measured of merged LoRA, and of adapters: where the intervals of percentages overlap the claim's."""
    merged, bottleneck = slower["merged LoRA"].values(), slower["bottleneck"].values()
    first = "merged LoRA holds" if max(map(abs, merged)) < 10 else "merged LoRA: not seen in every figure"
    inside = [15 <= value <= 30 for value in bottleneck]
    if all(inside):
        return f"{first}; adapters hold"
    less = all(value < 15 for value in bottleneck)
    return f"{first}; adapters: {'in some figures' if any(inside) else 'less here' if less else 'not seen here'}"


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
        "Rows of one batch can go through different adapters of different methods. While decoding, the parts of all adapters at a"
        " place run as one product where they have that form (LoRA, DoRA, AdaLoRA, (IA)³, bottleneck and parallel adapters); others"
        " run one after another on their own rows. Prompts, training and compiled code use a product for each adapter.",
        "This page is written by `make docs` from `docs/results/serving.json`.",
        f"{run['model']}, {run['rows']} requests of {run['read']} tokens in and {run['written']} out, greedy, each through an adapter of its own,"
        f" through `graft.generate`; {mixes}. The adapters are random, LoRA of rank 8 at queries and values, the others with their defaults."
        " peft decodes with transformers' `generate`, with the cache and without gradients; it has LoRA only here, one request after another"
        " (`set_adapter`) or in one batch (`adapter_names`).",
        "\n".join(batches),
        "\n".join(faster),
        "## Latency at batch 1",
        "One row: the processor time of a decoded token after 32, and of a forward pass without the scores of words. In brackets: times the base's"
        " of the same round. LoRA at queries and values, bottleneck adapters after both blocks of every layer.",
        "\n".join(late),
        f"`{run['command']}`, {run['created']}, {run['rounds']} rounds, cases alternating, {run['dtype']}; {machine['cpu']}, {machine['threads']}"
        f" {'thread' if machine['threads'] == 1 else 'threads'} on {machine['cores']} cores shared with other work, so processor time says more"
        f" than time; Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}, peft {machine['peft']}.",
    ]
    return "\n\n".join(parts) + "\n"


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
    "docs/claims.md": claims_page,
    "docs/serving-speed.md": serving_page,
    "docs/recommend.md": recommend_page,
    "README.md": readme,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        keep(*sys.argv[2:])
    for name, page in PAGES.items():
        (ROOT / name).write_text(page(), encoding="utf-8")
        print(name)
