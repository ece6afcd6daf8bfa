"""What LoRA and its relatives share: rank, scale and targets, and peft's folder layout."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field
from torch import Tensor

from graft.errors import DamagedError, UsageError, nearest
from graft.methods.base import Method
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
from graft.parts.base import Adapter, Part
from graft.sites import Site, matches


class LowRank(AtLinears):
    """Settings and storage of methods whose parts hold `lora_A` and `lora_B`.

    Abstract: a method defines `low_rank(site, r, scale)` and the class variables.
    """

    small: ClassVar[Mapping[str, Any]] = {"r": 4}
    rate_small: ClassVar[float] = 4e-3
    rate_large: ClassVar[float] = 2e-4
    use_dora: ClassVar[bool] = False

    aliases: ClassVar[dict[str, str]] = Method.aliases | {
        "rank": "r",
        "lora_rank": "r",
        "lora_r": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "lora_target": "target_modules",
        "sites": "target_modules",
        "rslora": "use_rslora",
    }

    r: int = Field(default=8, ge=1)
    """Rank of the added matrix."""

    lora_alpha: float = Field(default=16, gt=0, allow_inf_nan=False)
    """The added matrix is scaled by lora_alpha / r."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the added matrix, in training."""

    use_rslora: bool = False
    """Scale by lora_alpha / √r instead, which keeps large ranks learning (rsLoRA, Kalajdzievski 2023,
    arXiv 2312.03732).
    """

    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Other ranks at some sites, by role, site name or the end of a module path: {mlp.down: 16}."""

    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Other values of lora_alpha, in the same way."""

    def chosen(self, base: Base) -> list[Site]:
        """The sites that the settings name; every key of rank_pattern and alpha_pattern must be one of them."""
        sites = super().chosen(base)
        if base.family.kind == "encoder-decoder" and any(site.role == "embed" for site in sites):
            raise UsageError(f"the encoder and the decoder of {base.name} share their embeddings", "name other sites")
        for key in [*self.rank_pattern, *self.alpha_pattern]:
            if not any(matches(key, site) for site in sites):
                raise UsageError(
                    f"rank_pattern and alpha_pattern: {key!r} is none of the chosen sites",
                    nearest(key, sorted({site.role for site in sites})),
                )
        return sites

    def part(self, site: Site) -> Part:
        """A and B for one site."""
        r = self.rank_pattern.get(_key(self.rank_pattern, site), self.r)
        alpha = self.alpha_pattern.get(_key(self.alpha_pattern, site), self.lora_alpha)
        largest = max(site.d_in, site.d_out)  # more than the smaller size is of no use, but peft's users have it
        if not 1 <= r <= largest:
            given = "rank_pattern" if r != self.r else "r"
            raise UsageError(f"{given}: {r} is not from 1 to {largest}, the size of {site.name}", "choose a lower rank")
        return self.low_rank(site, r, alpha / (math.sqrt(r) if self.use_rslora else r))

    def low_rank(self, site: Site, r: int, scale: float) -> Part:
        """The part for one site, of this rank and scale."""
        raise NotImplementedError

    def saved_as(self, adapter: Adapter) -> Method:
        """With rank_pattern and alpha_pattern by the name of each site."""
        return self.spelled_out(adapter)

    def spelled_out(self, adapter: Adapter) -> Self:
        """Itself with rank_pattern and alpha_pattern by the name of each site: the first key that fits a site counts,
        and JSON files do not keep the order of keys.
        """
        sites = [site for site, _ in adapter.placed]
        return self.model_copy(
            update={
                name: {site.name: pattern[key] for site in sites if (key := _key(pattern, site)) in pattern}
                for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            }
        )

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's layout; methods and parts at a slice of a fused projection that peft does not have in Graft's own."""
        if self.peft_type.startswith("GRAFT_") or any(site.columns is not None for site, _ in adapter.placed):
            _, tensors = super().to_folder(adapter, base)
            return {"peft_type": f"GRAFT_{self.name.upper()}", "r": self.r, "lora_alpha": self.lora_alpha}, tensors
        sites = [site for site, _ in adapter.placed]
        spelled, paths = self.spelled_out(adapter), {site.name: site.path for site in sites}
        config = {
            "peft_type": self.peft_type,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": peft_targets(adapter, base),
            "rank_pattern": {paths[name]: rank for name, rank in spelled.rank_pattern.items()},
            "alpha_pattern": {paths[name]: alpha for name, alpha in spelled.alpha_pattern.items()},
            "bias": "none",
            "fan_in_fan_out": any(site.transposed for site in sites),
            "layers_to_transform": None,
            "init_lora_weights": True,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }
        tensors = {}
        for site, part in adapter.placed:
            path = task_path(adapter, base, site.path)
            for name, tensor in part.named_parameters():
                tensors[f"{path}.{name}{'.weight' if name in ('lora_A', 'lora_B') else ''}"] = tensor.detach()
        return config, tensors

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """peft has one type for LoRA and DoRA."""
        return super().reads(config) and bool(config.get("use_dora")) == cls.use_dora

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, source: str) -> Method:
        """The method of a folder that peft wrote. Its sites and ranks are those of the tensors: target_modules can be
        a regular expression.
        """
        defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}  # peft's own
        harmless = {
            "target_modules", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "exclude_modules",
            "megatron_core", "qalora_group_size", "rank_pattern", "alpha_pattern", "use_dora",
        }  # fmt: skip
        # Other ways to start (pissa, olora, corda, loftq, lora_ga) change the base's weights too.
        starts = (True, "gaussian", "eva", "orthogonal", "mica")
        check_peft_config(
            config, defaults.keys() | harmless, source, neutral={"bias": ("none",), "init_lora_weights": starts}
        )
        sites = adapted_sites(config, tensors, "lora_", base, source)
        settings: dict[str, Any] = {key: config.get(key, default) for key, default in defaults.items()}
        settings["rank_pattern"] = _by_path(config, "rank_pattern", base, sites, source)
        settings["alpha_pattern"] = _by_path(config, "alpha_pattern", base, sites, source)
        return cls.parse(settings | {"target_modules": sorted(site.path for site in sites)}, source)

    def load(self, adapter: Adapter, base: Base, tensors: Mapping[str, Tensor], source: str) -> None:
        """Read peft's names, or Graft's own."""
        sites = {site.path: site.name for site, _ in adapter.placed if site.columns is None}
        renamed = {}
        for name, tensor in tensors.items():
            path, _, last = base_path(base, name).removesuffix(".weight").rpartition(".")
            peft = path in sites and last.startswith("lora_")
            renamed[f"{sites[path]}.{last}" if peft else name] = tensor
        copy_tensors(adapter, renamed, source)


def _key(pattern: Mapping[str, Any], site: Site) -> str:
    """The first key of rank_pattern or alpha_pattern that fits a site; the empty string when there is none."""
    return next((key for key in pattern if matches(key, site)), "")


def _by_path(config: Mapping[str, Any], pattern: str, base: Base, sites: list[Site], source: str) -> dict[str, Any]:
    """rank_pattern or alpha_pattern with the path of each site. A key that is a regular expression, which could run
    without end, is refused.
    """
    found: dict[str, Any] = {}
    given = config.get(pattern) or {}
    if not isinstance(given, dict):
        raise DamagedError(f"{source}: {pattern} is not an object", "adapter_config.json was altered")
    for key, value in given.items():
        plain = key.removeprefix("^")
        if not all(letter.isalnum() or letter in "._-" for letter in plain):
            raise DamagedError(
                f"{source}: {pattern} has the regular expression {key!r}", "spell the paths of the modules there"
            )
        for site in sites:
            if matches(base_path(base, plain), site):
                found.setdefault(site.path, value)
    return found
