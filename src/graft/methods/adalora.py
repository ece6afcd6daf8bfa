"""AdaLoRA: low-rank matrices whose ranks are spent where they matter."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from graft.errors import DamagedError, UsageError
from graft.methods.base import Bypass, Method, Progress
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
from graft.parts.base import Adapter, Form, Part, at_dtype_of
from graft.sites import Site


class AdaloraPart(Part):
    """y + s·B (A ∘ E) drop(x): A [r, d_in] and B [d_out, r] start normal, E [r, 1] at zero, so the model starts as the
    base. A row of A, its value in E and a column of B are a triplet; pruned, its value is zero.
    """

    def __init__(self, site: Site, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(r, site.d_in) * 0.02)
        self.lora_E = nn.Parameter(torch.zeros(r, 1))
        self.lora_B = nn.Parameter(torch.randn(site.d_out, r) * 0.02)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, S, d_in], y [B, S, d_out] -> [B, S, d_out]."""
        low = F.linear(self.dropout(at_dtype_of(x, self.lora_A)), self.lora_A * self.lora_E)
        return y + (F.linear(low, self.lora_B) * self.scale).to(y.dtype)

    def form(self) -> Form | None:
        """A ∘ E, and s·B."""
        return Form(down=self.lora_A * self.lora_E, up=self.lora_B * self.scale)

    def merge(self, site: Site) -> dict[str, Tensor]:
        """W + s·B (A ∘ E), added in fp32."""
        a = self.lora_A.detach().float() * self.lora_E.detach().float()
        delta = self.scale * (self.lora_B.detach().float() @ a)
        return site.host_update(site.dense_weight().detach().float() + delta)


class Memory(nn.Module):
    """What is remembered from step to step: buffers, so that checkpoints have it.

    `sensitivity` and `uncertainty` hold two moving averages for every value of every part, one part after the other;
    `kept` [sites, r] says which triplets the final budget kept, all of them before it is final.
    """

    sensitivity: Tensor
    uncertainty: Tensor
    kept: Tensor

    def __init__(self, sites: int, r: int, values: int) -> None:
        super().__init__()
        self.register_buffer("sensitivity", torch.zeros(values))
        self.register_buffer("uncertainty", torch.zeros(values))
        self.register_buffer("kept", torch.ones(sites, r, dtype=torch.bool))

    def reset(self) -> None:
        """Forget everything."""
        self.sensitivity.zero_()
        self.uncertainty.zero_()
        self.kept.fill_(True)

    @torch.no_grad()
    def update(self, parts: list[AdaloraPart], beta1: float, beta2: float) -> None:
        """Take in |p·g| of this step, whose gradients are there. One temporary as large as the parts."""
        parameters = [parameter for part in parts for parameter in part.parameters()]
        now = torch.empty_like(self.sensitivity)
        for slot, parameter in zip(now.split([p.numel() for p in parameters]), parameters, strict=True):
            if parameter.grad is None:
                slot.zero_()
            else:
                torch.mul(parameter.flatten(), parameter.grad.flatten(), out=slot)
        self.sensitivity.mul_(beta1).add_(now.abs_(), alpha=1 - beta1)
        self.uncertainty.mul_(beta2).add_(now.sub_(self.sensitivity).abs_(), alpha=1 - beta2)

    @torch.no_grad()
    def best(self, parts: list[AdaloraPart], budget: int) -> Tensor:
        """Which triplets [sites, r] are the `budget` most important ones of all sites together.

        Where the importance of several is the same, as of a gradient too small for fp32, peft prunes all of them and
        ends below its budget; here the first ones stay.
        """
        order = self._importance(parts).flatten().argsort(descending=True, stable=True)
        mask = torch.zeros_like(self.kept)
        mask.view(-1)[order[:budget]] = True
        return mask

    def _importance(self, parts: list[AdaloraPart]) -> Tensor:
        """[sites, r]: of E's value, plus the means over A's row and B's column."""
        found, start = [], 0
        for part in parts:
            score = {}
            for name, parameter in part.named_parameters():
                span = slice(start, start + parameter.numel())
                score[name] = (self.sensitivity[span] * self.uncertainty[span]).view(parameter.shape)
                start = span.stop
            found.append(score["lora_E"][:, 0] + (score["lora_A"].mean(dim=1) + score["lora_B"].mean(dim=0)))
        return torch.stack(found)


class Schedule(NamedTuple):
    """The steps, counted from 1, in which the budget shrinks: after `first`, every `every` steps, final at `last`."""

    first: int
    last: int
    every: int


class Adalora(AtLinears):
    """Low-rank matrices that start at rank init_r; in training the least important ranks of all sites together are
    pruned until target_r are left at each site on average (Zhang et al. 2023).
    """

    name: ClassVar[str] = "adalora"
    source: ClassVar[str] = "Zhang et al. 2023, arXiv 2303.10512"
    unified: ClassVar[Bypass] = Bypass("x Wd E Wu", "site input (parallel)", "chosen linears", "h + s·Δh")
    peft_type: ClassVar[str] = "ADALORA"
    mergeable: ClassVar[bool] = True
    small: ClassVar[Mapping[str, Any]] = {"init_r": 6, "target_r": 3}
    rate_small: ClassVar[float] = 2e-2
    rate_large: ClassVar[float] = 2e-4

    # `r` and `rank` are left out: they could mean either rank.
    aliases: ClassVar[dict[str, str]] = Method.aliases | {
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "lora_target": "target_modules",
        "sites": "target_modules",
        "t_init": "tinit",
        "t_final": "tfinal",
        "delta_t": "deltaT",
    }

    init_r: int = Field(default=12, ge=1)
    """Rank of every added matrix at the start."""

    target_r: int = Field(default=8, ge=1)
    """Rank at the end, on average over the sites."""

    lora_alpha: float = Field(default=24, gt=0, allow_inf_nan=False)
    """The added matrix is scaled by lora_alpha / init_r, before and after pruning; the default scale is LoRA's."""

    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the added matrix, in training."""

    orth_reg_weight: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    """Weight of the penalty that keeps the rows of A, and the columns of B, orthonormal."""

    beta1: float = Field(default=0.85, gt=0, lt=1)
    """Decay of the moving average of a value's importance |p·g|."""

    beta2: float = Field(default=0.85, gt=0, lt=1)
    """Decay of the moving average of that importance's uncertainty."""

    tinit: int | None = Field(default=None, ge=0)
    """Steps before the first pruning; a tenth of the run when left out."""

    tfinal: int | None = Field(default=None, ge=0)
    """Steps at the end with the final ranks; three tenths of the run when left out."""

    deltaT: int | None = Field(default=None, ge=1)  # noqa: N815, peft's name
    """Prune every so many steps; a hundredth of the run when left out."""

    @model_validator(mode="after")
    def _ranks_shrink(self) -> "Adalora":
        if self.target_r > self.init_r:
            raise ValueError(f"target_r: {self.target_r} is above init_r, {self.init_r}")
        return self

    def build(self, base: Base, name: str) -> Adapter:
        """Parts that share one memory."""
        adapter = super().build(base, name)
        values = sum(parameter.numel() for parameter in adapter.parts.parameters())
        adapter.shared = Memory(len(adapter.parts), self.init_r, values)
        return adapter

    def part(self, site: Site) -> Part:
        """A, E and B for one site."""
        limit = min(site.d_in, site.d_out)
        if self.init_r > limit:
            raise UsageError(f"init_r: {self.init_r} is not from 1 to {limit}, the size of {site.name}")
        return AdaloraPart(site, self.init_r, self.lora_alpha / (self.init_r + 1e-5), self.lora_dropout)

    def schedule(self, total: int) -> Schedule:
        """When a run of `total` steps prunes. Raises `UsageError` when tinit and tfinal leave no step for it.

        Left out, tinit is at least 2, as far as the run has the steps: E of a site that is pruned wholly is zero as at
        the start, which after step 2 would look as if it never moved.
        """
        tinit, tfinal = self.tinit, self.tfinal
        if tfinal is None:
            tfinal = max(0, min(int(0.3 * total), total - 1 - (tinit or 0)))
        if tinit is None:
            tinit = max(0, min(max(2, int(0.1 * total)), total - 1 - tfinal))
        if tinit + tfinal >= total:
            raise UsageError(
                f"tinit and tfinal: {tinit} + {tfinal} leave none of {total} steps to prune in",
                "give smaller ones, or leave them out",
            )
        return Schedule(tinit, total - tfinal, self.deltaT or max(1, total // 100))

    def budget(self, step: int, total: int, sites: int) -> int:
        """Triplets that a pruning at this step leaves: a cubic from init_r to target_r per site."""
        schedule = self.schedule(total)
        left = 1 - (step - schedule.first) / (schedule.last - schedule.first)
        return int((self.init_r - self.target_r) * sites * left**3 + self.target_r * sites)

    def before_step(self, adapter: Adapter, progress: Progress) -> None:
        """Refuse a schedule that does not fit the run, and start without memories."""
        self.schedule(progress.total)
        if progress.step == 1:
            _memory(adapter).reset()

    def penalty(self, adapter: Adapter) -> Tensor | None:
        """orth_reg_weight · mean of ‖P Pᵀ - I‖ (Frobenius) over every A and every Bᵀ, those of pruned triplets too."""
        if not self.orth_reg_weight:
            return None
        rows = [rows for part in _parts(adapter) for rows in (part.lora_A, part.lora_B.T)]
        grams = torch.stack([row @ row.T for row in rows])
        away = grams - torch.eye(self.init_r, dtype=grams.dtype, device=grams.device)
        norms: Tensor = torch.linalg.matrix_norm(away)
        return self.orth_reg_weight * norms.mean()

    def after_optimizer(self, adapter: Adapter, progress: Progress) -> None:
        """Update the importance and prune. Before the budget is final a pruned triplet goes on training and may come
        back; from then on the same ones are set to zero after every step.
        """
        step, schedule = progress.step, self.schedule(progress.total)
        memory, parts = _memory(adapter), _parts(adapter)
        if step < schedule.last:
            memory.update(parts, self.beta1, self.beta2)
        elif step == schedule.last:
            memory.kept.copy_(memory.best(parts, self.target_r * len(parts)))
        if step >= schedule.last:
            _prune(parts, memory.kept)
        elif step > schedule.first and step % schedule.every == 0:
            _prune(parts, memory.best(parts, self.budget(step, progress.total, len(parts))))

    def settled(self, progress: Progress) -> bool:
        """Once the budget is final."""
        return progress.step >= self.schedule(progress.total).last

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's layout, without the pruned triplets; parts at a slice of a fused projection, which peft does not
        have, by Graft's own names.
        """
        sliced = any(site.columns is not None for site, _ in adapter.placed)
        kept = _memory(adapter).kept
        tensors = {}
        for (site, _), part, keep in zip(adapter.placed, _parts(adapter), kept, strict=True):
            path = site.name if sliced else task_path(adapter, base, site.path)
            tensors[f"{path}.lora_A"] = part.lora_A.detach()[keep]
            tensors[f"{path}.lora_E"] = part.lora_E.detach()[keep]
            tensors[f"{path}.lora_B"] = part.lora_B.detach()[:, keep]
        config: dict[str, Any] = {"init_r": self.init_r, "target_r": self.target_r, "lora_alpha": self.lora_alpha}
        if sliced:
            return {"peft_type": f"GRAFT_{self.name.upper()}"} | config, tensors
        paths = [task_path(adapter, base, site.path).removeprefix("base_model.model.") for site, _ in adapter.placed]
        pattern = {f"{path}.lora_E": keep for path, keep in zip(paths, kept.tolist(), strict=True)}
        sites = [site for site, _ in adapter.placed]
        tinit, tfinal = self.tinit or 0, self.tfinal or 0
        config |= {
            "peft_type": self.peft_type,
            "lora_dropout": self.lora_dropout,
            "orth_reg_weight": self.orth_reg_weight,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "tinit": tinit,
            "tfinal": tfinal,
            "deltaT": self.deltaT or 1,
            "total_step": tinit + tfinal + 1,  # peft reads no folder without one: the smallest that it takes
            "rank_pattern": pattern if not bool(kept.all()) else None,
            "target_modules": peft_targets(adapter, base),
            "bias": "none",
            "fan_in_fan_out": any(site.transposed for site in sites),
            "layers_to_transform": None,
            "init_lora_weights": True,
        }
        return config, tensors

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, source: str) -> Method:
        """The method of a folder that peft wrote. The steps of its schedule, which are those of a run of another
        length, are left out, and so is what peft's AdaLoRA ignores of LoRA's settings: r, alpha_pattern, use_rslora.
        """
        defaults = {
            "init_r": 12, "target_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "orth_reg_weight": 0.5, "beta1": 0.85,
            "beta2": 0.85,
        }  # fmt: skip
        harmless = {
            "target_modules", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "exclude_modules",
            "megatron_core", "qalora_group_size", "rank_pattern", "r", "alpha_pattern", "use_rslora",
            "init_lora_weights", "tinit", "tfinal", "deltaT", "total_step",
        }  # fmt: skip
        check_peft_config(config, defaults.keys() | harmless, source, neutral={"bias": ("none",)})
        sites = adapted_sites(config, tensors, "lora_", base, source)
        settings: dict[str, Any] = {key: config.get(key, default) for key, default in defaults.items()}
        init_r, target_r = settings["init_r"], settings["target_r"]
        if isinstance(init_r, int) and isinstance(target_r, int):
            settings["target_r"] = min(init_r, target_r)  # peft takes a larger one as long as nothing is pruned
        method = cls.parse(settings | {"target_modules": sorted(site.path for site in sites)}, source)
        _check_ranks(config.get("rank_pattern"), method.init_r, [site.path for site in sites], tensors, base, source)
        return method

    def load(self, adapter: Adapter, base: Base, tensors: Mapping[str, Tensor], source: str) -> None:
        """Read peft's names, or Graft's own.

        The scale is that of init_r, so pruned triplets, which are not stored, are filled up with zeros, behind those
        that are: their order changes nothing.
        """
        names = {site.path: site.name for site, _ in adapter.placed if site.columns is None}
        filled = {}
        for name, tensor in tensors.items():
            path, _, last = base_path(base, name).rpartition(".")
            filled[f"{names[path]}.{last}" if path in names else name] = tensor
        kept = _memory(adapter).kept
        for (site, _), keep in zip(adapter.placed, kept, strict=True):
            stored = {last: filled.get(f"{site.name}.{last}") for last in ("lora_A", "lora_E", "lora_B")}
            values = stored["lora_E"]
            rank = min(len(values), self.init_r) if values is not None and values.dim() == 2 else self.init_r
            keep[rank:] = False
            for last, part in stored.items():
                if part is not None and part.dim() == 2:
                    behind = (0,) if last == "lora_B" else (0, 0, 0)
                    filled[f"{site.name}.{last}"] = F.pad(part, (*behind, self.init_r - rank))
        copy_tensors(adapter, filled, source, prefixes=[f"{site.name}." for site, _ in adapter.placed])


def _parts(adapter: Adapter) -> list[AdaloraPart]:
    return [part for part in adapter.parts if isinstance(part, AdaloraPart)]


def _memory(adapter: Adapter) -> Memory:
    assert isinstance(adapter.shared, Memory)
    return adapter.shared


@torch.no_grad()
def _prune(parts: list[AdaloraPart], keep: Tensor) -> None:
    """Set E of every triplet that `keep` [sites, r] leaves out to zero."""
    for part, row in zip(parts, keep, strict=True):
        part.lora_E.masked_fill_(~row.unsqueeze(1), 0.0)


def _check_ranks(
    pattern: Any, init_r: int, paths: list[str], tensors: Mapping[str, Tensor], base: Base, source: str
) -> None:
    """Refuse a rank_pattern that is not one of init_r truth values for each of some adapted modules, as many true ones
    as there are stored triplets.
    """
    ranks = dict.fromkeys(paths, init_r)
    if not isinstance(pattern, dict | None):
        raise DamagedError(f"{source}: rank_pattern is not an object", "save the adapter again")
    for key, row in (pattern or {}).items():
        path = base_path(base, key).partition(".lora_E")[0]
        if path not in ranks:
            raise DamagedError(f"{source}: rank_pattern names {key!r}, which has no tensors", "save the adapter again")
        if not isinstance(row, list) or len(row) != init_r or not all(isinstance(kept, bool) for kept in row):
            raise DamagedError(
                f"{source}: rank_pattern of {key} is not a list of {init_r} truth values", "save the adapter again"
            )
        ranks[path] = sum(row)
    for name, tensor in tensors.items():
        path, _, last = base_path(base, name).rpartition(".")
        if path in ranks and last == "lora_E" and tensor.shape[:1] != (ranks[path],):
            raise DamagedError(
                f"{source}: {name} is of shape {list(tensor.shape)}, rank_pattern and init_r leave {ranks[path]} rows",
                "save the adapter again",
            )
