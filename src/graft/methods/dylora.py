"""DyLoRA: one LoRA that is good at every rank."""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from graft.errors import UsageError
from graft.methods.base import Bypass, Method, Progress, method_of, read_method
from graft.methods.lowrank import LowRank
from graft.model import Base
from graft.parts.base import Adapter, Part, at_dtype_of
from graft.parts.lowrank import LoraPart
from graft.sites import Site


class RankOfStep(nn.Module):
    """The rank that all parts of an adapter use: drawn at each step in training, chosen in evaluation."""

    def __init__(self, r: int) -> None:
        super().__init__()
        self.drawn = r
        self.chosen: int | None = None
        self.r = r

    def now(self, training: bool) -> int:
        """The rank to use."""
        return self.drawn if training else self.chosen or self.r


class DyloraPart(LoraPart):
    """LoRA with the first b rows of A and columns of B, scaled as LoRA of rank b is."""

    rank: RankOfStep  # the adapter's, set when it is built

    def __init__(self, site: Site, r: int, scale: float, dropout: float, power: float, only_last: bool) -> None:
        super().__init__(site, r, scale, dropout)
        self.power = power
        self.graphs = r
        self.only_last = only_last

    def cut(self, b: int) -> tuple[Tensor, Tensor, float]:
        """A [b, d_in], B [d_out, b] and the scale at rank b."""
        r = self.lora_A.shape[0]
        b = min(b, r)
        return self.lora_A[:b], self.lora_B[:, :b], self.scale * (r / b) ** self.power

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, S, d_in], y [B, S, d_out] -> [B, S, d_out]."""
        down, up, scale = self.cut(self.rank.now(self.training))
        if self.only_last and self.training:
            down = torch.cat([down[:-1].detach(), down[-1:]])
            up = torch.cat([up[:, :-1].detach(), up[:, -1:]], dim=1)
        low = F.linear(self.dropout(at_dtype_of(x, down)), down)
        return y + (F.linear(low, up) * scale).to(y.dtype)

    def merge(self, site: Site) -> dict[str, Tensor]:
        """W + s·B A at the chosen rank, added in fp32."""
        down, up, scale = self.cut(self.rank.now(training=False))
        delta = scale * (up.detach().float() @ down.detach().float())
        return site.host_update(site.dense_weight().detach().float() + delta)


class Dylora(LowRank):
    """One LoRA for every rank up to r: each step trains at a rank drawn at random (Valipour et al. 2022).

    Used at rank b, it is the LoRA of the first b rows of A and columns of B, scaled by lora_alpha / b.
    """

    name: ClassVar[str] = "dylora"
    source: ClassVar[str] = "Valipour et al. 2022, arXiv 2210.07558"
    unified: ClassVar[Bypass] = Bypass("x Wd[:b] Wu[:b]", "site input (parallel)", "chosen linears", "h + s·Δh")
    peft_type: ClassVar[str] = "GRAFT_DYLORA"
    mergeable: ClassVar[bool] = True

    frozen: bool = False
    """Only the last row and column of the drawn rank get a gradient; the optimizer's momentum and weight decay still
    move those before it. A little worse in the paper.
    """

    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Smaller largest ranks at some sites; a rank above a site's own uses all of it."""

    @property
    def steps_to_move(self) -> int:
        """With `frozen` a row of A has a gradient from the second time on that its rank is drawn: after r + 1 steps
        that has happened to one.
        """
        return self.r + 1 if self.frozen else super().steps_to_move

    def build(self, base: Base, name: str) -> Adapter:
        """Parts that share one rank."""
        adapter = super().build(base, name)
        rank = adapter.shared = RankOfStep(self.r)
        for part in adapter.parts:
            part.__dict__["rank"] = rank  # past nn.Module, which would make it the part's own module
        return adapter

    def low_rank(self, site: Site, r: int, scale: float) -> Part:
        """A and B for one site."""
        if r > self.r:
            raise UsageError(f"rank_pattern: {r} is above r, {self.r}: no step would draw the ranks between them")
        return DyloraPart(site, r, scale, self.lora_dropout, 0.5 if self.use_rslora else 1.0, self.frozen)

    def before_step(self, adapter: Adapter, progress: Progress) -> None:
        """Draw the rank of this step, from 1 to r, each with the same chance: from the run's seed and the step alone,
        so that all processes draw the same.
        """
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**32 + progress.step)
        _rank(adapter).drawn = int(torch.randint(1, self.r + 1, (), generator=generator))

    def ranks(self) -> range:
        """1 to r."""
        return range(1, self.r + 1)

    def use_rank(self, adapter: Adapter, rank: int) -> None:
        """Evaluate, merge and save at this rank; saved, it is a plain LoRA folder."""
        super().use_rank(adapter, rank)
        _rank(adapter).chosen = rank

    def saved_as(self, adapter: Adapter) -> Method:
        """LoRA, once a rank is chosen."""
        rank, spelled = _rank(adapter).chosen, self.spelled_out(adapter)
        if rank is None:
            return spelled
        settings = {key: value for key, value in spelled.settings().items() if key != "frozen"}
        ranks = {key: min(rank, value) for key, value in spelled.rank_pattern.items()}
        return read_method({"name": "lora", **settings, "r": rank, "rank_pattern": ranks})

    def to_folder(self, adapter: Adapter, base: Base) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The layout of LoRA once a rank is chosen, Graft's own otherwise."""
        rank = _rank(adapter).chosen
        if rank is None:
            return super().to_folder(adapter, base)
        plain = self.saved_as(adapter).build(base, adapter.name)
        plain.head = adapter.head
        for (_, cut), (_, part) in zip(plain.placed, adapter.placed, strict=True):
            assert isinstance(cut, LoraPart)
            assert isinstance(part, DyloraPart)
            a, b, _ = part.cut(rank)
            cut.lora_A.data, cut.lora_B.data = a.detach().clone(), b.detach().clone()
        return method_of(plain).to_folder(plain, base)


def _rank(adapter: Adapter) -> RankOfStep:
    assert isinstance(adapter.shared, RankOfStep)
    return adapter.shared
