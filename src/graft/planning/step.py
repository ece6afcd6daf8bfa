"""A training step under watch: the same code for a real step and for a simulated one."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from graft.methods.base import Progress
from graft.model import Base
from graft.parts.base import Adapter
from graft.planning.live import Live, Peak, Work
from graft.train.loop import Trainer


@dataclass(frozen=True)
class Step:
    """What one optimizer step held at most and did: its passes over rows, and what follows them."""

    segments: list[Peak]
    """The peaks of each forward pass, of both halves of each backward pass, and of what follows them. With more layers
    the peak moves from one of them to another, but hardly within them."""
    at_rest: Peak
    """What stays between steps: weights, adapter and optimizer."""
    passes: Mapping[Work, float]
    """How often each work is done."""
    update: Mapping[Work, float]
    operations: list[str]

    @property
    def peak(self) -> Peak:
        """The highest of all."""
        return max(self.segments, key=lambda peak: peak.total)


def watched_step(trainer: Trainer, chosen: Sequence[Any]) -> Step:
    """One optimizer step over `chosen` rows, as every step after the first: with the optimizer's memory."""
    base, adapter, method = trainer.base, trainer.adapter, trainer.method
    with trainer.ready() as optimizer:
        for parameter in trainer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        live = watcher(base, adapter)
        live.hold((value for state in optimizer.state.values() for value in _tensors(state)), "optimizer")
        live.restart_peak()
        at_rest = live.peak
        handles = live.watch_gradients(trainer.parameters())
        progress = Progress(1, max(10, method.steps_to_move))
        marks = [0]
        with live, _marked(trainer, live, marks):
            method.before_step(adapter, progress)
            trainer.gradients(chosen)
            passes = len(live.works)
            with live.making("optimizer"):
                optimizer.step()
            method.after_optimizer(adapter, progress)
            optimizer.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
    parts = (live.peaks[start:end] for start, end in pairwise([*marks, len(live.peaks)]))
    segments = [max(part, key=lambda peak: peak.total) for part in parts if part]
    return Step(segments, at_rest, Counter(live.works[:passes]), Counter(live.works[passes:]), live.operations)


@contextmanager
def _marked(trainer: Trainer, live: Live, marks: list[int]) -> Iterator[None]:
    """Note the number of operations before each backward pass of a trainer, at its half and behind it."""
    accelerator = trainer.accelerator
    backward = accelerator.backward

    def noted(loss: Tensor) -> None:
        before = len(live.operations)
        backward(loss)
        after = len(live.operations)
        marks.extend((before, (before + after) // 2, after))

    accelerator.backward = noted
    try:
        yield
    finally:
        accelerator.backward = backward


@contextmanager
def watched(base: Base, adapter: Adapter | None) -> Iterator[Live]:
    """What runs inside is watched, beside the weights of a base and its adapter."""
    live = watcher(base, adapter)
    live.restart_peak()
    with live:
        yield live


def watcher(base: Base, adapter: Adapter | None) -> Live:
    """An observer that knows a base and its adapter."""
    live = Live(int(getattr(base.config, "vocab_size", 0)) if base.family.kind != "encoder" else 0)
    live.hold(_own(base), "weights")
    if adapter is not None:
        held = {id(tensor) for tensor in _own(base)}
        live.hold((tensor for _, tensor in adapter.named_tensors() if id(tensor) not in held), "adapter")
    return live


def _own(base: Base) -> list[Tensor]:
    """The base's tensors, buffers that are not saved included."""
    live = [*base.model.named_parameters(), *base.model.named_buffers()]
    return [tensor for name, tensor in live if ".graft." not in f".{name}"]


def _tensors(state: Any) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]
