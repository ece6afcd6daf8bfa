"""The training loop: one for every method and objective."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from graft.data.batch import training_batches
from graft.diagnosis.curve import Facts
from graft.diagnosis.guard import RunGuard, rows_of
from graft.engine.compiled import LayerCompiler
from graft.engine.dropout import cheaper_dropout
from graft.engine.settings import Engine
from graft.errors import GuardError, ResourceError
from graft.limits import is_memory
from graft.methods.base import Method, Progress, method_of
from graft.model import Base
from graft.objectives.base import Objective, Result, silent
from graft.parts.base import Adapter
from graft.train import checkpoint
from graft.train.guards import MovementGuard
from graft.train.optim import make_optimizer, make_schedule, schedule_at
from graft.train.points import Fit, Point, logged
from graft.train.resume import Keeper, remembered, restore, whole_steps
from graft.train.settings import Training

T = TypeVar("T")
_SHOWN = 3
"""Answers that are kept of each evaluation."""


Watch = Callable[[Literal["training", "evaluating"], int, int], None]
"""Called with the phase, the steps done and the steps in all."""


def make_accelerator(precision: str) -> Accelerator:
    """accelerate's view of devices and processes, in the run's number format."""
    AcceleratorState._reset_state()  # it keeps the format of the first run in a process
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=not torch.cuda.is_available())


@dataclass
class Trainer:
    """Trains an attached adapter, with `rate` as peak learning rate.

    Each optimizer step is the mean over its whole effective batch, however it is cut into passes and processes.
    """

    base: Base
    adapter: Adapter
    objective: Objective
    training: Training
    rate: float
    seed: int
    accelerator: Accelerator
    checkpoints: Path | None = None
    record: Callable[[Point], None] | None = None
    progress: Watch | None = None
    engine: Engine = field(default_factory=Engine)
    say: Callable[[str], None] = silent
    pass_rows: int = 0
    """Rows of one pass: as the recipe says when left out, fewer where memory is too little. A step has the same rows
    and the same gradient, whatever it is cut into."""
    start: Path | None = None
    """A checkpoint of this very run, to go on behind it."""
    earlier: Sequence[Point] = ()
    """The points of the steps up to `start`."""
    facts: Facts = field(default_factory=Facts)
    """What the run's guard knows of it."""
    bad_batch: Path | None = None
    """Where rows of batches that gave no numbers are written."""

    def __post_init__(self) -> None:
        self.guard = self._guard(None)
        self.pass_rows = self.pass_rows or self.training.per_device_train_batch_size
        self.evaluation_rows = self.training.per_device_eval_batch_size

    @property
    def method(self) -> Method:
        """What built the adapter."""
        return method_of(self.adapter)

    @property
    def rows_per_step(self) -> int:
        """Rows of one effective batch."""
        passes = self.training.gradient_accumulation_steps * int(self.accelerator.num_processes)
        return self.training.per_device_train_batch_size * passes

    def planned_steps(self, rows: int) -> int:
        """Optimizer steps of a run over so many training rows."""
        per_epoch = math.ceil(rows / self.rows_per_step)
        steps = max(1, round(per_epoch * self.training.num_train_epochs)) * self.objective.updates
        return min(steps, self.training.max_steps or steps)

    def fit(self, train: Sequence[Any], validation: Sequence[Any]) -> Fit:
        """Train, evaluate now and then, and end with the best step.

        A step whose loss or gradient is not finite changes nothing. Raises `GuardError` at the third in a row, for
        figures that cannot become good, and when a trainable tensor does not move or a frozen one does.
        """
        with self._telling_what_is_kept(), self.ready() as optimizer:
            return self._fit(optimizer, train, validation)

    @contextmanager
    def ready(self) -> Iterator[Optimizer]:
        """The model as training steps need it, and the optimizer of what trains."""
        with cheaper_dropout(self.base.model) if self.engine.cheaper_dropout else nullcontext():
            if self.training.gradient_checkpointing:
                self.base.checkpoint_activations()
            self._training_mode(True)
            yield make_optimizer(
                self.parameters(),
                self.rate,
                self.training.weight_decay,
                self.engine.fused_optimizer,
                self.training.optimizer,
            )
            self._training_mode(False)

    def _fit(self, optimizer: Optimizer, train: Sequence[Any], validation: Sequence[Any]) -> Fit:
        total = self.planned_steps(len(train))
        every = self.training.eval_steps or math.ceil(total / 4)
        warmup = int(total * self.training.warmup_ratio)
        schedule = make_schedule(optimizer, total, warmup, self.training.lr_scheduler_type)
        self.guard = self._guard(total)
        movement = MovementGuard(self.base, self.adapter, self.method.steps_to_move + self.objective.patience)
        result = Fit()
        with self.accelerator.autocast():
            self.objective.begin(self.base, self.adapter, train, self.say)
        self._training_mode(True)
        if self.start is not None:
            result = self._resumed(self.start, optimizer, movement)
            schedule_at(schedule, result.steps)
            self.guard.resumed(*logged(self.earlier))
            movement.begun = result.steps
        if self.training.preflight:
            self.rehearse(train)
        # torch 2.13 cannot compile a checkpoint that restores the route; over NF4 it was not tried.
        uncompiled = self.training.gradient_checkpointing or self.base.quantization is not None
        uncompiled = uncompiled or not self.objective.compiles
        compiler = LayerCompiler(self.base, False if uncompiled else self.engine.compile, self.say)
        lengths = [len(example) for example in train]
        compiler.start(round(sum(lengths) / len(lengths) * self.rows_per_step * total))
        keeper = Keeper(self.checkpoints if self.accelerator.is_main_process else None)
        clock = time.perf_counter()
        for rows in self._batches(lengths, total, result.steps):
            with whole_steps() as interrupted:
                point = self._step([train[row] for row in rows], optimizer, schedule, compiler, movement, result, total)
                taken = time.perf_counter() - clock
                result.seconds += taken
                point = replace(point, seconds=result.seconds)
                evaluates = result.steps % every == 0 or result.steps == total
                if interrupted() and not evaluates:
                    self._tell(result, point, total)
                    self._keep(keeper, optimizer, result, movement)
            if interrupted():
                raise KeyboardInterrupt
            if evaluates:
                with compiler.paused():
                    point = self._evaluate(validation, result, point, total)
            self._tell(result, point, total)
            if (evaluates or keeper.due()) and result.steps < total:
                self._keep(keeper, optimizer, result, movement)
            clock = time.perf_counter()
        compiler.stop()
        movement.check_begun(result.steps)
        movement.check_still(result.steps)
        last = result.best is None or result.best_step == result.steps
        if self.training.load_best_model_at_end and self.checkpoints and not last:
            checkpoint.read(self.checkpoints / checkpoint.BEST, self.adapter)
        self._require_sound(result.steps)
        return result

    def _guard(self, total: int | None) -> RunGuard:
        facts = replace(self.facts, total=total)
        return RunGuard(facts, self.say, self.bad_batch if self.accelerator.is_main_process else None)

    def _step(
        self,
        rows: list[Any],
        optimizer: Optimizer,
        schedule: LambdaLR,
        compiler: LayerCompiler,
        movement: MovementGuard,
        result: Fit,
        total: int,
    ) -> Point:
        """One optimizer step over `rows`, or what the objective makes of them; none where they give no numbers."""
        chosen = self._collected(rows, result.steps)
        progress = Progress(result.steps + 1, total)
        self.method.before_step(self.adapter, progress)
        smallest = len(chosen) % self.pass_rows or len(chosen)
        loss, norm = compiler.attempt(smallest, partial(self.bearable, chosen), optimizer.zero_grad)
        rate = float(schedule.get_last_lr()[0])
        if self.guard.may_step(progress.step, loss, norm, lambda: rows_of(chosen, self.base.tokenizer)):
            movement.saw_gradients()
            optimizer.step()
            began = time.perf_counter()
            movement.after_step(progress.step)
            result.seconds -= time.perf_counter() - began
            self.method.after_optimizer(self.adapter, progress)
        else:
            optimizer.zero_grad(set_to_none=True)
            optimizer.step()  # without gradients it changes nothing, and the schedule knows that it was asked
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        result.steps += 1
        result.examples += len(rows)
        watched = self.objective.after_step(result.steps)
        return Point(result.steps, result.examples, loss, rate, norm, 0.0, watched=watched)

    def _state(self, result: Fit, movement: MovementGuard) -> dict[str, Any]:
        """What a checkpoint says of a run, beside tensors."""
        best = result.best
        return {
            "step": result.steps,
            "examples": result.examples,
            "seconds": result.seconds,
            "pass_rows": self.pass_rows,
            "touched": sorted(movement.touched),
            "best": None if best is None else {"step": result.best_step, "quality": best.quality, "loss": best.loss},
        }

    def _resumed(self, start: Path, optimizer: Optimizer, movement: MovementGuard) -> Fit:
        """Put adapter, optimizer, random numbers and what the objective remembers back, and give what was done."""
        state, kept = checkpoint.read(start, self.adapter), checkpoint.read_training(start)
        restore(optimizer, kept, state["optimizer"])
        self.objective.recall(remembered(kept))
        self.pass_rows = state["pass_rows"]
        movement.touched.update(state.get("touched", ()))
        best = state["best"]
        return Fit(
            steps=state["step"],
            examples=state["examples"],
            seconds=state["seconds"],
            best_step=0 if best is None else best["step"],
            best=None if best is None else Result(best["quality"], best["loss"], []),
            points=list(self.earlier),
        )

    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [parameter for _, parameter in self.adapter.trainable()]

    def _batches(self, lengths: Sequence[int], total: int, done: int = 0) -> Iterator[list[int]]:
        """Row numbers of each effective batch but the first `done`, over as many epochs as `total` steps need."""
        epochs = (
            training_batches(lengths, self.rows_per_step, seed=self.seed, epoch=epoch) for epoch in itertools.count()
        )
        each = (batch for epoch in epochs for batch in epoch for _ in range(self.objective.updates))
        return itertools.islice(each, done, total)

    def _collected(self, chosen: list[Any], step: int) -> list[Any]:
        """What a step is made over: its rows, or what its objective makes of them."""

        def collect() -> list[Any]:
            with self.accelerator.autocast():
                again = step % self.objective.updates != 0
                return self.objective.collect(self.base, chosen, self.adapter.name, self.pass_rows, again)

        return self._within_memory(collect, chosen)

    def _training_mode(self, training: bool) -> None:
        self.base.model.train(training)
        self.adapter.train(training)

    def rehearse(self, train: Sequence[Any]) -> None:
        """Run the pass over the most positions once, forward and backward, and leave no trace: neither gradients nor
        random numbers drawn. Raises `ResourceError` when a pass of one row does not fit."""
        lengths = [len(example) for example in train]
        passes = [
            rows[start : start + self.pass_rows]
            for rows in training_batches(lengths, self.rows_per_step, seed=self.seed, epoch=0)
            for start in range(0, len(rows), self.pass_rows)
        ]
        heaviest = max(passes, key=lambda rows: len(rows) * max(lengths[row] for row in rows))
        with torch.random.fork_rng():
            self.bearable(self.objective.imagine([train[row] for row in heaviest]))
        self._drop_gradients()

    def bearable(self, chosen: Sequence[Any]) -> tuple[float, float]:
        """`gradients`, in passes of half the rows, from then on, where memory runs out.

        Raises `ResourceError` when a pass of one row does not fit.
        """
        return self._within_memory(lambda: self.gradients(chosen), chosen)

    def _within_memory(self, work: Callable[[], T], chosen: Sequence[Any]) -> T:
        """`work()`, from the beginning with `pass_rows` halved where memory runs out in it."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                # A compiler has memory of its own.
                failed_compiler = isinstance(error, torch._dynamo.exc.TorchDynamoException)
                if failed_compiler or not is_memory(error) or self.accelerator.num_processes > 1:
                    raise
            # Outside the handler, which keeps the tensors of the failed pass alive.
            self._drop_gradients()
            if self.base.device.type == "cuda":
                torch.cuda.empty_cache()
            longest = max(len(example) for example in chosen)
            if self.pass_rows == 1:
                raise ResourceError(
                    f"out of memory with one row of {longest:,} tokens at a time",
                    "gradient_checkpointing=true, quantization=nf4 or a smaller max_length take less; see `graft plan`",
                )
            self.pass_rows = math.ceil(self.pass_rows / 2)
            self.say(f"out of memory: passes of {self.pass_rows} rows from here on, each step has the same rows")

    def _drop_gradients(self) -> None:
        for parameter in self.parameters():
            parameter.grad = None

    def gradients(self, chosen: Sequence[Any]) -> tuple[float, float]:
        """Clipped gradients of one effective batch; returns its mean loss and the gradient's norm before clipping."""
        size = self.pass_rows
        passes = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        weight = self.objective.weight(chosen)
        total = torch.zeros((), device=self.base.device)
        for examples in passes[self.accelerator.process_index :: self.accelerator.num_processes]:
            with self.accelerator.autocast():
                loss = self.objective.loss(self.base, examples, self.adapter.name)
            self.accelerator.backward(loss.total / weight)
            total += loss.total.detach()
        penalty = self.method.penalty(self.adapter)
        if penalty is not None:
            self.accelerator.backward(penalty / int(self.accelerator.num_processes))
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, "sum")
            for parameter in self.parameters():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, "sum")
        # Said, since torch would not choose it for the fake tensors of a plan.
        together = True if self.base.device.type in ("cpu", "cuda") else None
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.training.max_grad_norm, foreach=together)
        return float(total) / weight, float(norm)

    def _evaluate(self, validation: Sequence[Any], result: Fit, point: Point, total: int) -> Point:
        """Evaluate, keep the checkpoint if it is the best so far, and return the point with its figures."""
        if self.progress:
            self.progress("evaluating", result.steps, total)
        began = time.perf_counter()
        self._training_mode(False)
        with self.accelerator.autocast():
            measured = self.objective.evaluate(
                self.base, validation, self.adapter.name, self.evaluation_rows, quick=True
            )
        self._training_mode(True)
        if 0 < measured.batch_size < self.evaluation_rows:
            self.evaluation_rows = measured.batch_size
            self.say(f"out of memory in evaluation: passes of {self.evaluation_rows} rows from here on")
        settled = self.method.settled(Progress(result.steps, total))
        if settled and math.isfinite(measured.loss) and self._better(measured, result.best):
            result.best_step, result.best = result.steps, measured
            if self.checkpoints is not None and self.accelerator.is_main_process:
                state = {"step": result.steps, "quality": measured.quality, "loss": measured.loss}
                checkpoint.write(self.checkpoints / checkpoint.BEST, self.adapter, state)
        return replace(
            point,
            quality=measured.quality,
            validation_loss=measured.loss,
            evaluation_seconds=time.perf_counter() - began,
            figures=measured.figures,
            samples=measured.samples[:_SHOWN],
        )

    def _better(self, now: Result, best: Result | None) -> bool:
        """Whether an evaluation is better than the best one so far; of equal ones the other figure decides."""
        if best is None:
            return True
        if (self.training.metric_for_best_model or self.objective.best_by) == "loss":
            return (-now.loss, now.quality) > (-best.loss, best.quality)
        return (now.quality, -now.loss) > (best.quality, -best.loss)

    def _tell(self, result: Fit, point: Point, total: int) -> None:
        """Note a point, let those who listen know, and stop where the figures cannot become good."""
        result.points.append(point)
        if self.record:
            self.record(point)
        if self.progress:
            self.progress("training", result.steps, total)
        steps, evaluations = logged([point])
        self.guard.after_step(steps[0])
        for seen in evaluations:
            self.guard.after_evaluation(seen)

    def _keep(self, keeper: Keeper, optimizer: Optimizer, result: Fit, movement: MovementGuard) -> None:
        """Write the checkpoint behind a step, unless its values are no numbers: it would outlive a good one."""
        if self._sound():
            keeper.keep(self.adapter, optimizer, self._state(result, movement), self.objective.memory())

    def _sound(self) -> bool:
        return all(bool(torch.isfinite(tensor).all()) for _, tensor in self.adapter.trainable())

    def _require_sound(self, step: int) -> None:
        if not self._sound():
            raise GuardError(f"after step {step} the adapter has values that are no numbers", "lower the learning rate")

    @contextmanager
    def _telling_what_is_kept(self) -> Iterator[None]:
        """What a guard stops ends with the place of the last good checkpoint."""
        try:
            yield
        except GuardError as error:
            kept = "no checkpoint was written before"
            if self.checkpoints is not None and (self.checkpoints / checkpoint.BEST).is_dir():
                state = checkpoint.check(self.checkpoints / checkpoint.BEST)
                kept = f"the best adapter, of step {state['step']}, is in {self.checkpoints / checkpoint.BEST}"
            raise GuardError(error.message, "; ".join(filter(None, (error.remedy, kept)))) from error.__cause__
