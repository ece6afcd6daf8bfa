"""LoRA: a low-rank matrix beside a weight."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graft.errors import DamagedError, UsageError
from graft.methods.base import (
    Bypass,
    Method,
    base_path,
    check_peft_config,
    copy_tensors,
    peft_targets,
    task_path,
)
from graft.model import Base
from graft.parts.base import Adapter, Part, at_dtype_of
from graft.sites import Site


class LoraPart(Part):
    """y + s·B A drop(x): A [r, d_in] starts kaiming-uniform, B [d_out, r] at zero, so the model starts as the base."""

    def __init__(self, site: Site, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, site.d_in))
        self.lora_B = nn.Parameter(torch.zeros(site.d_out, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, S, d_in], y [B, S, d_out] -> [B, S, d_out]."""
        low = F.linear(self.dropout(at_dtype_of(x, self.lora_A)), self.lora_A)
        return y + (F.linear(low, self.lora_B) * self.scale).to(y.dtype)

    def merge(self, site: Site) -> dict[str, Tensor]:
        """W + s·B A, added in fp32."""
        delta = self.scale * (self.lora_B.detach().float() @ self.lora_A.detach().float())
        return site.host_update(site.dense_weight().detach().float() + delta)


class Lora(Method):
    """A trained matrix of rank r beside each chosen weight (Hu et al. 2021)."""

    name: ClassVar[str] = "lora"
    source: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"
    unified: ClassVar[Bypass] = Bypass("x Wd Wu", "site input (parallel)", "chosen linears", "h + s·Δh")
    peft_type: ClassVar[str] = "LORA"
    mergeable: ClassVar[bool] = True
    rate_small: ClassVar[float] = 2e-3
    rate_large: ClassVar[float] = 2e-4

    aliases: ClassVar[dict[str, str]] = Method.aliases | {
        "rank": "r",
        "lora_rank": "r",
        "lora_r": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "lora_target": "target_modules",
        "sites": "target_modules",
    }

    r: int = Field(default=8, ge=1)
    """Rank of the added matrix."""

    lora_alpha: float = Field(default=16, gt=0, allow_inf_nan=False)
    """The added matrix is scaled by lora_alpha / r."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the added matrix, in training."""

    def default_targets(self, base: Base) -> list[str]:
        """Queries and values, or the fused projection where there is one, as in peft."""
        fused = any(site.role == "attn.qkv" for site in base.sites)
        return ["attn.qkv"] if fused else ["attn.q", "attn.v"]

    def accepts(self, site: Site) -> bool:
        """Linear sites."""
        return site.linear

    def part(self, site: Site) -> Part:
        """A and B for one site."""
        if self.r > min(site.d_in, site.d_out):
            raise UsageError(f"r: {self.r} is more than the {min(site.d_in, site.d_out)} of {site.name}")
        return LoraPart(site, self.r, self.lora_alpha / self.r, self.lora_dropout)

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's layout; parts at a slice of a fused projection, which peft does not have, in Graft's own."""
        if any(site.columns is not None for site, _ in adapter.placed):
            _, tensors = super().to_folder(adapter, base)
            return {"peft_type": "GRAFT_LORA", "r": self.r, "lora_alpha": self.lora_alpha}, tensors
        config = {
            "peft_type": self.peft_type,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": peft_targets(adapter, base),
            "bias": "none",
            "fan_in_fan_out": any(not isinstance(site.leave, nn.Linear) for site, _ in adapter.placed),
            "layers_to_transform": None,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
        }
        tensors = {}
        for site, part in adapter.placed:
            path = task_path(adapter, base, site.path)
            tensors[f"{path}.lora_A.weight"] = part.get_parameter("lora_A").detach()
            tensors[f"{path}.lora_B.weight"] = part.get_parameter("lora_B").detach()
        return config, tensors

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, source: str) -> Method:
        """The method of a folder that peft wrote. Its sites are those that the tensors name: target_modules
        can be a regular expression.
        """
        defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}  # peft's own
        harmless = {
            "target_modules",
            "fan_in_fan_out",
            "layers_to_transform",
            "layers_pattern",
            "exclude_modules",
            "megatron_core",
            "qalora_group_size",
        }
        # Other ways to start (pissa, olora, corda, loftq, lora_ga) change the base's weights too.
        starts = (True, "gaussian", "eva", "orthogonal", "mica")
        check_peft_config(
            config, defaults.keys() | harmless, source, neutral={"bias": ("none",), "init_lora_weights": starts}
        )
        paths = {
            base_path(base, name).removesuffix(".weight").removesuffix(".lora_A")
            for name in tensors
            if ".lora_A" in name
        }
        if not paths:
            raise DamagedError(f"{source}: no lora_A among {len(tensors)} tensors", "the file is not a LoRA adapter")
        known = {site.path for site in base.sites if site.linear and site.columns is None}
        unknown = sorted(paths - known)
        if unknown:
            raise DamagedError(
                f"{source}: {len(unknown)} of {len(paths)} adapted modules are not in {base.name} (first {unknown[0]})",
                "the adapter was made for another base",
            )
        absent = _without_tensors(config, base, paths)
        if absent:
            raise DamagedError(
                f"{source}: {len(absent)} modules of target_modules have no tensors (first {absent[0]})",
                "the weights are incomplete: save the adapter again",
            )
        settings = {key: config.get(key, default) for key, default in defaults.items()}
        return cls.parse(settings | {"target_modules": sorted(paths)}, source)

    def load(self, adapter: Adapter, base: Base, tensors: Mapping[str, Tensor], source: str) -> None:
        """Read peft's names, or Graft's own."""
        sites = {site.path: site.name for site, _ in adapter.placed if site.columns is None}
        renamed = {}
        for name, tensor in tensors.items():
            path, _, matrix = base_path(base, name).removesuffix(".weight").rpartition(".")
            renamed[f"{sites[path]}.{matrix}" if path in sites else name] = tensor
        copy_tensors(adapter, renamed, source)


def _without_tensors(config: Mapping[str, Any], base: Base, paths: set[str]) -> list[str]:
    """Modules in the layers that a list of `target_modules` names and that are not among the adapted `paths`.

    A regular expression, which could run without end, and exclusions are not looked into.
    """
    names, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not isinstance(names, list) or config.get("exclude_modules") or config.get("layers_pattern"):
        return []
    layers = [layers] if isinstance(layers, int) else layers or None
    ends = tuple(f".{base_path(base, str(name))}" for name in names)
    return [
        site.path
        for site in base.sites
        if site.linear and site.columns is None and site.layer is not None and site.path not in paths
        if f".{site.path}".endswith(ends) and (layers is None or site.layer in layers)
    ]
