"""VeRA: two trained vectors over frozen random matrices that all sites share."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graft.methods.base import Bypass, Method
from graft.methods.folder import (
    adapted_sites,
    base_path,
    check_peft_config,
    copy_tensors,
    peft_targets,
    task_path,
)
from graft.methods.linears import AtLinears
from graft.model import Base
from graft.parts.base import Adapter, Part, at_dtype_of
from graft.sites import Site


class Projections(nn.Module):
    """The shared matrices: A [r, widest input] and B [widest output, r], kaiming-uniform from a key, as in peft."""

    def __init__(self, r: int, d_in: int, d_out: int, key: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(key)
        self.vera_A = nn.Buffer(_kaiming(r, d_in, generator))
        self.vera_B = nn.Buffer(_kaiming(d_out, r, generator))


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


class VeraPart(Part):
    """y + λ_b ∘ (B (λ_d ∘ A drop(x))), with the first columns of A and rows of B that fit the site.

    λ_d [r] starts at `d_initial`, λ_b [d_out] at zero, so the model starts as the base.
    """

    projections: Projections

    def __init__(self, site: Site, projections: Projections, d_initial: float, dropout: float) -> None:
        super().__init__()
        self.vera_lambda_d = nn.Parameter(torch.full((projections.vera_A.shape[0],), d_initial))
        self.vera_lambda_b = nn.Parameter(torch.zeros(site.d_out))
        self.dropout = nn.Dropout(dropout)
        self.__dict__["projections"] = projections  # the adapter's, not this part's own

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, S, d_in], y [B, S, d_out] -> [B, S, d_out]."""
        a, b = self._slices(x.shape[-1])
        low = F.linear(self.dropout(at_dtype_of(x, a)), a) * self.vera_lambda_d
        return y + (F.linear(at_dtype_of(low, b), b) * self.vera_lambda_b).to(y.dtype)

    def merge(self, site: Site) -> dict[str, Tensor]:
        """W + diag(λ_b) B diag(λ_d) A, added in fp32."""
        a, b = (matrix.float() for matrix in self._slices(site.d_in))
        delta = (self.vera_lambda_b.detach().float()[:, None] * b) @ (self.vera_lambda_d.detach().float()[:, None] * a)
        return site.host_update(site.dense_weight().detach().float() + delta)

    def _slices(self, d_in: int) -> tuple[Tensor, Tensor]:
        return self.projections.vera_A[:, :d_in], self.projections.vera_B[: self.vera_lambda_b.shape[0]]


class Vera(AtLinears):
    """Two trained vectors at each site, over frozen random matrices that all sites share (Kopiczko et al. 2023)."""

    name: ClassVar[str] = "vera"
    source: ClassVar[str] = "Kopiczko et al. 2023, arXiv 2310.11454"
    unified: ClassVar[Bypass] = Bypass("λb ∘ (λd ∘ x A) B", "site input (parallel)", "chosen linears", "h + Δh")
    peft_type: ClassVar[str] = "VERA"
    mergeable: ClassVar[bool] = True
    small: ClassVar[Mapping[str, Any]] = {"r": 12}
    rate_small: ClassVar[float] = 1e-1
    rate_large: ClassVar[float] = 4e-3

    aliases: ClassVar[dict[str, str]] = Method.aliases | {"rank": "r", "dropout": "vera_dropout"}

    r: int = Field(default=256, ge=1, le=65536)
    """Rank of the random matrices. They do not train, so it is larger than LoRA's and may exceed a layer's size."""

    d_initial: float = Field(default=0.1, ge=-1000, le=1000)
    """Starting value of λ_d."""

    vera_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input, in training."""

    projection_prng_key: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the random matrices."""

    save_projection: bool = True
    """Store the random matrices with the adapter. Without them they are drawn again from the key, which gives equal
    values only where PyTorch draws as it does now.
    """

    def build(self, base: Base, name: str) -> Adapter:
        """Vectors at each site, and the matrices that they share."""
        sites = self.chosen(base)
        widest_in, widest_out = max(site.d_in for site in sites), max(site.d_out for site in sites)
        shared = Projections(self.r, widest_in, widest_out, self.projection_prng_key)
        placed: list[tuple[Site, Part]] = [
            (site, VeraPart(site, shared, self.d_initial, self.vera_dropout)) for site in sites
        ]
        return Adapter(name, self, placed, shared=shared)

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's layout; parts at a slice of a fused projection in Graft's own."""
        own = {
            name: tensor
            for name, tensor in super().to_folder(adapter, base)[1].items()
            if self.save_projection or not name.startswith("shared.")
        }
        if any(site.columns is not None for site, _ in adapter.placed):
            return {"peft_type": "GRAFT_VERA"}, own
        config = {
            "peft_type": self.peft_type,
            "r": self.r,
            "target_modules": peft_targets(adapter, base),
            "projection_prng_key": self.projection_prng_key,
            "save_projection": self.save_projection,
            "vera_dropout": self.vera_dropout,
            "d_initial": self.d_initial,
            "fan_in_fan_out": any(site.transposed for site, _ in adapter.placed),
            "bias": "none",
            "init_weights": True,
            "layers_to_transform": None,
        }
        paths = {site.name: task_path(adapter, base, site.path) for site, _ in adapter.placed} | {
            "shared": "base_model"
        }
        renamed = {}
        for name, tensor in own.items():
            place, _, last = name.rpartition(".")
            renamed[f"{paths[place]}.{last}"] = tensor
        return config, renamed

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, source: str) -> Method:
        """The method of a folder that peft wrote. Its sites are those of the tensors."""
        defaults = {
            "r": 256, "projection_prng_key": 0, "save_projection": True, "vera_dropout": 0.0, "d_initial": 0.1
        }  # fmt: skip
        harmless = {"target_modules", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "exclude_modules"}
        check_peft_config(
            config,
            {*defaults, *harmless},
            source,
            neutral={"bias": ("none",), "init_weights": (True,)},
        )
        sites = adapted_sites(config, tensors, "vera_lambda_", base, source)
        settings = {key: config.get(key, default) for key, default in defaults.items()}
        return cls.parse(settings | {"target_modules": sorted(site.path for site in sites)}, source)

    def load(self, adapter: Adapter, base: Base, tensors: Mapping[str, Tensor], source: str) -> None:
        """Read peft's names, or Graft's own; matrices that were not stored are those of the key."""
        places = {site.path: site.name for site, _ in adapter.placed if site.columns is None} | {"base_model": "shared"}
        renamed = {}
        for name, tensor in tensors.items():
            path, _, last = base_path(base, name).rpartition(".")
            renamed[f"{places[path]}.{last}" if path in places else name] = tensor
        if not self.save_projection:
            drawn = {key: tensor for key, tensor in adapter.tensors().items() if key.startswith("shared.")}
            renamed = drawn | renamed
        copy_tensors(adapter, renamed, source)
