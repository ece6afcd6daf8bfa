"""docs/benchmarks.md and the tables on the screen, from the stored figures."""

from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.speed import later
from benchmarks.speed.figures import Line, lines, loss_verdict

_GIB = 2**30


def page(stored: dict[str, Any]) -> str:
    """The whole page."""
    sections = stored["sections"]
    parts = [_HEAD]
    for name, section in sections_in_order(sections):
        notes = _NOTES if name == "instruct" else ""
        parts += [f"## {_TITLES[name]}", *_SECTIONS[name](section), notes, _how(section)]
    if not sections:
        parts.append("Nothing is measured yet.")
    else:
        parts += ["## Figures", _FORMULAS]
    return "\n\n".join(part for part in parts if part) + "\n"


def sections_in_order(sections: dict[str, Any]) -> list[tuple[str, Any]]:
    """The sections that are there, in the page's order."""
    return [(name, sections[name]) for name in _TITLES if name in sections]


_HEAD = """# Benchmarks

Written by `make bench` (`python -m benchmarks.speed`) from [results/benchmarks.json](results/benchmarks.json), which
has every round. Each side of each round is a process of its own, the sides alternate, and a round's seed is the same
for all of them. Figures are medians over the rounds; a ratio above 1 is in Graft's favour."""

_NOTES = """How the peers are set:

- Every side has the same rows as the same ids, rendered by Graft, with a loss on the answer and its end-of-turn token
  only, and the same batch size, peak rate, linear schedule, weight decay and clipping.
- The weights' format is always given: transformers 5 loads a model in its checkpoint's, which here is bf16.
- `train_sampling_strategy="group_by_length"` sorts pools of 50 batches in long runs and less in short ones. Here it
  gets the pools of a long run, and batches in random order rather than the longest first.
- trl's SFTTrainer gets its completion-only loss by labels, and `gradient_checkpointing=False`, which is faster than
  its default. Without flash attention its packing and padding-free batches are not refused, and they are right:
  transformers derives from the positions which tokens belong together and gives sdpa a mask. Each run checks this
  first, comparing the logits of joined rows with those of each row alone (where rows are let see each other, these
  differ by 0.7 of their size). Packs have room for as many tokens as a batch, so that an epoch can have a step more or
  less than with batches.
- Every side is started with the same environment variables. Graft's process then does what the command `graft` does
  before torch is loaded (`graft.engine.runtime`: `GOMP_SPINCOUNT`, oneDNN's cache of kernels) and keeps freed memory
  (`engine.keep_memory`); the peers' processes do neither."""

_TITLES = {
    "instruct": "A chat model learns from dialogues",
    "classify": "An encoder learns to classify",
    "methods": "Every method that peft has too",
    "compare": "A whole comparison",
    "start": "Starting",
}

_FORMULAS = """\
- **tokens/s**: tokens of the rows, without padding, by the seconds of the training: from the call of `fit` or `train`
  to its end, with whatever is compiled, prepared and checked inside it, without evaluation. Of *graft compiled* the
  time of compiling is left out; its line below the table has the speed with it.
- **padding**: positions that pass the embedding table beyond the rows' own tokens, as a share of all positions.
- **ms/step**: the median time of an optimizer step, without the first three.
- **memory**: the most the process held from just before training to its end, weights and libraries included (VmHWM,
  reset before; on CUDA the allocator's peak).
- **held-out loss**: nats per answer token, or per row of a classifier, over the same 64 rows that nobody trained on;
  the trained tensors in a base loaded anew, a plain forward pass in fp32, the same code for every side. In brackets
  the least and the largest over the rounds.
- **nominal**, **executed**: operations per second as a share of the measured rate of `torch.nn.functional.linear` on
  a 2048 cube, best of 10, with the same threads and in the format of the side's products. A multiplication and an
  addition are two operations; a frozen weight costs 4 for each position that meets it: forward, and backward to the
  activations.
  *nominal* = 4 · all parameters · tokens of the rows / seconds;
  *executed* = (4 · parameters of the layers' matrices · positions, padding included + 4 · parameters of the output head
  · positions it scored) / seconds. Attention itself, adapters and norms are in neither."""


def _how(section: dict[str, Any]) -> str:
    machine, where, versions = section["machine"], section["environment"], section["versions"]
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    rates = ""
    if "error" not in machine:
        rates = (
            f" Matrix products: {machine['fp32'] / 1e9:,.0f} GFLOP/s in fp32, {machine['bf16'] / 1e9:,.0f} in bf16; "
            f"memory {machine['bytes'] / 1e9:.0f} GB/s."
        )
    given = ", ".join(f"`{key}={value}`" for key, value in section["variables"].items() if key != "OMP_NUM_THREADS")
    rates += f" Every side has {given}." if given else ""
    settings = f" Graft with {', '.join(f'`{one}`' for one in section['graft'])}." if section["graft"] else ""
    return (
        f"`{section['command']}`, {section['created']}, {section['seconds'] / 60:.0f} minutes, commit "
        f"{str(where['commit'])[:7]}{' with changes' if section['changed'] else ''}; {where['cpu']}, "
        f"{where['device']}, {where['threads']} threads, Python {where['python']}, {told}.{rates}{settings}"
    )


# Training ------------------------------------------------------------------------------------------


def _training(section: dict[str, Any]) -> list[str]:
    parts = []
    for name, group in section["groups"].items():
        found = lines(group, section["machine"])
        parts += [f"### {name}" if len(section["groups"]) > 1 else "", _about(group)]
        head = ["side", "tokens/s", "Graft is", "padding", "ms/step", "memory", "held-out loss", "nominal", "executed"]
        cells = [_cells(line) for line in found]
        if group["settings"]["kind"] == "labels":
            head, cells = head[:-2], [row[:-2] for row in cells]
        parts += [later.ruled(head, cells), _sides(group), loss_verdict(group)]
    return parts


def _about(group: dict[str, Any]) -> str:
    settings, data = group["settings"], group["data"]
    method = {key: value for key, value in settings["method"].items() if key != "name"}
    told = settings["method"]["name"] + "".join(f", {key} {_plain(value)}" for key, value in method.items())
    least, low, middle, high, largest = data["lengths"]
    text = (
        f"{settings['model']}, {told}; {data['rows']:,} rows with {data['tokens']:,} tokens, one pass, batches of "
        f"{settings['batch']}, peak learning rate {settings['learning_rate']:g}. A row has {middle} tokens in the "
        f"median, 10 % have up to {low} and 10 % from {high} on; {least} to {largest} in all."
    )
    if data["answers"]:
        text += f" Of these {data['answers'][2]} are the answer's in the median, {data['answers'][-1]} at most."
    return text


def _plain(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cells(line: Line) -> list[str]:
    if line.error:
        return [line.name, f"failed: {line.error}", *[""] * 7]
    loss = "–" if line.loss is None else f"{line.loss:.3f}" + (f" ({line.low:.3f}–{line.high:.3f})" if line.low else "")
    return [
        line.name,
        _number(line.speed, ",.0f"),
        "" if line.ratio is None else f"{line.ratio:.2f} × as fast",
        _number(line.padding, ".0%"),
        _number(line.step_ms, ",.0f"),
        "–" if line.peak is None else f"{line.peak / _GIB:.2f} GiB",
        loss,
        _number(line.nominal, ".0%"),
        _number(line.executed, ".0%"),
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _sides(group: dict[str, Any]) -> str:
    told = []
    for name, side in group["sides"].items():
        text = f"- *{name}*: {side['about']}"
        if side["trials"]:
            tried = ", ".join(
                f"`{variant}` {value:.1f} s" if isinstance(value, float) else f"`{variant}` failed ({value})"
                for variant, value in side["trials"].items()
            )
            text += f"; `{side['variant']}` is the fastest in a trial on fewer rows: {tried}"
        apart = [one["rows_apart"] for one in side["rounds"] if "rows_apart" in one]
        if apart:
            text += f". Joined rows do not see each other: logits differ by {max(apart):.1g} of their size at most"
        said = [line for one in side["rounds"] for line in one.get("said", [])]
        if said:
            text += f". Its log says: {'; '.join(dict.fromkeys(said))}"
        done = [one for one in side["rounds"] if one.get("compile_seconds")]
        compiling = [one["compile_seconds"] for one in done]
        if compiling:
            seconds = " and ".join(f"{value:.0f}" for value in compiling)
            whole = median(one["useful_tokens"] / (one["seconds"] + one["compile_seconds"]) for one in done)
            text += (
                f". The {seconds} s of compiling, more the first time, are left out; with them {whole:,.0f} tokens/s"
            )
        rounds = len(side["rounds"])
        rows = next((f", the first {one['rows']} rows" for one in side["rounds"] if side["few"] and "rows" in one), "")
        told.append(text + f" ({rounds} round{'s' * (rounds != 1)}{rows})")
    return "\n".join(told)


_SECTIONS: dict[str, Any] = {
    "instruct": _training,
    "classify": _training,
    "methods": later.methods,
    "compare": later.compare,
    "start": later.start,
}


# The screen ----------------------------------------------------------------------------------------


def tables(name: str, section: dict[str, Any]) -> list[Table]:
    """A section's figures for a terminal of 80 columns."""
    if name not in ("instruct", "classify"):
        return later.tables(name, section)
    found = []
    for title, group in section["groups"].items():
        table = Table("side", "tokens/s", "Graft ×", "padding", "ms/step", "GiB", "loss", title=title, expand=False)
        for line in lines(group, section["machine"]):
            if line.error:
                table.add_row(line.name, line.error)
                continue
            table.add_row(
                line.name, _number(line.speed, ",.0f"), _number(line.ratio, ".2f"), _number(line.padding, ".0%"),
                _number(line.step_ms, ",.0f"), _number(line.peak and line.peak / _GIB, ".2f"),
                _number(line.loss, ".3f"),
            )  # fmt: skip
        found.append(table)
    return found
