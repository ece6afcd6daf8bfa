"""BitFit: biases only."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from graft.errors import NotMergeable
from graft.methods.base import Bypass, Method
from graft.model import Base
from graft.parts.base import Part
from graft.sites import Site


class BiasPart(Part):
    """y + b with b [d_out] from zero: what training the host's own bias does, and a new bias where it has none."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(site.d_out))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y [..., d_out] -> [..., d_out]."""
        return (y + self.bias).to(y.dtype)

    def merge(self, site: Site) -> dict[str, Tensor]:
        """The host's bias plus b."""
        if site.bias is None:
            raise NotMergeable(
                f"{site.name} has no bias in this architecture, so there is no weight to merge into",
                "keep the adapter attached, or train sites with a bias",
            )
        return site.bias_update(site.bias.detach().float() + self.bias.detach().float())


class Bitfit(Method):
    """The biases of linears and normalizations, added where a linear has none (Ben Zaken et al. 2021).

    The biases of keys are left out where positions are not rotary: they add the same to every score of a query, which
    the softmax takes out again, so they have no gradient but rounding. In a fused projection they stay, without effect.
    """

    name: ClassVar[str] = "bitfit"
    source: ClassVar[str] = "Ben Zaken et al. 2021, arXiv 2106.10199"
    unified: ClassVar[Bypass] = Bypass("b", "nothing", "linears and norms", "h + Δh")
    peft_type: ClassVar[str] = "GRAFT_BITFIT"
    mergeable: ClassVar[bool] = True
    rate_small: ClassVar[float] = 7e-3
    rate_large: ClassVar[float] = 1e-3

    def default_targets(self, base: Base) -> list[str]:
        """Every linear of the layers, the norms that have biases, and the pooler."""
        rotary = base.family.positions == "rotary"
        inside = [site for site in base.sites if self.accepts(site) and site.role != "head"]
        return sorted({site.role for site in inside if rotary or not site.role.endswith("attn.k")})

    def accepts(self, site: Site) -> bool:
        """Whole linears, and norms with a bias."""
        return (site.linear and site.columns is None) or ("norm." in site.role and site.bias is not None)

    def part(self, site: Site) -> Part:
        """A bias for one site."""
        return BiasPart(site)
