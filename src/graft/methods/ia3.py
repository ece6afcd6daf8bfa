"""(IA)³: one trained scale for each channel."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft.errors import UsageError, nearest
from graft.methods.base import Bypass, Method
from graft.methods.folder import (
    adapted_sites,
    base_path,
    check_peft_config,
    copy_tensors,
    task_path,
)
from graft.methods.linears import AtLinears
from graft.model import Base
from graft.parts.base import Adapter, Form, Part
from graft.sites import Site, matches


class ScaledOutput(Part):
    """y ∘ l with l [d_out] from one. A vector: as peft's matrix [d_out, 1] it would decay towards zero."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(site.d_out))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """y [B, S, d_out] -> [B, S, d_out]."""
        return (y * self.ia3_l).to(y.dtype)

    def form(self) -> Form | None:
        """l."""
        return Form(factor=self.ia3_l)

    def merge(self, site: Site) -> dict[str, Tensor]:
        """l on the rows of W, and on the bias."""
        scale = self.ia3_l.detach().float()
        merged = site.host_update(site.dense_weight().detach().float() * scale[:, None])
        if site.bias is not None:
            merged |= site.bias_update(site.bias.detach().float() * scale)
        return merged


class ScaledInput(Part):
    """l ∘ x with l [d_in] from one: the inner activations of a feed-forward block."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(site.d_in))

    def before(self, x: Tensor) -> Tensor:
        """x [B, S, d_in] -> [B, S, d_in]."""
        return (x * self.ia3_l).to(x.dtype)

    def form(self) -> Form | None:
        """l."""
        return Form(factor=self.ia3_l)

    def merge(self, site: Site) -> dict[str, Tensor]:
        """l on the columns of W."""
        return site.host_update(site.dense_weight().detach().float() * self.ia3_l.detach().float())


class Ia3(AtLinears):
    """A scale for each channel of keys, values and the inner activations of feed-forward blocks (Liu et al. 2022)."""

    name: ClassVar[str] = "ia3"
    source: ClassVar[str] = "Liu et al. 2022, arXiv 2205.05638"
    unified: ClassVar[Bypass] = Bypass("(l - 1) ∘ h", "site output; FFN input", "keys, values, FFN", "h + Δh")
    peft_type: ClassVar[str] = "IA3"
    mergeable: ClassVar[bool] = True
    rate_small: ClassVar[float] = 3e-2
    rate_large: ClassVar[float] = 3e-3

    feedforward_modules: list[str] | None = None
    """Of the sites, those whose input is scaled rather than their output; mlp.down when left out."""

    def default_targets(self, base: Base) -> list[str]:
        """Keys and values (or the fused projection where there is one, as in peft) and the last feed-forward linear."""
        roles = {site.role for site in base.sites}
        attention = ["attn.qkv"] if "attn.qkv" in roles else ["attn.k", "attn.v"]
        cross = ["cross.attn.k", "cross.attn.v"] if "dec.cross.attn.k" in roles else []
        return [*attention, *cross, "mlp.down"]

    def chosen(self, base: Base) -> list[Site]:
        """The sites; every feed-forward pattern must name one when the settings give them."""
        sites = super().chosen(base)
        for pattern in self.feedforward_modules or []:
            if not any(matches(pattern, site) for site in sites):
                raise UsageError(
                    f"feedforward_modules: {pattern!r} is none of the chosen sites",
                    nearest(pattern, sorted({site.role for site in sites})),
                )
        return sites

    def part(self, site: Site) -> Part:
        """The scale of a site's input or output."""
        inputs = ["mlp.down"] if self.feedforward_modules is None else self.feedforward_modules
        if any(matches(pattern, site) for pattern in inputs):
            if site.columns is not None:
                raise UsageError(f"feedforward_modules: {site.name} shares its input with other sites")
            return ScaledInput(site)
        return ScaledOutput(site)

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's layout: `ia3_l` [d_out, 1] or [1, d_in]; parts at a slice of a fused projection in Graft's own."""
        if any(site.columns is not None for site, _ in adapter.placed):
            return {"peft_type": "GRAFT_IA3"}, super().to_folder(adapter, base)[1]
        paths = {site: task_path(adapter, base, site.path) for site, _ in adapter.placed}
        names = {site: path.removeprefix("base_model.model.") for site, path in paths.items()}
        config = {
            "peft_type": self.peft_type,
            # Whole paths: peft wants the second list to be a part of the first, and compares ends of paths there
            # without their dots.
            "target_modules": sorted(names.values()),
            "feedforward_modules": sorted(
                names[site] for site, part in adapter.placed if isinstance(part, ScaledInput)
            ),
            "exclude_modules": None,
            "fan_in_fan_out": any(site.transposed for site, _ in adapter.placed),
            "init_ia3_weights": True,
        }
        tensors = {}
        for site, part in adapter.placed:
            scale = part.get_parameter("ia3_l").detach()
            shaped = scale[None, :] if isinstance(part, ScaledInput) else scale[:, None]
            tensors[f"{paths[site]}.ia3_l"] = shaped
        return config, tensors

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, source: str) -> Method:
        """The method of a folder that peft wrote; the shape of a scale says which side it is for."""
        harmless = {"target_modules", "feedforward_modules", "exclude_modules", "fan_in_fan_out", "init_ia3_weights"}
        check_peft_config(config, harmless, source)
        sites = adapted_sites(config, tensors, "ia3_l", base, source)
        shapes = {
            base_path(base, name).removesuffix(".ia3_l"): tuple(tensor.shape)
            for name, tensor in tensors.items()
            if name.endswith(".ia3_l")
        }
        inputs = [site.path for site in sites if shapes.get(site.path) == (1, site.d_in) != (site.d_out, 1)]
        return cls.parse(
            {"target_modules": sorted(site.path for site in sites), "feedforward_modules": sorted(inputs)}, source
        )

    def load(self, adapter: Adapter, base: Base, tensors: Mapping[str, Tensor], source: str) -> None:
        """Read peft's names and shapes, or Graft's own."""
        sites = {site.path: (site, part) for site, part in adapter.placed if site.columns is None}
        renamed = {}
        for name, tensor in tensors.items():
            path = base_path(base, name).removesuffix(".ia3_l")
            if path not in sites:
                renamed[name] = tensor
                continue
            site, part = sites[path]
            expected = (1, site.d_in) if isinstance(part, ScaledInput) else (site.d_out, 1)
            renamed[f"{site.name}.ia3_l"] = tensor.reshape(-1) if tuple(tensor.shape) == expected else tensor
        copy_tensors(adapter, renamed, source)
