"""Optimizer and learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from graft.errors import UsageError
from graft.quantize import require_bitsandbytes

Schedule = Literal["linear", "cosine", "constant"]
Kind = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]


def check_optimizer(kind: Kind, device: torch.device) -> None:
    """Refuse an optimizer that a device, or this installation, does not have."""
    if kind == "paged_adamw_8bit" and device.type != "cuda":
        raise UsageError(
            f"training.optimizer: paged_adamw_8bit pages its states out of a CUDA device's memory, and this is a "
            f"{device.type}",
            "use adamw_8bit, or leave it out",
        )
    if kind != "adamw":
        require_bitsandbytes(f"training.optimizer: {kind}")


def make_optimizer(
    parameters: Iterable[nn.Parameter], rate: float, weight_decay: float, fused: bool = True, kind: Kind = "adamw"
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); vectors (biases, norms, scales) do not decay.

    `fused` updates all tensors in one kernel where the device has one. The kinds with 8 bits (Dettmers et al. 2021,
    arXiv 2110.02861) keep both moments of tensors of 4,096 values and more in a byte each, with a scale for every 256;
    they have no fused kernel.
    """
    given = list(parameters)
    groups = [
        {"params": [p for p in given if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in given if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if kind != "adamw":
        check_optimizer(kind, given[0].device)
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        made: torch.optim.Optimizer = (AdamW8bit if kind == "adamw_8bit" else PagedAdamW8bit)(groups, lr=rate)
        return made
    known = all(parameter.device.type in ("cpu", "cuda") for parameter in given)
    return AdamW(groups, lr=rate, fused=fused and known)


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


def make_schedule(optimizer: torch.optim.Optimizer, total: int, warmup: int, schedule: Schedule) -> LambdaLR:
    """The schedule over `total` optimizer steps."""
    return LambdaLR(optimizer, lambda step: share_of_peak(step, total, warmup, schedule))


def schedule_at(schedule: LambdaLR, step: int) -> None:
    """Put a new schedule behind `step` steps, without going through them."""
    schedule.last_epoch = step
    schedule._step_count = step + 1
    rates = [base * share(step) for base, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
