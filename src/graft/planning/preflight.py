"""What a run says of its memory and time before its first step."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from graft.errors import GraftError
from graft.methods.base import Method
from graft.planning.live import KINDS
from graft.planning.machine import free_memory, remembered
from graft.planning.plan import WORKSPACE, estimate
from graft.planning.simulate import FEW, Job, Rows
from graft.recipe import Recipe
from graft.train.precision import Precision


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to take, and the rows of a pass that fit."""

    memory: int
    """Bytes that the process holds at the peak of a training step."""
    kinds: dict[str, int]
    """Live tensors at that peak."""
    seconds: float | None
    """Of all optimizer steps; None where this machine was not measured."""
    pass_rows: int
    lines: list[str]


def forecast(
    recipe: Recipe,
    method: Method,
    config: PretrainedConfig,
    precision: Precision,
    rows: Rows,
    free: Callable[[], int] | None = None,
) -> Forecast | None:
    """Predict a run from here on, before its base is loaded. Where that exceeds what is free, passes are halved until
    it fits or has one row. None where this recipe cannot be simulated; the run is then what shows what it takes.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = remembered()
    job = Job(recipe, method, config, precision, rows)
    limit = free() if free is not None else free_memory(device)
    held = _resident() + WORKSPACE if device.type == "cpu" else 0
    deep = int(config.num_hidden_layers) > 2 * FEW[1]
    size = first = recipe.training.per_device_train_batch_size
    while True:
        try:
            found = estimate(_in_passes(job, size), machine, deep, beside=False)
        except (GraftError, RuntimeError, NotImplementedError, TypeError, ValueError, MemoryError) as error:
            del error  # whatever a model's own code makes of tensors without numbers: no reason to stop a run
            return None
        live = sum(found.kinds.values())
        if live <= limit or size == 1:
            break
        size = -(-size // 2)
    parts = ", ".join(f"{kind} {_mib(found.kinds[kind])}" for kind in KINDS if found.kinds[kind] >= 1 << 20)
    lines = [f"expected at the peak of a step: {_mib(live)} MiB ({parts}); {_mib(limit)} MiB are free"]
    if found.run_seconds is not None:
        lines[0] += f"; {found.run_seconds:,.0f} s of training"
    if size < first:
        lines.append(f"that is for passes of {size} rows, since {first} would not fit; each step has the same rows")
    if live > limit:
        lines.append("that does not fit: `graft plan` says what would")
    return Forecast(held + live, found.kinds, found.run_seconds, size, lines)


def _in_passes(job: Job, size: int) -> Job:
    """The job with smaller passes, and as many rows to a step."""
    training = job.recipe.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    changed = {"per_device_train_batch_size": size, "gradient_accumulation_steps": -(-rows // size)}
    values: dict[str, Any] = {"training": training.model_copy(update=changed)}
    return replace(job, recipe=job.recipe.model_copy(update=values))


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
