"""Attention by dense matrix products, for processors where PyTorch's fused kernel is slower.

On CPUs the fused kernel of torch 2.13 works in small tiles. Forward and backward of 8 rows with 9 heads of 64 in bf16
took 11.8 ms (48 tokens), 39.8 (192) and 207 (512); these products 2.4, 12.1 and 71.5. In fp32 they win for short rows
only: 3.9 against 5.6 ms (48), 33 against 37 (192).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft.engine import dropout as dropouts

LONGEST = {torch.bfloat16: 1024, torch.float32: 64}
"""Keys up to which dense products are taken. Beyond them the scores, which grow with the square of the length, are too
large."""
KEPT = 128
"""Keys up to which the probabilities are kept for the backward pass rather than computed again: that takes 25 % less
time, and up to here a tenth of the memory of a layer's activations."""


def is_faster(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `dense_attention` can compute this attention, and is the faster way."""
    if query.device.type != "cpu" or query.shape[2] == 1 or key.shape[2] > LONGEST.get(query.dtype, 0):
        return False
    learned = mask is not None and mask.requires_grad  # T5's position bias: it would get no gradient
    return not learned and key.shape == value.shape and query.dtype == key.dtype == value.dtype


def at_autocast(x: Tensor) -> Tensor:
    """x in the number format of autocast, where that is on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(s·q kᵀ + mask) v, for q [B, heads, S, d], k and v [B, kv_heads, T, d] -> [B, heads, S, d].

    `mask` [B or 1, heads or 1, S, T] is bool (True: seen) or added to the scores; without one, `causal` lets query i
    see keys 0 to i. Scores are rounded to the dtype of q, as in eager attention of transformers; a fused kernel keeps
    them in fp32. A query that sees no key gets a mean of all values.
    """
    bias = _bias(mask, query, key, causal)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    output: Tensor = _Dense.apply(query, key, value, bias, scale, dropout)  # type: ignore[no-untyped-call]
    return output


def _bias(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """What is added to the scores: not -inf, since a query that sees nothing would get no numbers."""
    if mask is None:
        if not causal:
            return None
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = seen.tril()[None, None]
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)


class _Dense(torch.autograd.Function):
    """Query heads that share a key head are rows of one product: [B·kv_heads, heads/kv_heads·S, d]."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dropout: float
    ) -> Tensor:
        batch, heads, rows, width = query.shape
        groups = key.shape[1]
        shape = (batch * groups, heads // groups * rows, width)
        q = (query * scale).reshape(shape)
        k, v = key.reshape(shape[0], -1, width), value.reshape(shape[0], -1, width)
        p = _probabilities(q, k, bias, (batch, heads, rows, k.shape[1]))
        kept = None
        if dropout > 0:
            # Compiled code has numbers of its own. (bernoulli_ on truth values keeps nothing there, in torch 2.13.)
            compiling = torch.compiler.is_compiling()
            kept = torch.native_dropout(p, dropout, True)[1] if compiling else dropouts.keep_mask(p, dropout)
        output = torch.bmm(_dropped(p, kept, dropout), v)
        # Compiled code would be made twice, for lengths below and above.
        keep = not torch.compiler.is_compiling() and k.shape[1] <= KEPT
        ctx.save_for_backward(q, k, v, bias, kept, p if keep else None)
        ctx.scale, ctx.dropout, ctx.shapes = scale, dropout, (query.shape, key.shape)
        return output.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, kept, p = ctx.saved_tensors
        query_shape, key_shape = ctx.shapes
        if p is None:
            p = _probabilities(q, k, bias, (*query_shape[:3], k.shape[1]))
        grad = grads[0].reshape(q.shape)
        grad_v = torch.bmm(_dropped(p, kept, ctx.dropout).transpose(1, 2), grad)
        grad_p = _dropped(torch.bmm(grad, v.transpose(1, 2)), kept, ctx.dropout)
        grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
        grad_q = torch.bmm(grad_scores, k) * ctx.scale
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q)
        return grad_q.view(query_shape), grad_k.view(key_shape), grad_v.view(key_shape), None, None, None


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """[B·kv_heads, heads/kv_heads·S, T], for scores of `shape` [B, heads, S, T]."""
    scores = torch.bmm(q, k.transpose(1, 2))
    if bias is not None:
        scores = (scores.view(shape) + bias).view(scores.shape)
    return torch.softmax(scores, dim=-1)


def _dropped(p: Tensor, kept: Tensor | None, dropout: float) -> Tensor:
    return p if kept is None else dropouts.dropped(p, kept, dropout)
