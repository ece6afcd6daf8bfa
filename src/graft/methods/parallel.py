"""Parallel adapters: a small network beside a block."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from graft.methods.base import Bypass, Method
from graft.model import Base
from graft.parts.base import Part
from graft.parts.bypass import BypassPart
from graft.sites import Site


class Parallel(Method):
    """A small scaled network beside the feed-forward block of every layer: it reads the block's input and adds to its
    output (He et al. 2022, "scaled parallel adapter").
    """

    name: ClassVar[str] = "parallel"
    source: ClassVar[str] = "He et al. 2022, arXiv 2110.04366"
    unified: ClassVar[Bypass] = Bypass("f(x Wd) Wu", "block input (parallel)", "FFN (or attention)", "h + s·Δh")
    peft_type: ClassVar[str] = "GRAFT_PARALLEL"
    small: ClassVar[Mapping[str, Any]] = {"bottleneck_size": 6, "activation": "gelu"}
    rate_small: ClassVar[float] = 2e-3
    rate_large: ClassVar[float] = 2e-4

    aliases: ClassVar[dict[str, str]] = Method.aliases | {
        "adapter_size": "bottleneck_size",
        "non_linearity": "activation",
        "scaling": "scale",
    }

    bottleneck_size: int = Field(default=32, ge=1, le=65536)
    """Width of the network."""

    scale: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """What the network adds is multiplied by this; 1 is the plain parallel adapter. The paper found 4 best."""

    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """The nonlinearity."""

    def default_targets(self, base: Base) -> list[str]:
        """The feed-forward blocks, where the paper found it best."""
        return ["mlp"]

    def accepts(self, site: Site) -> bool:
        """Blocks and linears."""
        return site.linear or site.block

    def part(self, site: Site) -> Part:
        """A network beside one site."""
        return BypassPart(site, self.bottleneck_size, self.activation, parallel=True, scale=self.scale)
