"""MoLoRA: a routed mixture of LoRA experts."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.methods.base import Bypass
from graft.methods.mixture import Mixture
from graft.parts.base import Part, at_dtype_of
from graft.parts.experts import ExpertsPart
from graft.sites import Site


class MoloraPart(ExpertsPart):
    """Experts with matrices A [T, r, d_in] of their own, each started as LoRA's."""

    def __init__(self, site: Site, r: int, experts: int, top: int, scale: float, dropout: float) -> None:
        super().__init__(site.d_in, site.d_out, r, experts, top, scale, dropout)
        self.experts_A = nn.Parameter(torch.empty(experts, r, site.d_in))
        for expert in self.experts_A:
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))

    def down(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., T, r]."""
        a = self.experts_A.flatten(0, 1)
        low: Tensor = F.linear(at_dtype_of(x, a), a)
        split: Tensor = low.unflatten(-1, self.experts_A.shape[:2])
        return split


class Molora(Mixture):
    """Several LoRA experts at each site, and a router that picks some for each token (Zadouri et al. 2023), without a
    loss for balanced use of the experts: that choice is Graft's.
    """

    name: ClassVar[str] = "molora"
    source: ClassVar[str] = "Zadouri et al. 2023, arXiv 2309.05444"
    unified: ClassVar[Bypass] = Bypass("Σ_t G(x)_t x A_t B_t", "site input (parallel)", "chosen linears", "h + s·Δh")
    peft_type: ClassVar[str] = "GRAFT_MOLORA"

    def low_rank(self, site: Site, r: int, scale: float) -> Part:
        """The experts of one site."""
        return MoloraPart(site, r, self.num_experts, self.top_k, scale, self.lora_dropout)
