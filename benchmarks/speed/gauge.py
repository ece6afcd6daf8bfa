"""What every side is measured with: a clock for steps, counts of tokens, and the loss on held-out rows."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SKIPPED = 3
"""First steps that the time per step leaves out: whatever is compiled is compiled in them."""
_AT_ONCE = 4
"""Held-out rows per pass: 400 tokens of each are 300 MB of logits with a vocabulary of 49,152."""


def wait() -> None:
    """Let a GPU finish what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Clock:
    """Times of a training: from its call to its end, without what lies between `pause` and `go_on`."""

    def __init__(self) -> None:
        wait()
        self.started = time.perf_counter()
        self.ended = self.started
        self.paused = 0.0
        self.pause_from = 0.0
        self.steps: list[float] = []

    def step(self) -> None:
        """An optimizer step is over."""
        wait()
        self.steps.append(time.perf_counter())

    def pause(self) -> None:
        """What comes is no training."""
        wait()
        self.pause_from = time.perf_counter()

    def go_on(self) -> None:
        """Training goes on."""
        wait()
        self.paused += time.perf_counter() - self.pause_from

    def stop(self) -> None:
        """The training is over."""
        wait()
        self.ended = time.perf_counter()

    def seconds(self) -> float:
        """Seconds of training, with everything that is prepared and checked in it."""
        return self.ended - self.started - self.paused


def step_ms(gaps: Sequence[float]) -> float | None:
    """The median of seconds per step in milliseconds, without the first ones."""
    return statistics.median(gaps[SKIPPED:]) * 1000 if len(gaps) > SKIPPED else None


class Counter:
    """Positions that pass the embedding table and the output head while it is on, padding included."""

    def __init__(self, embedding: nn.Module, head: nn.Module | None) -> None:
        self.on = True
        self.padded = 0
        self.head = 0
        embedding.register_forward_pre_hook(self._embedded)
        if head is not None:
            head.register_forward_pre_hook(self._scored)

    def _embedded(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.on and args:
            self.padded += args[0].numel()

    def _scored(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.on and args:
            self.head += args[0].numel() // args[0].shape[-1]


Logits = Callable[[Tensor, Tensor], Tensor]
"""Ids and mask [B, S] into logits: [B, S, vocabulary] of a chat model, [B, labels] of a classifier."""


@torch.no_grad()
def held_out(rows: Sequence[dict[str, Any]], logits_of: Logits, filler: int, device: torch.device) -> dict[str, float]:
    """The mean loss over all answer tokens (chat) or rows (labels), in fp32, and the accuracy of a classifier."""
    total = right = count = 0.0
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(ordered), _AT_ONCE):
        batch = ordered[start : start + _AT_ONCE]
        longest = len(batch[-1]["input_ids"])
        ids = torch.full((len(batch), longest), filler, device=device)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(batch):
            ids[number, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            mask[number, : len(row["input_ids"])] = 1
        logits = logits_of(ids, mask).float()
        if logits.dim() == 3:
            padded = [[*row["labels"], *[-100] * (longest - len(row["labels"]))] for row in batch]
            targets = torch.tensor(padded, device=device)[:, 1:]
            logits = logits[:, :-1][targets != -100]
            wanted = targets[targets != -100]
        else:
            wanted = torch.tensor([row["labels"] for row in batch], device=device)
        total += float(F.cross_entropy(logits, wanted, reduction="sum"))
        right += float((logits.argmax(dim=-1) == wanted).sum())
        count += len(wanted)
    return {"held_loss": total / count, "held_right": right / count}
