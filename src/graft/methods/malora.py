"""MALoRA: a routed mixture of LoRA experts that share most of their down-projections."""

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graft.errors import UsageError
from graft.methods.base import Bypass
from graft.methods.mixture import Mixture
from graft.parts.base import Part, at_dtype_of
from graft.parts.experts import ExpertsPart
from graft.sites import Site


class MaloraPart(ExpertsPart):
    """Experts with A_t = P_t S: S [d, d_in] shared by all experts of the site, P [T, r', d] their own.

    S and P start from the largest d singular values of T random matrices A_t [r', d_in] put above each other, each
    drawn as LoRA's: P_t S is then as near to A_t as rank d allows.
    """

    def __init__(self, site: Site, r: int, d: int, experts: int, top: int, scale: float, dropout: float) -> None:
        super().__init__(site.d_in, site.d_out, r, experts, top, scale, dropout)
        stacked = torch.empty(experts * r, site.d_in)
        for expert in stacked.split(r):
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
        u, sizes, vh = torch.linalg.svd(stacked, full_matrices=False)
        roots = sizes[:d].sqrt()
        self.shared_A = nn.Parameter((roots[:, None] * vh[:d]).contiguous())
        self.experts_P = nn.Parameter((u[:, :d] * roots).unflatten(0, (experts, r)).contiguous())

    def down(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., T, r']."""
        p = self.experts_P.flatten(0, 1)
        low = F.linear(at_dtype_of(x, self.shared_A), self.shared_A)
        own: Tensor = F.linear(at_dtype_of(low, p), p)
        split: Tensor = own.unflatten(-1, self.experts_P.shape[:2])
        return split


class Malora(Mixture):
    """LoRA experts that share a down-projection and have a larger rank for it (Wang et al. 2024).

    Choices of Graft's: the shared projection has d = 2r rows and an expert rank r' = 9r/8 rounded up, which is 27 %
    fewer parameters than MoLoRA of rank 8 with eight experts on a matrix 384 wide, 29 % without the routers (the paper
    reports 30 to 48 %); both factors start with the roots of the singular values; there is no loss for balanced use of
    the experts.
    """

    name: ClassVar[str] = "malora"
    source: ClassVar[str] = "Wang et al. 2024, arXiv 2410.22782"
    unified: ClassVar[Bypass] = Bypass("Σ_t G(x)_t x S P_t B_t", "site input (parallel)", "chosen linears", "h + s·Δh")
    peft_type: ClassVar[str] = "GRAFT_MALORA"

    shared_rank: int | None = Field(default=None, ge=1)
    """Rows of the shared down-projection; 2r when left out."""

    expert_rank: int | None = Field(default=None, ge=1, le=65536)
    """Rank of each expert; 9r/8, rounded up, when left out."""

    def low_rank(self, site: Site, r: int, scale: float) -> Part:
        """The experts of one site."""
        rank, d = self.expert_rank or math.ceil(9 * r / 8), self.shared_rank or 2 * r
        if d > min(self.num_experts * rank, site.d_in):
            given = f"shared_rank: {d}" if self.shared_rank is not None else f"r: {r} makes a shared_rank of {d}, which"
            raise UsageError(
                f"{given} is more than {min(self.num_experts * rank, site.d_in)}, the rank of the stacked "
                f"experts at {site.name}"
            )
        return MaloraPart(site, rank, d, self.num_experts, self.top_k, scale, self.lora_dropout)
