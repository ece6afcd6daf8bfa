"""Regional compilation: the layer that a base repeats is compiled once, where the rest of a run pays for it."""

import os
import shutil
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir
from typing import Literal, TypeVar

import torch
from torch import nn

from graft.model import Base

T = TypeVar("T")
Choice = Literal["auto"] | bool

GAIN = 0.17
"""Share of a step's time that compiling saves: SmolLM2-135M with LoRA on two cores: 17 to 25 %."""
COST = {True: 12.0, False: 30.0}
"""Seconds until compiled code is there, on two cores: when the same was compiled before, since its kernels are kept on
disk, and when not. Measured: 9 and 19 s for SmolLM2-135M with LoRA."""
_WARNINGS = (
    "The .grad attribute of a Tensor that is not a leaf",
    "<class 'torch.autograd.function.Function'> should not be instantiated",
    "`torch.jit",
)
"""What torch 2.13 says of its own code while it compiles."""
_WATCHED = 5
"""Steps that are timed before `auto` decides; the first two warm up."""


def unavailable() -> str | None:
    """Why torch.compile cannot work on this machine; None when it can."""
    if torch.cuda.is_available():
        return None if find_spec("triton") else "the package triton is missing"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    return None if any(name and shutil.which(name) for name in compilers) else "there is no C++ compiler"


def layers_of(base: Base) -> list[nn.Module]:
    """The repeated layers but the first of each stack: what enters that has no gradient in most methods, so it would be
    compiled a second time, for little."""
    return [
        layer for stack in base.family.stacks for layer in list(base.body.get_submodule(stack.layers).children())[1:]
    ]


def drops(layers: Iterable[nn.Module]) -> bool:
    """Whether dropout is at work in training."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for layer in layers for module in layer.modules())


def pays(seconds_per_step: float, steps_left: int, known: bool) -> bool:
    """Whether compiling saves more than it costs in the steps that are left."""
    return GAIN * seconds_per_step * steps_left > COST[known]


class LayerCompiler:
    """Compiles the layers of a base at the right moment of a run, and leaves them as they were.

    `key` stands for what decides the code (model, method, number format): whether the same was compiled before.
    """

    def __init__(self, base: Base, choice: Choice, key: str, say: Callable[[str], None]) -> None:
        self.base = base
        self.choice = choice
        self.say = say
        # Beside torch's kernels, with which it is removed; torch sets the variable when it is loaded.
        self.mark = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or gettempdir()) / "graft" / key
        self.seconds: list[float] = []
        self.on = False
        self.first = True

    def start(self) -> None:
        """Before the first step: compile where the recipe says so, whatever it costs."""
        if self.choice is True:
            self._compile("set in the recipe")

    def attempt(self, rows: int, step: Callable[[], T], undo: Callable[[], None]) -> T:
        """`step()`, whose smallest pass has so many rows; where `auto` chose compiled code that does not work, again
        without it after `undo()`."""
        if rows == 1:  # torch compiles sizes of 1 anew
            with self.paused():
                return step()
        if not (self.on and self.first and self.choice == "auto"):
            return step()
        try:
            return step()
        except RuntimeError as error:  # TorchDynamo's errors and the compiler's are of this class
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.say(f"compiling failed, so the run goes on without: {lines[0][:160]}")
            self.stop()
            self.choice = False
            undo()
            return step()

    def after_step(self, seconds: float, steps_left: int) -> None:
        """After each step: note what it took, and compile when that pays."""
        if self.on and self.first:
            self.first = False
            self.mark.parent.mkdir(parents=True, exist_ok=True)
            self.mark.touch()
            self.say(f"the first compiled step took {seconds:.0f} s")
        if self.choice != "auto" or self.on:
            return
        self.seconds.append(seconds)
        # On CPUs only: what it costs and gains was not measured on GPUs. Not with dropout: compiled code draws a random
        # number for each element, so an encoder's step took 139 instead of 112 ms.
        measured = self.base.device.type == "cpu" and not drops(layers_of(self.base))
        if len(self.seconds) == _WATCHED and measured and unavailable() is None:
            step = statistics.median(self.seconds[2:])
            known = self.mark.exists()
            if pays(step, steps_left, known):
                self._compile(f"{steps_left} steps of {step:.2f} s are left, which it shortens by about {GAIN:.0%}")

    def _compile(self, why: str) -> None:
        self.say(f"compiling the repeated layer: {why}")
        for text in _WARNINGS:
            warnings.filterwarnings("ignore", message=text)
        for layer in layers_of(self.base):
            # Lengths differ from batch to batch: with fixed shapes each would be compiled anew.
            layer.compile(dynamic=True)
        self.on = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The layers as they are, for passes of another form (evaluation, decoding), which would be compiled anew."""
        compiled = {layer: layer._compiled_call_impl for layer in layers_of(self.base)}
        for layer in compiled:
            layer._compiled_call_impl = None
        try:
            yield
        finally:
            for layer, call in compiled.items():
                layer._compiled_call_impl = call

    def stop(self) -> None:
        """Leave the layers uncompiled."""
        for layer in layers_of(self.base):
            layer._compiled_call_impl = None
        self.on = False
