"""What routed mixtures of low-rank experts share."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from graft.errors import UsageError
from graft.methods.lowrank import LowRank
from graft.model import Base
from graft.sites import Site


class Mixture(LowRank):
    """Settings of methods with several experts at each site and a router. Abstract.

    There is no loss for balanced use of the experts: that choice is Graft's.
    """

    small: ClassVar[Mapping[str, Any]] = {"r": 2, "num_experts": 3}
    probe_tolerance: ClassVar[float] = 0.5  # rounding can send a token to another expert: 0.14 from bf16 to fp32

    num_experts: int = Field(default=8, ge=2, le=1024)
    """How many experts at each site."""

    top_k: int = Field(default=2, ge=2)
    """How many of them a token goes through; at least two, or their weight is always 1 and the router never trains."""

    def chosen(self, base: Base) -> list[Site]:
        """The sites that the settings name."""
        if self.top_k > self.num_experts:
            raise UsageError(f"top_k: {self.top_k} is more than num_experts, {self.num_experts}", "lower top_k")
        return super().chosen(base)
