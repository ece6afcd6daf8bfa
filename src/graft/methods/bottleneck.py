"""Bottleneck adapters: a small network after a block, with its own residual."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from graft.methods.base import Bypass, Method
from graft.model import Base
from graft.parts.base import Part
from graft.parts.bypass import BypassPart
from graft.sites import Site


class Bottleneck(Method):
    """A small network with a residual after the blocks of every layer (Houlsby et al. 2019; Pfeiffer et al. 2020)."""

    name: ClassVar[str] = "bottleneck"
    source: ClassVar[str] = "Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, arXiv 2005.00247"
    unified: ClassVar[Bypass] = Bypass("f(h Wd) Wu", "block output (sequential)", "attention and FFN", "h + Δh")
    peft_type: ClassVar[str] = "GRAFT_BOTTLENECK"
    small: ClassVar[Mapping[str, Any]] = {"bottleneck_size": 6, "activation": "gelu"}
    rate_small: ClassVar[float] = 4e-3
    rate_large: ClassVar[float] = 2e-4

    aliases: ClassVar[dict[str, str]] = Method.aliases | {
        "adapter_size": "bottleneck_size",
        "non_linearity": "activation",
    }

    bottleneck_size: int = Field(default=32, ge=1, le=65536)
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
        return site.linear or site.block

    def part(self, site: Site) -> Part:
        """A bottleneck at one site."""
        return BypassPart(site, self.bottleneck_size, self.activation, parallel=False)
