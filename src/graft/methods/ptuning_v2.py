"""P-tuning v2: deep prompts without reparameterization, at any depth."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from graft.errors import UsageError
from graft.methods.attended import Attended
from graft.model import Base
from graft.sites import Site


class PtuningV2(Attended):
    """Trained keys and values before those of every layer or of the last ones, never through a network (Liu et al.
    2021).

    The paper finds that short prompts do for classification, that depth counts, and deep layers more than shallow ones.
    """

    name: ClassVar[str] = "ptuning_v2"
    source: ClassVar[str] = "Liu et al. 2021, arXiv 2110.07602"

    last_layers: int | None = Field(default=None, ge=1)
    """Only the last so many layers; all when left out."""

    def chosen(self, base: Base) -> list[Site]:
        """The attentions of the chosen layers."""
        sites = super().chosen(base)
        if self.last_layers is None:
            return sites
        if self.layers_to_transform is not None:
            raise UsageError(f"last_layers: {self.last_layers} beside layers_to_transform: give one of them")
        # The stacks of an encoder-decoder may differ in depth.
        counts = {site.role: site.layer + 1 for site in base.sites if site.heads and site.layer is not None}
        least = min(counts[site.role] for site in sites)
        if self.last_layers > least:
            raise UsageError(f"last_layers: {self.last_layers}, and {base.name} has {least} layers")
        last = [site for site in sites if site.layer is not None and site.layer >= counts[site.role] - self.last_layers]
        if not last:
            raise UsageError(f"target_modules names nothing in the last_layers, {self.last_layers}", "give one of them")
        return last

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """peft's prefixes are read as `prefix`."""
        return False
