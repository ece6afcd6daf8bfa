"""Mix-and-match adapter: a short prefix at attention and a scaled parallel adapter beside the feed-forward block."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from graft.methods.attended import check_length
from graft.methods.base import Bypass, Method
from graft.model import Base
from graft.parts.base import Part
from graft.parts.bypass import BypassPart
from graft.parts.prefix import PrefixPart
from graft.sites import Site


class Mam(Method):
    """A prefix of 30 at attention, and a scaled parallel adapter half as wide as the base beside every feed-forward
    block (He et al. 2022, "MAM adapter").
    """

    name: ClassVar[str] = "mam"
    source: ClassVar[str] = "He et al. 2022, arXiv 2110.04366"
    unified: ClassVar[Bypass] = Bypass(
        "softmax(x Wq Pk^T) Pv; f(x Wd) Wu", "layer input; block input", "attention; FFN", "(1-λ)h + λΔh; h + s·Δh"
    )
    peft_type: ClassVar[str] = "GRAFT_MAM"
    starts_as_base: ClassVar[bool] = False
    small: ClassVar[Mapping[str, Any]] = {"num_virtual_tokens": 3, "bottleneck_size": 6, "activation": "gelu"}
    rate_small: ClassVar[float] = 1e-3
    rate_large: ClassVar[float] = 2e-4

    aliases: ClassVar[dict[str, str]] = Method.aliases | {
        "adapter_size": "bottleneck_size",
        "prefix_length": "num_virtual_tokens",
    }

    target_modules: None = Field(default=None, description="Not used: attention and the feed-forward blocks.")

    num_virtual_tokens: int = Field(default=30, ge=1, le=65536)
    """How many keys and values are put before a layer's own."""

    init_std: float = Field(default=0.02, ge=0, le=10)
    """Standard deviation of their starting values."""

    bottleneck_size: int | None = Field(default=None, ge=1, le=65536)
    """Width of the parallel adapter; half the base's width when left out, as in the paper (512 of 1,024)."""

    scale: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """What the parallel adapter adds is multiplied by this."""

    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """The nonlinearity."""

    def default_targets(self, base: Base) -> list[str]:
        """Attention and the feed-forward blocks."""
        check_length(self.num_virtual_tokens, base)
        return ["attention", "mlp"]

    def part(self, site: Site) -> Part:
        """The prefix at attention, the parallel adapter elsewhere."""
        if site.heads:
            return PrefixPart(site, self.num_virtual_tokens, std=self.init_std)
        width = self.bottleneck_size or max(1, site.d_out // 2)
        return BypassPart(site, width, self.activation, parallel=True, scale=self.scale)
