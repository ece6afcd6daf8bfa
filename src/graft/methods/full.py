"""Full fine-tuning: every tensor of the base trains."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from graft.methods.base import Bypass, Method
from graft.model import Base
from graft.parts.base import Adapter
from graft.parts.own import own_parts


class Full(Method):
    """Every tensor of the base trains (Devlin et al. 2019, arXiv 1810.04805)."""

    name: ClassVar[str] = "full"
    source: ClassVar[str] = "Devlin et al. 2019, arXiv 1810.04805"
    unified: ClassVar[Bypass] = Bypass("(W + ΔW) x", "every input", "every tensor", "replaces h")
    peft_type: ClassVar[str] = "GRAFT_FULL"
    mergeable: ClassVar[bool] = True
    small: ClassVar[Mapping[str, Any]] = {"exclusive": False}
    rate_small: ClassVar[float] = 2e-4
    rate_large: ClassVar[float] = 2e-5

    target_modules: None = Field(default=None, description="Not used: every tensor trains.")
    layers_to_transform: None = Field(default=None, description="Not used: every tensor trains.")

    exclusive: bool = True
    """Train the base in place. When false the adapter holds copies, and other adapters and the plain base can be
    routed beside it, at twice the memory of the weights and twice the work in the forward pass."""

    @property
    def in_place(self) -> bool:
        """As `exclusive` says."""
        return self.exclusive

    def build(self, base: Base, name: str) -> Adapter:
        """Parts at every module that has parameters."""
        return Adapter(name, self, list(own_parts(base, lambda _: True, self.exclusive)), exclusive=self.exclusive)
