"""Optimizer and learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Literal

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["linear", "cosine", "constant"]


def make_optimizer(parameters: Iterable[nn.Parameter], rate: float, weight_decay: float, fused: bool = True) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); vectors (biases, norms, scales) do not decay.

    `fused` updates all tensors in one kernel where the device has one.
    """
    given = list(parameters)
    groups = [
        {"params": [p for p in given if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in given if p.dim() <= 1], "weight_decay": 0.0},
    ]
    known = all(parameter.device.type in ("cpu", "cuda") for parameter in given)
    return AdamW([group for group in groups if group["params"]], lr=rate, fused=fused and known)


def share_of_peak(step: int, total: int, warmup: int, schedule: Schedule) -> float:
    """The learning rate of optimizer step `step` (from 0) as a share of its peak.

    Warm-up rises in equal parts and reaches the peak at step `warmup`; the first step is never 0, the last
    never below 0.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done


def make_schedule(optimizer: AdamW, total: int, warmup: int, schedule: Schedule) -> LambdaLR:
    """The schedule over `total` optimizer steps."""
    return LambdaLR(optimizer, lambda step: share_of_peak(step, total, warmup, schedule))
