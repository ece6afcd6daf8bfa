"""From rows to batches: rows of like length together, padded to the longest of their batch."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

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


def pad(rows: Sequence[Sequence[int]], value: int, device: torch.device | str = "cpu") -> Tensor:
    """Ids [rows, longest], padded on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long, device=device)
