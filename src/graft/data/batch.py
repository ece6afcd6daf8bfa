"""From rows to batches: rows of like length together, padded to the longest of their batch."""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graft.errors import ResourceError
from graft.limits import is_memory

_POOL = 50
"""Batches that are sorted by length together: large enough to leave little padding, small enough to stay random."""


def training_batches(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers of each batch of one epoch: every row once, in an order that depends on seed and epoch only.

    Rows are shuffled, sorted by length within pools of 50 batches, cut, and the batches shuffled again.
    """
    generator = random.Random(f"{seed}/{epoch}")
    rows = list(range(len(lengths)))
    generator.shuffle(rows)
    batches = []
    for start in range(0, len(rows), size * _POOL):
        pool = sorted(rows[start : start + size * _POOL], key=lambda row: lengths[row])
        batches += [pool[first : first + size] for first in range(0, len(pool), size)]
    generator.shuffle(batches)
    return batches


def evaluation_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers of each batch, longest rows first, so that too large a batch fails at once."""
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def in_batches(
    lengths: Sequence[int],
    size: int,
    work: Callable[[list[int]], None],
    progress: Callable[[float], None] | None = None,
) -> int:
    """Call `work` with the row numbers of each evaluation batch; returns how many rows the last batches had at most.

    Where memory runs out, batches of half the size go on, so `work` adds to what is kept at its end only. `progress`
    is called with the share of rows that are done. Raises `ResourceError` when one row alone does not fit.
    """
    waiting = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while waiting:
        rows = waiting[:size]
        fits = True
        try:
            work(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_memory(error):
                raise
            fits = False
        if not fits:  # outside the handler, which keeps the tensors of the failed pass alive
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(rows) == 1:
                raise ResourceError(
                    f"out of memory with one row of {lengths[rows[0]]:,} tokens in evaluation",
                    "shorten it (max_length), or use a smaller base",
                )
            size = len(rows) // 2
            continue
        waiting = waiting[len(rows) :]
        if progress is not None:
            progress(1 - len(waiting) / len(lengths))
    return size


def pad(rows: Sequence[Sequence[int]], value: int, device: torch.device | str = "cpu") -> Tensor:
    """Ids [rows, longest], padded on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)
