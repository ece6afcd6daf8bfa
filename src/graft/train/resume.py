"""Going on where a run was ended: what a step depends on beside the adapter, when it is kept, and interrupts."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from graft.errors import DamagedError
from graft.parts.base import Adapter
from graft.train import checkpoint

_KEPT = 2
"""Checkpoints that are kept: should the newest be damaged, the one before it is there."""
_MEMORY = "objective."
_SHARE, _LEAST = 0.02, 30.0
"""Between evaluations one is written at the earliest after so many seconds, and takes at most this share of the time.
"""


def captured(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's memory and the random numbers, as tensors and as plain values."""
    tensors: dict[str, Tensor] = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random.cuda.{number}"] = state
    plain: dict[str, Any] = {}
    for place, kept in optimizer.state_dict()["state"].items():
        for name, value in _flat(kept):
            (tensors if isinstance(value, Tensor) else plain)[f"optimizer.{place}.{name}"] = value
    return tensors, plain


def _flat(kept: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The values of nested dictionaries: bitsandbytes puts those of its 8-bit optimizers one level down."""
    for name, value in kept.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{below}", inner) for below, inner in _flat(value))
        else:
            yield name, value


def restore(optimizer: Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    """Put back what `captured` gave. Raises `DamagedError` where it is another optimizer's."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | plain).items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            place, *above, name = rest.split(".")
            inside = state.setdefault(int(place), {})
            for group in above:
                inside = inside.setdefault(group, {})
            inside[name] = value
    given = optimizer.state_dict()
    places = {place for group in given["param_groups"] for place in group["params"]}
    if not state.keys() <= places:
        raise DamagedError(f"the checkpoint's optimizer has {len(state)} tensors, the run's {len(places)}")
    optimizer.load_state_dict(given | {"state": state})
    torch.set_rng_state(tensors["random.cpu"])
    cards = [tensors[key] for key in sorted(tensors) if key.startswith("random.cuda.")]
    if cards and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cards)


def remembered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `memory` that a checkpoint was written with."""
    return {name.removeprefix(_MEMORY): tensor for name, tensor in tensors.items() if name.startswith(_MEMORY)}


class Keeper:
    """Writes the checkpoints where a run can go on, and removes the older ones."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._last = time.monotonic()
        self._took = 0.0

    def due(self) -> bool:
        """Whether the last one is long enough ago."""
        return self.folder is not None and time.monotonic() - self._last > max(_LEAST, self._took / _SHARE)

    def keep(
        self, adapter: Adapter, optimizer: Optimizer, state: dict[str, Any], memory: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the checkpoint behind the step of `state`; `memory` is what the objective has to remember."""
        if self.folder is None:
            return
        began = time.monotonic()
        tensors, plain = captured(optimizer)
        tensors |= {f"{_MEMORY}{name}": tensor for name, tensor in (memory or {}).items()}
        checkpoint.write(checkpoint.at(self.folder, state["step"]), adapter, state | {"optimizer": plain}, tensors)
        for step in checkpoint.steps(self.folder)[_KEPT:]:
            checkpoint.remove(checkpoint.at(self.folder, step))
        self._last = time.monotonic()
        self._took = self._last - began

    def clear(self) -> None:
        """Remove all: the run has come to its end."""
        for step in checkpoint.steps(self.folder) if self.folder is not None else ():
            checkpoint.remove(checkpoint.at(self.folder, step))  # type: ignore[arg-type]


@contextmanager
def whole_steps() -> Iterator[Callable[[], bool]]:
    """Inside, an interrupt (Ctrl-C, SIGTERM, SIGHUP) waits until the caller asks for it, with what this gives, at the
    end of a step; a second one does not wait. Only a process's main thread hears of interrupts.
    """
    asked = False
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # Only what would raise: an ignored or default signal stays what it is.
            if number is not None and callable(signal.getsignal(number)):
                before[number] = signal.signal(number, note)
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
