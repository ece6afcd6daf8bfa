"""What makes a run fit: jobs that take less memory, the least intrusive first."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from graft.errors import UsageError
from graft.methods.base import read_method
from graft.planning.simulate import Job

SHORTEST = 64
"""Rows are not cut below this many tokens to make a run fit."""

Needs = Callable[[Job], Mapping[str, int]]
"""Bytes that a process takes in each stage of a job: training, evaluation, saving; none where it cannot be used."""


@dataclass(frozen=True)
class Change:
    """Settings of a recipe by their bare names, and the job with them."""

    told: Mapping[str, Any]
    job: Job

    @property
    def words(self) -> str:
        """As on a command line."""
        values = {key: str(value).lower() if isinstance(value, bool) else value for key, value in self.told.items()}
        return " ".join(f"{key}={value}" for key, value in values.items())


Ladder = list[Change]
"""Changes of one kind, each of which takes less than the one before it."""


def made_to_fit(
    job: Job, memory: int, needs: Needs, lora: dict[str, Mapping[str, int]] | None = None
) -> tuple[Change | None, int]:
    """The least intrusive change with which a job takes no more than `memory`, with what it takes then; None where
    nothing helps, with the least that was reached.

    Of each group of changes the strongest is tried first, and the milder ones only where it helps. `lora` keeps what
    LoRA in place of the method takes, which is the same for all methods of a recipe.
    """
    known: dict[str, Mapping[str, int]] = {"": needs(job)}

    def stage(change: Change, *names: str) -> int:
        table = lora if lora is not None and "method" in change.told else known
        if change.words not in table:
            table[change.words] = needs(change.job)
        found = known[change.words] = table[change.words]
        return max((found[name] for name in names or found), default=1 << 62)

    start = Change({}, job)
    if stage(start, "evaluation") > memory and (ladder := _evaluations(start)):
        start = _mildest(ladder, lambda change: stage(change, "evaluation") <= memory) or ladder[-1]
        if stage(start) <= memory:
            return start, stage(start)
    before = start
    for ladders in changes(start):
        if "max_length" in ladders[-1][-1].told and stage(before, "saving") > memory:
            continue  # which no length of rows changes
        before = ladders[-1][-1]
        if stage(ladders[-1][-1]) > memory:
            continue
        for ladder in ladders:
            found = _mildest(ladder, lambda change: stage(change) <= memory)
            if found is not None:
                return found, stage(found)
    return None, min(max(found.values()) for found in known.values() if found)


def _mildest(ladder: Ladder, fits: Callable[[Change], bool]) -> Change | None:
    """The first of a ladder that fits; None where the last does not."""
    if not fits(ladder[-1]):
        return None
    low, high = 0, len(ladder) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(ladder[middle]) else (middle + 1, high)
    return ladder[low]


def changes(start: Change) -> Iterator[list[Ladder]]:
    """Groups of ladders, the least intrusive first; the last change of a group's last ladder takes the least of it.

    First what leaves results as they are: smaller passes with as many rows to a step, recomputed activations, both.
    Then a quantized base, alone and with these; shorter rows with all of these; and LoRA in place of the method.
    """
    yield from _of_method(start, [])
    if start.job.method.name != "lora":
        lora = _with(start, {"method": "lora"})
        yield from _of_method(lora, [[lora]])


def _of_method(start: Change, first: list[Ladder]) -> Iterator[list[Ladder]]:
    if ladders := [*first, *_lighter(start)]:
        yield ladders
    reached = start
    if start.job.recipe.quantization is None and not start.job.method.in_place:
        reached = _with(start, {"quantization": "nf4"})
        yield [[reached], *_lighter(reached)]
    if cut := _cuts(_lightest(reached)):
        yield [cut]


def _lighter(start: Change) -> list[Ladder]:
    """Smaller passes, recomputed activations, both."""
    sizes = _sizes(start.job)
    again: dict[str, Any] = {} if start.job.recipe.training.gradient_checkpointing else {"gradient_checkpointing": True}
    ladders = [[_with(start, size) for size in sizes]]
    if again:
        ladders += [[_with(start, again)], [_with(start, size | again) for size in sizes]]
    return [ladder for ladder in ladders if ladder]


def _lightest(start: Change) -> Change:
    ladders = _lighter(start)
    return ladders[-1][-1] if ladders else start


def _sizes(job: Job) -> list[dict[str, Any]]:
    """Smaller passes, each at most half of the one before it, with exactly as many rows to a step."""
    training = job.recipe.training
    size, passes = training.per_device_train_batch_size, training.gradient_accumulation_steps
    rows, found = size * passes, []
    while size > 1:
        size = max(part for part in range(1, size // 2 + 1) if rows % part == 0)
        found.append({"per_device_train_batch_size": size, "gradient_accumulation_steps": rows // size})
    return found


def _evaluations(start: Change) -> Ladder:
    """Smaller passes in evaluation, which change nothing but its time."""
    size, ladder = start.job.recipe.training.per_device_eval_batch_size, []
    while size > 1:
        size //= 2
        ladder.append(_with(start, {"per_device_eval_batch_size": size}))
    return ladder


def _cuts(start: Change) -> Ladder:
    """Shorter rows, read again; none where it is not known how."""
    job, ladder = start.job, []
    longest = max(len(row) for row in job.rows.train)
    length = job.recipe.max_length // 2
    while job.rows.again is not None and length >= SHORTEST:
        if length < longest:
            data = job.recipe.data.model_copy(update={"max_length": length})
            recipe = job.recipe.model_copy(update={"data": data})
            try:
                rows = job.rows.again(recipe)
            except UsageError:  # such as rows of which nothing that is trained is left
                break
            ladder.append(Change({**start.told, "max_length": length}, replace(job, recipe=recipe, rows=rows)))
        length //= 2
    return ladder


_TOP = ("method", "quantization")
"""Settings of the recipe itself; the others are of its training."""


def _with(start: Change, settings: Mapping[str, Any]) -> Change:
    """A change and some settings more."""
    job, recipe = start.job, start.job.recipe
    told = {**start.told, **settings}
    top: dict[str, Any] = {key: value for key, value in settings.items() if key in _TOP}
    if "method" in top:
        job = replace(job, method=read_method(top["method"]))
        top["method"] = job.method
    training = {key: value for key, value in settings.items() if key not in _TOP}
    values: dict[str, Any] = {**top, "training": recipe.training.model_copy(update=training)}
    if recipe.engine.compile is True and {"quantization", "gradient_checkpointing"} & settings.keys():
        told["compile"] = "auto"  # a recipe that insists on compiling refuses both
        values["engine"] = recipe.engine.model_copy(update={"compile": "auto"})
    return Change(told, replace(job, recipe=recipe.model_copy(update=values)))
