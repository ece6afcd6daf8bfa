"""What benchmarks/duplicates.py gave, for docs/claims.md."""

import statistics
from typing import Any

from pages.kept import kept, number

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
