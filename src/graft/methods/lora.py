"""LoRA: a low-rank matrix beside a weight."""

from typing import ClassVar

from graft.methods.base import Bypass
from graft.methods.lowrank import LowRank
from graft.parts.base import Part
from graft.parts.lowrank import LoraEmbeddingPart, LoraPart
from graft.sites import Site


class Lora(LowRank):
    """A trained matrix of rank r beside each chosen weight (Hu et al. 2021)."""

    name: ClassVar[str] = "lora"
    source: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"
    unified: ClassVar[Bypass] = Bypass("x Wd Wu", "site input (parallel)", "chosen linears", "h + s·Δh")
    peft_type: ClassVar[str] = "LORA"
    mergeable: ClassVar[bool] = True
    in_vllm: ClassVar[bool] = True

    def accepts(self, site: Site) -> bool:
        """Linear sites, and the embedding table."""
        return site.linear or site.role == "embed"

    def low_rank(self, site: Site, r: int, scale: float) -> Part:
        """A and B for one site."""
        if site.role == "embed":
            return LoraEmbeddingPart(site, r, scale)
        return LoraPart(site, r, scale, self.lora_dropout)
