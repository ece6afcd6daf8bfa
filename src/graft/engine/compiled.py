"""Regional compilation: the layer that a base repeats is compiled once, where the rest of a run pays for it."""

import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch
from torch import nn

from graft.model import Base

T = TypeVar("T")
Choice = Literal["auto"] | bool

GAIN = 0.17
"""Share of a step's time that compiling saves: SmolLM2-135M with LoRA on two cores: 17 to 25 %."""
COST = 25.0
"""Seconds until compiled code is there, on two cores: 19 for SmolLM2-135M with LoRA (9 when its kernels are on
disk), and more for other forms of batches. What is on disk must not count: compiled layers round differently, and
the same recipe is to give the same adapter."""
RATE = {torch.float32: 0.8e11, torch.bfloat16: 2e11}
"""Operations a second and thread of a training step, which has four for each weight and token: measured on an AMD EPYC
with AVX512-BF16. A clock would decide otherwise from run to run."""
_WARNINGS = (
    "The .grad attribute of a Tensor that is not a leaf",
    "<class 'torch.autograd.function.Function'> should not be instantiated",
    "`torch.jit",
)
"""What torch 2.13 says of its own code while it compiles."""


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


def pays(base: Base, tokens: int) -> bool:
    """Whether compiling saves more than it costs in a run over so many tokens, padding included."""
    weights = sum(parameter.numel() for layer in layers_of(base) for parameter in layer.parameters())
    rate = RATE.get(base.model.dtype, RATE[torch.float32]) * torch.get_num_threads()
    return GAIN * 4 * weights * tokens / rate > COST


class LayerCompiler:
    """Compiles the layers of a base for a run, and leaves them as they were."""

    def __init__(self, base: Base, choice: Choice, say: Callable[[str], None]) -> None:
        self.base = base
        self.choice = choice
        self.say = say
        self.on = False
        self.first = True

    def start(self, tokens: int) -> None:
        """Before the first step of a run over so many tokens: compile where the recipe says so, or where it pays."""
        if self.choice is True:
            self._compile("set in the recipe")
        elif self._may() and pays(self.base, tokens):
            self._compile(f"the run is long enough to gain from it, about {GAIN:.0%} of each step")

    def _may(self) -> bool:
        # On CPUs only: what it costs and gains was not measured on GPUs. Not with dropout: compiled code draws a random
        # number for each element, so an encoder's step took 139 instead of 112 ms.
        return (
            self.choice == "auto"
            and self.base.device.type == "cpu"
            and not drops(layers_of(self.base))
            and unavailable() is None
        )

    def attempt(self, rows: int, step: Callable[[], T], undo: Callable[[], None]) -> T:
        """`step()`, whose smallest pass has so many rows; where `auto` chose compiled code that does not work, again
        without it after `undo()`."""
        if rows == 1:  # torch compiles sizes of 1 anew
            with self.paused():
                return step()
        if not (self.on and self.first):
            return step()
        began = time.perf_counter()
        try:
            result = step()
        except RuntimeError as error:  # TorchDynamo's errors and the compiler's are of this class
            if self.choice is True:
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.say(f"compiling failed, so the run goes on without: {lines[0][:160]}")
            self.stop()
            self.choice = False
            undo()
            return step()
        self.first = False
        self.say(f"the first compiled step took {time.perf_counter() - began:.0f} s")
        return result

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
