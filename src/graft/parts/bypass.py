"""A small network around a place of the base: bottleneck and parallel adapters, and their relatives."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from graft.parts.base import Form, Part, at_dtype_of
from graft.sites import Site


class BypassPart(Part):
    """y + s·up(f(down(h))), with h = y (sequential) or h = x (parallel); down [w, d], up [d, w].

    up starts at zero, so the model starts as the base. When `gated`, the result is (1 - λ) y + λ s·up(f(down(h)))
    with one trained λ = tanh(gate) that starts at zero, and up starts as down does: with both at zero neither would
    ever get a gradient.
    """

    def __init__(
        self, site: Site, width: int, activation: str, *, parallel: bool, scale: float = 1.0, gated: bool = False
    ) -> None:
        super().__init__()
        self.down = nn.Linear(site.d_in if parallel else site.d_out, width)
        self.up = nn.Linear(width, site.d_out)
        self.gate = nn.Parameter(torch.zeros(())) if gated else None
        if not gated:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        self.activation = nn.Identity() if activation == "none" else ACT2FN[activation]
        self.parallel = parallel
        self.scale = scale

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, S, d_in], y [B, S, d_out] -> [B, S, d_out]."""
        seen = at_dtype_of(x if self.parallel else y, self.down.weight)
        middle = self.activation(F.linear(seen, self.down.weight, self.down.bias))
        delta = F.linear(middle, self.up.weight, self.up.bias).to(y.dtype) * self.scale
        if self.gate is None:
            return y + delta
        share = torch.tanh(self.gate)
        return ((1 - share) * y + share * delta).to(y.dtype)

    def form(self) -> Form | None:
        """The two matrices, and 1 - λ of y where it is gated."""
        plain = isinstance(self.activation, nn.Identity)
        share = None if self.gate is None else torch.tanh(self.gate)
        scale = self.scale if share is None else self.scale * share
        return Form(
            down=self.down.weight,
            up=self.up.weight * scale,
            bias=self.down.bias,
            function=None if plain else self.activation,
            sees_output=not self.parallel,
            factor=None if share is None else (1 - share).expand(self.up.bias.shape),
            shift=self.up.bias * scale,
        )
