"""A run on fake tensors: its training step, evaluation and merging, without weights and without memory."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from graft.build import ADAPTER, build_adapter, check_positions, fit_out
from graft.data.batch import evaluation_batches, training_batches
from graft.decoding import Decoder
from graft.errors import NotMergeable
from graft.methods.base import Method
from graft.model import Base
from graft.objectives.causal import Causal, row_figures
from graft.parts.attach import merge_into
from graft.parts.base import Adapter
from graft.planning.catalogue import skeleton
from graft.planning.fake import give_storage, simulated
from graft.planning.live import Peak, Work
from graft.planning.step import Step, watched, watched_step
from graft.recipe import Recipe
from graft.routing import Route
from graft.train.loop import Trainer
from graft.train.precision import Precision


@dataclass(frozen=True)
class Rows:
    """The rows of a run as its objective reads them."""

    train: Sequence[Any]
    validation: Sequence[Any]
    labels: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase | None = None
    again: Callable[[Recipe], "Rows"] | None = None
    """Reads them as another recipe says, such as one with shorter rows; None where that is not known."""


@dataclass(frozen=True)
class Job:
    """What is simulated: a recipe's method on a model of this shape, over these rows."""

    recipe: Recipe
    method: Method
    config: PretrainedConfig
    precision: Precision
    rows: Rows


@dataclass(frozen=True)
class Simulation:
    """What a run takes. Steps are simulated on some of its batches, by the positions of these."""

    parameters: int
    trainable: int
    steps: dict[int, Step]
    """By the positions of the batch, padding included; the largest comes first."""
    evaluation: Peak
    merging: Peak | None
    """None where the method cannot be merged."""

    @property
    def heaviest(self) -> Step:
        """The step over the most positions."""
        return next(iter(self.steps.values()))


@dataclass
class _Alone:
    """What a step asks of accelerate, for one process and fake tensors on the CPU. An accelerator of its own would
    change the state that all accelerators of a process share, the run's that is being planned among them."""

    bf16: bool
    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True

    def autocast(self) -> torch.autocast:
        """As accelerate's, for the number format of products."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)

    def backward(self, loss: Tensor) -> None:
        """The gradients of a loss, which accelerate divides by a number of passes of its own, 1."""
        (loss / 1).backward()


def simulate(job: Job, quantiles: Sequence[float] = (1.0, 0.5), beside: bool = True, merge: bool = True) -> Simulation:
    """Run the recipe's own code on fake tensors: a step at each of some `quantiles` of its batches by size, an
    evaluation of the heaviest batch where `beside`, and merging where `merge` as well.

    Raises what building the adapter raises. Takes about a millisecond for each operation, whatever the model's size.
    """
    frozen = torch.float32 if job.method.in_place else job.precision.dtype
    accelerator: Any = _Alone(job.precision.name == "bf16")
    with _same_draws(), simulated():
        base = fake_base(job, frozen)
        adapter = build_adapter(job.recipe, job.method, base, job.rows.labels)
        check_positions(base, adapter, job.recipe.max_length)
        trainer = Trainer(
            base, adapter, job.recipe.objective, job.recipe.training, rate=1e-4, seed=job.recipe.seed,
            accelerator=accelerator, engine=job.recipe.engine,
        )  # fmt: skip
        steps = {}
        for batch in _batches(job, quantiles):
            chosen = [job.rows.train[row] for row in batch]
            size = positions(chosen, job.recipe.training.per_device_train_batch_size)
            steps[size] = watched_step(trainer, job.recipe.objective.imagine(chosen))
        evaluation, merging = Peak(), None
        if beside:
            with accelerator.autocast():
                evaluation = _evaluation(job, base, adapter)
            merging = _merging(job, base, adapter) if merge else None
        return Simulation(base.parameter_count(), adapter.trainable_count(), steps, evaluation, merging)


@contextmanager
def _same_draws() -> Iterator[None]:
    """Leave the random numbers that the caller draws next as they were: building an adapter sets seeds."""
    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


FEW = (3, 5)
"""Layers of the two models that a deep one is extrapolated from. In two the peak can be elsewhere than in a deep one;
two more, since layers alternate in some models."""


def extrapolate(
    job: Job, quantiles: Sequence[float] = (1.0, 0.5), beside: bool = True, merge: bool = True
) -> Simulation:
    """What `simulate` gives, from models of a few layers: each figure as far beyond them as the layers are more.

    Encoder-decoders are cut on both sides. Equal to `simulate` where all layers are alike; a base of no more layers
    than these is simulated whole.
    """
    depth = int(job.config.num_hidden_layers)
    if depth <= FEW[1]:
        return simulate(job, quantiles, beside, merge)
    low, high = (simulate(replace(job, config=_cut(job.config, layers)), quantiles, beside, merge) for layers in FEW)
    more = Fraction(depth - FEW[1], FEW[1] - FEW[0])

    def on(few: int, many: int) -> int:
        return round(many + more * (many - few))

    steps = {
        size: Step(
            [b.scaled(a, more) for a, b in zip(low.steps[size].segments, step.segments, strict=True)],
            step.at_rest.scaled(low.steps[size].at_rest, more),
            _more(low.steps[size].passes, step.passes, more),
            _more(low.steps[size].update, step.update, more),
            [],
        )
        for size, step in high.steps.items()
    }
    merging = None
    if low.merging is not None and high.merging is not None:
        merging = high.merging.scaled(low.merging, more)
    return Simulation(
        on(low.parameters, high.parameters),
        on(low.trainable, high.trainable),
        steps,
        high.evaluation.scaled(low.evaluation, more),
        merging,
    )


def _more(few: Mapping[Work, float], many: Mapping[Work, float], more: Fraction) -> dict[Work, float]:
    """How often each, which is a half at times: what is done once for all layers is another work with each depth."""
    works = {**few, **many}
    return {work: many.get(work, 0) + float(more) * (many.get(work, 0) - few.get(work, 0)) for work in works}


def _cut(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The configuration of the same model with fewer layers."""
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = layers
    if getattr(cut, "num_decoder_layers", None) is not None:
        cut.num_decoder_layers = layers
    if getattr(cut, "layer_types", None):
        cut.layer_types = cut.layer_types[:layers]
    return cut


def fake_base(job: Job, dtype: torch.dtype) -> Base:
    """The base of a job, in a number format, as `run.load_for` gives it; call it inside `simulated`."""
    model = skeleton(job.config, dtype)
    give_storage(model)
    base = Base(model, job.rows.tokenizer, job.recipe.model, fingerprint="simulated")
    return fit_out(base, job.recipe, torch.device("cpu"))


def positions(chosen: Sequence[Any], size: int) -> int:
    """Positions of an effective batch in passes of `size` rows, padding included."""
    passes = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return sum(len(rows) * max(len(row) for row in rows) for rows in passes)


def step_positions(job: Job) -> list[int]:
    """Positions of every effective batch of the first epoch."""
    training = job.recipe.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    batches = training_batches([len(row) for row in job.rows.train], rows, seed=job.recipe.seed, epoch=0)
    size = training.per_device_train_batch_size
    return [positions([job.rows.train[row] for row in batch], size) for batch in batches]


def _batches(job: Job, quantiles: Sequence[float]) -> list[list[int]]:
    """Row numbers of micro-batches at quantiles of the run's batches by positions: one pass, or two where gradients
    are accumulated, since the second has those of the first in memory."""
    training = job.recipe.training
    size, passes = training.per_device_train_batch_size, min(2, training.gradient_accumulation_steps)
    lengths = [len(row) for row in job.rows.train]
    found = training_batches(lengths, size * passes, seed=job.recipe.seed, epoch=0)
    found.sort(key=lambda batch: positions([job.rows.train[row] for row in batch], size))
    places = sorted({round(share * (len(found) - 1)) for share in quantiles}, reverse=True)
    chosen = {
        positions([job.rows.train[row] for row in found[place]], size): found[place] for place in reversed(places)
    }
    return [chosen[large] for large in sorted(chosen, reverse=True)]


def _evaluation(job: Job, base: Base, adapter: Adapter) -> Peak:
    """The peak over the heaviest batch of the validation rows: scores, and answers where there are any."""
    examples, size = job.rows.validation, job.recipe.training.per_device_eval_batch_size
    heaviest = evaluation_batches([len(example) for example in examples], size)[0]
    chosen = [examples[row] for row in heaviest]
    base.model.eval()
    adapter.eval()
    objective = job.recipe.objective
    with watched(base, adapter) as live:
        if isinstance(objective, Causal) or objective.longest_answer(chosen):
            row_figures(base, chosen, ADAPTER, size)
        else:
            objective.evaluate(base, chosen, ADAPTER, size)
    peaks = [live.peak]
    longest = objective.longest_answer(chosen)
    if longest:
        prompts = [list(turn.ids[: turn.prompt]) for turn in chosen]
        peaks += [_decoding(base, adapter, prompts, 0), _decoding(base, adapter, prompts, longest)]
    return max(peaks, key=lambda peak: peak.total)


@torch.no_grad()
def _decoding(base: Base, adapter: Adapter, prompts: list[list[int]], written: int) -> Peak:
    """The peak of reading prompts, or of writing one token more after `written` ones."""
    longer = [prompt + prompt[-1:] * max(0, written - 1) for prompt in prompts]
    route = Route.all(ADAPTER)
    with base.route(route):
        decoder = Decoder(base, longer, route, True)
        if not written:
            with watched(base, adapter) as live:
                decoder.scores()
            return live.peak
        decoder.scores()
        decoder.add(torch.zeros(len(prompts), dtype=torch.long), torch.ones(len(prompts), dtype=torch.bool))
        with watched(base, adapter) as live:
            decoder.scores()
        return live.peak


def _merging(job: Job, base: Base, adapter: Adapter) -> Peak | None:
    if not job.method.mergeable:
        return None
    try:
        with watched(base, adapter) as live:
            merge_into(base, ADAPTER)
    except NotMergeable:
        return None
    return live.peak
