"""LongLoRA: LoRA for longer rows, trained with attention in shifted groups."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from graft.errors import RouteError
from graft.methods.base import Bypass
from graft.methods.lowrank import LowRank
from graft.model import Base
from graft.parts.base import Adapter, Core, Part
from graft.parts.lowrank import LoraPart
from graft.parts.own import own_parts
from graft.sites import Site


class ShiftedGroups(Part):
    """Shifted sparse attention in training, full attention otherwise and where `cuts_rows` is switched off.

    A row of S tokens is cut into groups of G that attend within themselves; for the second half of the heads the
    boundaries are G/2, 3G/2, …, with short groups at both ends. (Rolling the row by G/2, as the paper's code does,
    puts its first and last tokens into one group: a leak of the future.)
    """

    def __init__(self, site: Site, group_size: int | None, ratio: float, first: bool) -> None:
        super().__init__()
        self.cuts_rows = True
        self.kv_heads = site.kv_heads
        self.group_size = group_size
        self.ratio = ratio
        self.first = first

    def attend(self, core: Core, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [B, heads, S, d], k and v [B, kv_heads, S, d] -> [B, S, heads, d]."""
        length = q.shape[2]
        if not self.training or not self.cuts_rows:
            return core(q, k, v, mask)
        if k.shape[2] != length:
            raise RouteError(
                f"longlora groups the {length} tokens of a row and got {k.shape[2]} keys",
                "it cannot be trained on the same rows as a prefix, or with a cache",
            )
        if self.first and mask is not None and not bool(_seen(mask)[..., 0, 0].all()):
            raise RouteError(
                "longlora groups rows from their first token on",
                "pad on the right, and train rows with virtual tokens in batches of their own",
            )
        size = self.group_size or max(2, int(length * self.ratio) // 2 * 2)
        if size // 2 >= length:
            return core(q, k, v, mask)
        half_kv, half = self.kv_heads // 2, q.shape[1] // 2
        if self.kv_heads % 2:  # one key head cannot be split: all heads in both ways, and half of each
            ways = [_grouped(core, q, k, v, mask, size, shift) for shift in (0, size // 2)]
            return torch.cat([ways[0][:, :, :half], ways[1][:, :, half:]], dim=2)
        halves = []
        for shift, heads, kv in (
            (0, slice(half), slice(half_kv)),
            (size // 2, slice(half, None), slice(half_kv, None)),
        ):
            own = mask if mask is None or mask.shape[1] == 1 else mask[:, heads]
            halves.append(_grouped(core, q[:, heads], k[:, kv], v[:, kv], own, size, shift))
        return torch.cat(halves, dim=2)

    def merge(self, site: Site) -> dict[str, Tensor]:
        """Nothing: attention is full outside of training."""
        return {}


def _seen(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _grouped(core: Core, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, size: int, shift: int) -> Tensor:
    """Attention within groups of `size`, the first one shorter by `shift`: [B, S, heads, d]."""
    batch, length = q.shape[0], q.shape[2]
    count = -(-(shift + length) // size)
    after = count * size - shift - length

    def cut(tensor: Tensor) -> Tensor:
        """[B, H, S, d] -> [B · groups, H, size, d]."""
        groups: Tensor = F.pad(tensor, (0, 0, shift, after)).unflatten(2, (count, size))
        return groups.transpose(1, 2).flatten(0, 1)

    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=q.device)
    closed: Any = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    wide = F.pad(mask, (shift, after, shift, after), value=closed)
    blocks = wide.unflatten(3, (count, size)).unflatten(2, (count, size)).diagonal(dim1=2, dim2=4)
    blocks = blocks.permute(0, 4, 1, 2, 3).expand(batch, *(-1,) * 4).flatten(0, 1)
    # A padding token whose group holds nothing but padding sees itself: a softmax over nothing is not a number.
    blind = ~_seen(blocks).any(dim=-1, keepdim=True) & torch.eye(size, dtype=torch.bool, device=q.device)
    blocks = blocks | blind if mask.dtype == torch.bool else blocks.masked_fill(blind, 0.0)
    out = core(cut(q), cut(k), cut(v), blocks)
    whole: Tensor = out.unflatten(0, (batch, count)).flatten(1, 2)
    return whole[:, shift : shift + length]


class Longlora(LowRank):
    """LoRA at all attention weights, trained embeddings and norms, and attention in shifted groups while training,
    which makes long rows affordable; inference uses full attention (Chen et al. 2023).
    """

    name: ClassVar[str] = "longlora"
    source: ClassVar[str] = "Chen et al. 2023, arXiv 2309.12307"
    unified: ClassVar[Bypass] = Bypass(
        "x Wd Wu; (W + ΔW) x", "site input (parallel)", "attention linears; embeddings and norms", "h + s·Δh"
    )
    peft_type: ClassVar[str] = "GRAFT_LONGLORA"
    mergeable: ClassVar[bool] = True
    rate_small: ClassVar[float] = 2e-3
    small: ClassVar[Mapping[str, Any]] = {"r": 4}

    group_size_ratio: float = Field(default=0.25, gt=0, le=1)
    """Size of a group as a share of the batch's rows."""

    group_size: int | None = Field(default=None, ge=2, multiple_of=2)
    """Size of a group in tokens, in place of the share."""

    embed_and_norms: bool = True
    """Train the embeddings and the norms too; the paper finds LoRA alone not enough for long rows."""

    def default_targets(self, base: Base) -> list[str]:
        """All weights of self-attention."""
        fused = any(site.role == "attn.qkv" for site in base.sites)
        return ["attn.qkv", "attn.o"] if fused else ["attn.q", "attn.k", "attn.v", "attn.o"]

    def build(self, base: Base, name: str) -> Adapter:
        """LoRA, groups at each self-attention, and the base's embeddings and norms."""
        linears = self.chosen(base)
        cores = [site for site in base.select("attention") if site.heads]
        placed: list[tuple[Site, Part]] = [(site, self.part(site)) for site in linears]
        placed += [
            (site, ShiftedGroups(site, self.group_size, self.group_size_ratio, first=site is cores[0]))
            for site in cores
        ]
        if self.embed_and_norms:
            paths = {site.path for site in base.sites if site.role == "embed" or "norm." in site.role}
            placed += own_parts(base, lambda tensor: tensor.rpartition(".")[0] in paths, exclusive=False)
        return Adapter(name, self, placed)

    def low_rank(self, site: Site, r: int, scale: float) -> Part:
        """A and B for one site."""
        return LoraPart(site, r, scale, self.lora_dropout)
