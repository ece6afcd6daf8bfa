"""Cross-entropy over a large vocabulary without all its scores in memory at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

AT_ONCE = 1 << 24
"""Scores in memory at a time: 64 MB in fp32, 341 tokens of a vocabulary of 49,152."""


def chunked_loss(states: Tensor, targets: Tensor, score: Callable[[Tensor], Tensor], words: int) -> Tensor:
    """Cross-entropy summed over tokens, from hidden states [tokens, d] and targets [tokens].

    `score` makes scores [n, words] of states [n, d]; nothing in it may train. Each chunk's gradient is made in the
    forward pass, right after its scores, so they are neither kept for the backward pass nor made twice.
    """
    if not (torch.is_grad_enabled() and states.requires_grad):
        return sum(_losses(states, targets, score, words), states.new_zeros((), dtype=torch.float))
    total: Tensor = _Chunked.apply(states, targets, score, words)  # type: ignore[no-untyped-call]
    return total


def chunked_losses(states: Tensor, targets: Tensor, score: Callable[[Tensor], Tensor], words: int) -> Tensor:
    """`chunked_loss` without the sum: one value for each token, fp32 [tokens], each with its own gradient.

    A token's loss depends on its own state alone, so the gradients of all of them are those of their sum, row by row.
    """
    if not (torch.is_grad_enabled() and states.requires_grad):
        chunks = zip(states.split(_size(words)), targets.split(_size(words)), strict=True)
        found = [F.cross_entropy(score(part), wanted, reduction="none") for part, wanted in chunks]
        return torch.cat(found) if found else states.new_zeros(0, dtype=torch.float)
    each: Tensor = _ChunkedEach.apply(states, targets, score, words)  # type: ignore[no-untyped-call]
    return each


def _size(words: int) -> int:
    return max(16, AT_ONCE // words)


def _losses(states: Tensor, targets: Tensor, score: Callable[[Tensor], Tensor], words: int) -> list[Tensor]:
    chunks = zip(states.split(_size(words)), targets.split(_size(words)), strict=True)
    return [F.cross_entropy(score(part), wanted, reduction="sum") for part, wanted in chunks]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, score: Callable[[Tensor], Tensor], words: int) -> Tensor:
        total = torch.zeros((), device=states.device)
        grads = []
        for part, wanted in zip(states.split(_size(words)), targets.split(_size(words)), strict=True):
            with torch.enable_grad():
                own = part.detach().requires_grad_()
                loss = F.cross_entropy(score(own), wanted, reduction="sum")
                grads.append(torch.autograd.grad(loss, own)[0])
            total += loss.detach()
        ctx.save_for_backward(torch.cat(grads))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grads[0], None, None, None


class _ChunkedEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, score: Callable[[Tensor], Tensor], words: int) -> Tensor:
        losses, grads = [], []
        for part, wanted in zip(states.split(_size(words)), targets.split(_size(words)), strict=True):
            with torch.enable_grad():
                own = part.detach().requires_grad_()
                each = F.cross_entropy(score(own), wanted, reduction="none")
                grads.append(torch.autograd.grad(each.sum(), own)[0])
            losses.append(each.detach())
        ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        own = ctx.saved_tensors[0]
        return own * grads[0][:, None].to(own.dtype), None, None, None
