"""A free point of the unified view: points that have no name are methods too."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from graft.methods.base import Bypass, Method
from graft.model import Base
from graft.parts.base import Part
from graft.parts.bypass import BypassPart
from graft.sites import Site


class Unified(Method):
    """A bypass chosen by its coordinates in the unified view: {form: parallel, place: mlp, act: relu, width: 64,
    scale: 4} (He et al. 2022).
    """

    name: ClassVar[str] = "unified"
    source: ClassVar[str] = "He et al. 2022, arXiv 2110.04366, section 3"
    unified: ClassVar[Bypass] = Bypass("act(h Wd) Wu", "form", "place", "h + s·Δh, or (1-λ)h + λs·Δh when gated")
    peft_type: ClassVar[str] = "GRAFT_UNIFIED"
    small: ClassVar[Mapping[str, Any]] = {"width": 6, "place": ["attn", "mlp.up"], "act": "tanh"}
    rate_small: ClassVar[float] = 2e-3
    rate_large: ClassVar[float] = 2e-4

    aliases: ClassVar[dict[str, str]] = Method.aliases | {"place": "target_modules", "activation": "act"}

    form: Literal["parallel", "sequential"] = "parallel"
    """What the bypass sees: the input of the place, or its output."""

    act: Literal["relu", "gelu", "silu", "tanh", "none"] = "relu"
    """The nonlinearity; with none, a parallel bypass at a linear is LoRA with biases."""

    width: int = Field(default=64, ge=1, le=65536)
    """Width of the bypass."""

    scale: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """What the bypass adds is multiplied by this."""

    composition: Literal["add", "gated"] = "add"
    """h + s·Δh, or (1-λ)h + λs·Δh with one trained λ for each place, as prefix tuning composes."""

    def default_targets(self, base: Base) -> list[str]:
        """The feed-forward blocks."""
        return ["mlp"]

    def accepts(self, site: Site) -> bool:
        """Blocks and linears."""
        return site.linear or site.block

    def part(self, site: Site) -> Part:
        """The bypass at one place."""
        parallel, gated = self.form == "parallel", self.composition == "gated"
        return BypassPart(site, self.width, self.act, parallel=parallel, scale=self.scale, gated=gated)
