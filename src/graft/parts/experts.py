"""Routed mixtures of low-rank experts."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.parts.base import Part, at_dtype_of


class Router(nn.Module):
    """G(x): for each token the softmax over its `top` experts with the largest scores, zero for the others."""

    def __init__(self, d_in: int, experts: int, top: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d_in))
        nn.init.normal_(self.weight, std=0.02)
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> weights [..., experts] that sum to one."""
        scores = F.linear(at_dtype_of(x, self.weight), self.weight).float()
        best, index = scores.topk(self.top, dim=-1)
        return torch.zeros_like(scores).scatter(-1, index, best.softmax(dim=-1))


class ExpertsPart(Part):
    """y + s·Σ_t G(x)_t B_t A_t drop(x) over T experts, as one product of rank T·r.

    A subclass gives `down(x)`, the states A_t x of all experts [..., T, r]; B [T, d_out, r] starts at zero, so the
    model starts as the base.
    """

    def __init__(self, d_in: int, d_out: int, r: int, experts: int, top: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.router = Router(d_in, experts, top)
        self.experts_B = nn.Parameter(torch.zeros(experts, d_out, r))
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def down(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., T, r]."""
        raise NotImplementedError

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, S, d_in], y [B, S, d_out] -> [B, S, d_out]."""
        low = self.down(self.dropout(x))
        weighted = (low * self.router(x)[..., None].to(low.dtype)).flatten(-2)
        up = self.experts_B.transpose(0, 1).flatten(1)
        return y + (F.linear(at_dtype_of(weighted, up), up) * self.scale).to(y.dtype)
