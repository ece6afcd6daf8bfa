"""What a run will take, before it is started: memory by kind, time, whether it fits, and what would make it fit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from graft.config import Config
from graft.data.dialogue import Dialogue, Message
from graft.data.load import DataConfig, Splits
from graft.errors import GraftError, UsageError
from graft.families import FAMILIES
from graft.methods.base import Method, methods, read_method
from graft.model import load_tokenizer
from graft.objectives.classify import LabelledExample
from graft.objectives.instruct import Turn
from graft.objectives.pretrain import Piece
from graft.planning.catalogue import config_of, entries
from graft.planning.live import Work
from graft.planning.machine import Machine
from graft.planning.simulate import FEW, Job, Rows, Simulation, extrapolate, simulate, step_positions
from graft.planning.smaller import made_to_fit
from graft.recipe import Recipe
from graft.train.precision import Precision
from graft.train.settings import Training

RUNTIME = {"cpu": 650 << 20, "cuda": 600 << 20}
"""Bytes of a process beside its tensors: on a CPU 450 MiB of Python, torch and transformers before a model is loaded,
and WORKSPACE; on a GPU its context and the libraries' work space (an estimate)."""
WORKSPACE = 200 << 20
"""Bytes that kernels for each length of rows, and gaps between tensors, took in training on a CPU: in most runs 60 to
260 MiB (benchmarks/plan.py)."""
AROUND = {"cpu": 8.0, "cuda": 0.0}
"""What Python does around an operation of a model (modules, hooks, autocast), in units of the machine's overhead for an
operation of a bare network: 40 µs beside 5 on two cores of an AMD EPYC. A GPU computes meanwhile."""
ALLOCATOR = {"cpu": 1.0, "cuda": 1.05}
"""What an allocator takes for a byte that is alive: on a GPU blocks are rounded and leave gaps (an estimate)."""
WHOLE = 24
"""Layers that are simulated one by one, of all methods together; with more, each is extrapolated from a few."""
FAULTS = (RuntimeError, NotImplementedError, TypeError, ValueError)
"""What a step raises that a model's or method's own code cannot do, with or without numbers."""

Watch = Callable[[str, float], None]
"""Called with what is being planned and the share that is done."""


@dataclass(frozen=True)
class Estimate:
    """What one method takes: bytes and seconds."""

    label: str
    trainable: int = 0
    parameters: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    """Live tensors at the peak of a training step."""
    stages: dict[str, int] = field(default_factory=dict)
    """The peak of live tensors in each stage of a run: training, evaluation, saving, merging."""
    peak: int = 0
    """All that a process holds in training, evaluation and saving, with what allocator and libraries take."""
    step_seconds: float | None = None
    run_seconds: float | None = None
    """Of all optimizer steps; evaluation is not in it."""
    fits: bool | None = None
    """None where no memory was given."""
    change: str | None = None
    """Settings that make it fit, the least intrusive that do."""
    changed_peak: int | None = None
    """`peak` with them, or the least that was reached."""
    error: str | None = None
    """Why this method cannot be used here."""


@dataclass(frozen=True)
class Plan:
    """What methods take on one model, rows and machine."""

    model: str
    rows: str
    """What was planned with, in words."""
    settings: dict[str, Any]
    machine: str | None
    memory: int | None
    estimates: list[Estimate]
    notes: list[str]


def plan_recipe(
    recipe: Recipe,
    chosen: Sequence[Method] | None = None,
    memory: int | None = None,
    machine: Machine | None = None,
    watch: Watch | None = None,
) -> Plan:
    """What a recipe's own method takes, or each of `chosen`, on its own rows.

    Where the model's tokenizer is not on this machine, the rows are as long as the recipe allows. Raises `ModelError`
    for an unknown model and what reading the rows raises.
    """
    rows, notes = _rows_of(recipe)
    return _plan(recipe, _named(recipe, chosen), rows, notes, memory, machine, watch)


def plan_model(
    model: str,
    chosen: Sequence[Method] | None,
    settings: Mapping[str, Any],
    memory: int | None = None,
    machine: Machine | None = None,
    watch: Watch | None = None,
) -> Plan:
    """What methods, or that of `settings`, take on a model by name, without data: rows of `data.max_length` tokens (512
    when not set), one at a time unless `training` says otherwise. `settings` are a recipe's. `run_seconds` is None, as
    a run without data has no end.
    """
    recipe = _bare(model, settings)
    plan = _plan(recipe, _named(recipe, chosen), _equal_rows(recipe), [], memory, machine, watch)
    return replace(plan, estimates=[replace(estimate, run_seconds=None) for estimate in plan.estimates])


def _named(recipe: Recipe, chosen: Sequence[Method] | None) -> Sequence[Method]:
    """These methods, or the recipe's own."""
    return [recipe.method or read_method("lora")] if chosen is None else chosen


def _bare(model: str, settings: Mapping[str, Any]) -> Recipe:
    kind = FAMILIES[config_of(model).model_type].kind
    objective = {"objective": "pretrain" if kind == "decoder" else "classify"}
    given = _or_else(Recipe, settings, objective)
    named = {Recipe.aliases.get(key, key): value for key, value in settings.items()}
    data, training = named.get("data", {}), named.get("training", {})
    if "model" in named or not isinstance(data, Mapping) or "train" in data:
        raise UsageError("a plan by a model's name takes no other model and no data", "give a recipe to plan with data")
    if isinstance(training, Mapping):  # anything else is a fault that parsing tells
        one = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
        given["training"] = _or_else(Training, training, one)
    given |= {"model": model, "data": _or_else(DataConfig, data, {"train": "rows of one length", "max_length": 512})}
    recipe, _ = Recipe.parse_with_notes(given, "plan")
    return recipe


def _or_else(cls: type[Config], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, and defaults where nothing is, under whatever name."""
    names = {cls.aliases.get(key, key) for key in given}
    return {**{key: value for key, value in defaults.items() if key not in names}, **given}


def _plan(
    recipe: Recipe,
    chosen: Sequence[Method],
    rows: Rows,
    notes: list[str],
    memory: int | None,
    machine: Machine | None,
    watch: Watch | None,
) -> Plan:
    config = config_of(recipe.model)
    recipe = _for_device(recipe, machine)
    depth = int(config.num_hidden_layers)
    deep = depth * len(chosen) > WHOLE
    if deep:
        notes = [*notes, f"extrapolated to {depth} layers from models of {FEW[0]} and {FEW[1]}"]
    precision = _precision(recipe, machine)
    found, lora = [], dict[str, Mapping[str, int]]()
    for number, method in enumerate(chosen):
        if watch:
            watch(method.name, number / len(chosen))
        job = Job(_with_method(recipe, method), method, config, precision, rows)
        found.append(_one(job, memory, machine, deep, lora))
    training = recipe.training
    lengths = sorted(len(row) for row in rows.train)
    told = {
        "objective": recipe.objective.name,
        "precision": precision.name,
        "quantization": recipe.quantization,
        "micro_batch": training.per_device_train_batch_size,
        "accumulation": training.gradient_accumulation_steps,
        "gradient_checkpointing": training.gradient_checkpointing,
        "layers": depth,
        "rows": len(lengths),
        "median_tokens": lengths[len(lengths) // 2],
        "longest": lengths[-1],
    }
    words = f"{len(lengths):,} rows of {told['median_tokens']:,} tokens in the median, {lengths[-1]:,} at most"
    if lengths[0] == lengths[-1]:
        words = f"rows of {lengths[-1]:,} tokens"
    name = None if machine is None else f"{machine.name} ({machine.source})"
    return Plan(recipe.model, words, told, name, memory, found, notes)


def _one(
    job: Job, memory: int | None, machine: Machine | None, deep: bool, lora: dict[str, Mapping[str, int]]
) -> Estimate:
    reason = job.method.refuses(FAMILIES[job.config.model_type]) or job.recipe.objective.refuses(
        FAMILIES[job.config.model_type]
    )
    if reason is not None:
        return Estimate(job.method.name, error=reason)
    if job.recipe.quantization is not None and job.method.in_place:
        return Estimate(job.method.name, error="trains the base's own weights, and in nf4 none can train")
    try:
        found = estimate(job, machine, deep)
    except UsageError as error:
        return Estimate(job.method.name, error=str(error))
    except FAULTS as error:
        return Estimate(job.method.name, error=f"cannot be simulated ({(str(error).splitlines() or [''])[0][:120]})")
    if memory is None:
        return found
    if found.peak <= memory:
        return replace(found, fits=True)
    kind = "cpu" if machine is None else machine.kind

    def needs(job: Job) -> Mapping[str, int]:
        try:
            return _taken(_simulated(job, (1.0,), deep=True, merge=False), kind)
        except (UsageError, *FAULTS):
            return {}

    change, least = made_to_fit(job, memory, needs, lora)
    return replace(found, fits=False, change=None if change is None else change.words, changed_peak=least)


def estimate(job: Job, machine: Machine | None, deep: bool = False, beside: bool = True) -> Estimate:
    """Memory and time of a job on a machine; without one, memory as on a CPU and no time. `deep`: extrapolated;
    `beside`: evaluation and merging too.
    """
    found = _simulated(job, (1.0,) if machine is None else (1.0, 0.5), deep, beside)
    kind = "cpu" if machine is None else machine.kind
    peak = max(_taken(found, kind).values())
    stages = _stages(found)
    if found.merging is not None:
        stages["merging"] = found.merging.total
    step, run = _times(job, found, machine)
    heaviest = found.heaviest
    kinds = {str(name): size for name, size in heaviest.peak.kinds.items()}
    return Estimate(job.method.name, found.trainable, found.parameters, kinds, stages, peak, step, run)


def _simulated(job: Job, quantiles: Sequence[float], deep: bool, beside: bool = True, merge: bool = True) -> Simulation:
    return (extrapolate if deep else simulate)(job, quantiles, beside, merge)


def _stages(found: Simulation) -> dict[str, int]:
    """The peak of live tensors in the stages that every run has."""
    rest = found.heaviest.at_rest
    saved = 2 * 4 * found.trainable  # a copy in fp32 of what is saved, and the file as it is written
    return {
        "training": found.heaviest.peak.total,
        "evaluation": found.evaluation.total + rest.kinds["optimizer"],
        "saving": rest.total + saved,
    }


def _taken(found: Simulation, kind: str) -> dict[str, int]:
    """What the process takes in each of these stages, with what allocator and libraries take."""
    return {name: round(size * ALLOCATOR[kind]) + RUNTIME[kind] for name, size in _stages(found).items()}


def _times(job: Job, found: Simulation, machine: Machine | None) -> tuple[float | None, float | None]:
    """Seconds of the mean step, and of all steps."""
    if machine is None:
        return None, None
    training = job.recipe.training
    passes = training.gradient_accumulation_steps / min(2, training.gradient_accumulation_steps)
    known = {size * passes: passes * seconds_of(machine, step.passes) for size, step in found.steps.items()}
    update = seconds_of(machine, found.heaviest.update)
    sizes = step_positions(job)
    mean = sum(_between(size, known) for size in sizes) / len(sizes) + update
    steps = max(1, round(len(sizes) * training.num_train_epochs))
    return mean, mean * min(steps, training.max_steps or steps)


def seconds_of(machine: Machine, works: Mapping[Work, float]) -> float:
    """Time of operations one after another, each so often."""
    around = AROUND[machine.kind] * machine.overhead
    return sum(count * (around + machine.seconds(work.flops, work.moved, work.dtype)) for work, count in works.items())


def _between(size: float, known: Mapping[float, float]) -> float:
    """Time of a batch of so many positions, on the line through two that are known, or in proportion to one."""
    (large, slow), (small, quick) = max(known.items()), min(known.items())
    if large == small:
        return slow * size / large
    return max(quick * size / small / 2, quick + (slow - quick) * (size - small) / (large - small))


# Rows ------------------------------------------------------------------------------------------------


def _rows_of(recipe: Recipe) -> tuple[Rows, list[str]]:
    """The recipe's rows as its objective reads them."""
    splits: Splits = recipe.objective.load(recipe.data)
    try:
        tokenizer = load_tokenizer(recipe.model)
    except GraftError:
        config_of(recipe.model)
        rows = _equal_rows(recipe, len(splits.train), splits.labels)
        return rows, [f"the tokenizer of {recipe.model} is not here, so every row counts as {recipe.max_length} tokens"]

    def read(recipe: Recipe) -> Rows:
        train, validation = (
            recipe.objective.examples(part, tokenizer, splits.labels, recipe.max_length)
            for part in (splits.train, splits.validation)
        )
        return Rows(train, validation, splits.labels, tokenizer, read)

    return read(recipe), []


def _equal_rows(recipe: Recipe, count: int | None = None, labels: tuple[str, ...] = ("no", "yes")) -> Rows:
    """Rows of the longest length that the recipe allows."""
    training = recipe.training
    effective = training.per_device_train_batch_size * training.gradient_accumulation_steps
    train, validation = _equal(recipe, count or effective), _equal(recipe, training.per_device_eval_batch_size)
    return Rows(train, validation, labels, again=lambda other: _equal_rows(other, count or effective, labels))


def _equal(recipe: Recipe, count: int) -> list[Any]:
    length = recipe.max_length
    if recipe.objective.unit == "dialogue":
        words = Dialogue((Message("user", "?"), Message("assistant", "!")), "row", "row")
        return [Turn([1] * length, [1] * length, max(1, length // 2), words) for _ in range(count)]
    if recipe.objective.unit == "labelled":
        return [LabelledExample([1] * length, None, 0, f"row {number}") for number in range(count)]
    return [Piece([1] * length, f"row {number}", number) for number in range(count)]


# The recipe of a job ---------------------------------------------------------------------------------


def _with_method(recipe: Recipe, method: Method) -> Recipe:
    """The recipe with this method alone."""
    return recipe.model_copy(update={"method": method})


def _precision(recipe: Recipe, machine: Machine | None) -> Precision:
    choice = recipe.training.precision
    if choice != "auto":
        return Precision(torch.bfloat16 if choice == "bf16" else torch.float32, "set in the recipe")
    return machine.precision if machine is not None else Precision(torch.bfloat16, "as most machines for training")


def _for_device(recipe: Recipe, machine: Machine | None) -> Recipe:
    """On a GPU torch's fused attention and dropout, as the engine chooses there."""
    if machine is None or machine.kind == "cpu":
        return recipe
    engine = recipe.engine.model_copy(update={"attention": "sdpa", "cheaper_dropout": False})
    return recipe.model_copy(update={"engine": engine})


# What fits -------------------------------------------------------------------------------------------

LADDER = (
    "smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b", "llama-3-8b", "llama-2-13b",
    "qwen2.5-32b", "llama-65b", "llama-3-70b", "llama-3.1-405b",
)  # fmt: skip
"""Models of `what_fits`, by size."""


def what_fits(memory: int, machine: Machine | None = None, watch: Watch | None = None) -> list[dict[str, Any]]:
    """Models of the catalogue by size, with the memory that full tuning, LoRA and QLoRA take of each: rows of 512
    tokens, one at a time, activations recomputed. Larger models than the first that does not fit are left out.
    """
    ways: dict[str, tuple[str, str | None]] = {"full": ("full", None), "lora": ("lora", None), "qlora": ("lora", "nf4")}
    going, table = set(ways), []
    for number, name in enumerate(LADDER):
        row: dict[str, Any] = {"model": name, "parameters": entries()[name].parameters}
        for way, (method, quantization) in ways.items():
            if way not in going:
                continue
            if watch:
                watch(f"{name}, {way}", number / len(LADDER))
            settings = {"quantization": quantization, "training": {"gradient_checkpointing": True}}
            recipe = _bare(name, settings | {"method": method})
            job = Job(_for_device(recipe, machine), read_method(method), config_of(name), _precision(recipe, machine),
                      _equal_rows(recipe))  # fmt: skip
            row[way] = estimate(job, machine, deep=True).peak
            if row[way] > memory:
                going.discard(way)
        table.append(row)
        if not going:
            break
    return table


def every_method() -> list[Method]:
    """All methods with their defaults."""
    return [read_method(name) for name in methods()]
