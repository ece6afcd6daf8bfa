"""Bottleneck adapters: a small network after a block, with its own residual."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from graft.methods.base import Bypass, Method
from graft.model import Base
from graft.parts.base import Part, at_dtype_of
from graft.sites import Site


class BottleneckPart(Part):
    """y + up(f(down(y))): down [w, d], up [d, w]; up starts at zero, so the model starts as the base."""

    def __init__(self, width: int, size: int, activation: str) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.activation = ACT2FN[activation]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y [B, S, d] -> [B, S, d]."""
        middle = self.activation(F.linear(at_dtype_of(y, self.down.weight), self.down.weight, self.down.bias))
        return y + F.linear(middle, self.up.weight, self.up.bias).to(y.dtype)


class Bottleneck(Method):
    """A small network with a residual after the blocks of every layer (Houlsby et al. 2019; Pfeiffer et al. 2020)."""

    name: ClassVar[str] = "bottleneck"
    source: ClassVar[str] = "Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, arXiv 2005.00247"
    unified: ClassVar[Bypass] = Bypass("f(h Wd) Wu", "block output (sequential)", "attention and FFN", "h + Δh")
    peft_type: ClassVar[str] = "GRAFT_BOTTLENECK"
    small: ClassVar[Mapping[str, Any]] = {"bottleneck_size": 6}
    rate_small: ClassVar[float] = 2e-3
    rate_large: ClassVar[float] = 2e-4

    aliases: ClassVar[dict[str, str]] = Method.aliases | {
        "adapter_size": "bottleneck_size",
        "non_linearity": "activation",
    }

    bottleneck_size: int = Field(default=32, ge=1)
    """Width of the bottleneck."""

    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """houlsby: after attention and after the feed-forward block; pfeiffer: after the feed-forward block only."""

    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """The nonlinearity."""

    def default_targets(self, base: Base) -> list[str]:
        """The blocks of the placement."""
        return ["attn", "mlp"] if self.placement == "houlsby" else ["mlp"]

    def accepts(self, site: Site) -> bool:
        """Blocks and linears: places with an output of their own."""
        return site.linear or site.role.endswith(("attn", "mlp"))

    def part(self, site: Site) -> Part:
        """A bottleneck at one site."""
        return BottleneckPart(site.d_out, self.bottleneck_size, self.activation)
