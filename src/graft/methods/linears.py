"""What methods at the weights of the base share: where they sit."""

from graft.errors import UsageError
from graft.methods.base import Method
from graft.model import Base
from graft.sites import Site


class AtLinears(Method):
    """Methods whose parts sit at linear sites. Abstract."""

    def default_targets(self, base: Base) -> list[str]:
        """Queries and values, or the fused projection where there is one, as in peft."""
        fused = any(site.role == "attn.qkv" for site in base.sites)
        return ["attn.qkv"] if fused else ["attn.q", "attn.v"]

    def accepts(self, site: Site) -> bool:
        """Linear sites."""
        return site.linear

    def chosen(self, base: Base) -> list[Site]:
        """The sites that the settings name, not the output layer alone."""
        sites = super().chosen(base)
        if all(site.role == "head" for site in sites):
            raise UsageError(
                "target_modules names only the output layer", "add sites inside the layers, such as attn.q"
            )
        return sites
