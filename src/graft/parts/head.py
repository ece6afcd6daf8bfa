"""Task heads: what turns a row's hidden states into scores of labels. They belong to an adapter."""

from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.errors import RouteError, UsageError
from graft.model import Base, Hidden
from graft.parts.attach import adapter_of, hidden_states
from graft.parts.base import Adapter, at_dtype_of
from graft.routing import Entry, Route

Pooling = Literal["pooler", "first", "last", "mean"]


class TaskHead(nn.Module):
    """Scores [B, labels] from pooled states [B, d], with the layers and names of transformers' own task models."""

    def __init__(
        self,
        width: int,
        labels: tuple[str, ...],
        names: dict[str, str],
        activation: str,
        pooling: Pooling,
        dropout: float,
    ) -> None:
        super().__init__()
        self.labels = labels
        self.names = names
        self.pooling = pooling
        self.activation = activation
        self.rate = dropout
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(width, width) if "dense" in names else None
        # transformers' decoders score without a bias.
        self.out = nn.Linear(width, len(labels), bias=names["out"] != "score")
        for layer in (self.dense, self.out):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @classmethod
    def for_base(
        cls, base: Base, labels: tuple[str, ...], pooling: Pooling | None = None, dropout: float = 0.1
    ) -> "TaskHead":
        """The head that transformers' sequence classifier of this architecture has."""
        family = base.family
        pooling = pooling or default_pooling(base)
        if pooling == "pooler" and not has_pooler(base):
            raise UsageError(f"pooling: {base.name} has no pooler", "use first, last or mean")
        return cls(base.hidden_size, labels, family.task_head, family.head_activation, pooling, dropout)

    def description(self) -> dict[str, Any]:
        """What an adapter folder keeps of it."""
        return {"labels": list(self.labels), "pooling": self.pooling, "dropout": self.rate}

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, d] -> [B, labels]."""
        states = self.dropout(at_dtype_of(pooled, self.out.weight))
        if self.dense is not None:
            states = self.dropout(getattr(torch, self.activation)(self.dense(states)))
        scores: Tensor = self.out(states)
        return scores


def has_pooler(base: Base) -> bool:
    """Whether the base has a pooler of its own."""
    return isinstance(getattr(base.body, "pooler", None), nn.Module)


def default_pooling(base: Base) -> Pooling:
    """As transformers' sequence classifiers: a pretrained pooler, else the first token of an encoder, else the last."""
    if base.family.kind != "encoder":
        return "last"
    if "dense" in base.family.task_head or not has_pooler(base):
        return "first"
    return "pooler"


def pool(hidden: Hidden, pooling: Pooling) -> Tensor:
    """One vector per row, [B, d]."""
    if pooling == "pooler":
        assert hidden.pooled is not None
        return hidden.pooled
    if pooling == "mean":
        weights = hidden.mask.to(hidden.last.dtype)[..., None]
        return (hidden.last * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    positions = torch.arange(hidden.mask.shape[1], device=hidden.mask.device)
    real = hidden.mask.bool()
    if pooling == "first":
        index = torch.where(real, positions, hidden.mask.shape[1]).amin(dim=1).clamp(max=hidden.mask.shape[1] - 1)
    else:
        index = torch.where(real, positions, -1).amax(dim=1).clamp(min=0)
    return hidden.last[torch.arange(hidden.rows, device=index.device), index]


def head_of(base: Base, names: tuple[str, ...]) -> TaskHead:
    """The head that rows going through `names` end in: the last adapter's that has one."""
    for name in reversed(names):
        head = adapter_of(base, name).head
        if isinstance(head, TaskHead):
            return head
    raise RouteError(f"no task head on the way through {list(names) or 'the plain base'}", "train a classifier first")


def scores(base: Base, batch: dict[str, Tensor], entry: Entry | Route) -> Tensor:
    """Scores [B, labels] of every row by the head of its own adapter, without gradients for rows that need none."""
    route = entry if isinstance(entry, Route) else Route.all(entry)
    heads = [head_of(base, names) for names in route.stacks]
    hidden = hidden_states(base, batch, route)
    if len(heads) == 1:
        result: Tensor = heads[0](pool(hidden, heads[0].pooling))
        return result
    if len({len(head.labels) for head in heads}) > 1:
        raise RouteError("rows of one batch have heads with different numbers of labels", "split the batch")
    pieces = [head(pool(hidden, head.pooling)[rows]) for head, (_, rows) in zip(heads, route.groups, strict=True)]
    return torch.cat(pieces)[route.inverse]


def adapter_head(adapter: Adapter) -> TaskHead | None:
    """The adapter's head, if it has one."""
    return adapter.head if isinstance(adapter.head, TaskHead) else None


def hold_unused(base: Base, adapter: Adapter, others: Collection[nn.Module] = ()) -> None:
    """Let nothing train at the base's output head, which a task head stands in for, and at `others`: no gradient comes
    there. What is also used elsewhere, as a tied output head is in the embeddings, trains on.
    """
    unused = {module for site in base.sites if site.role == "head" for module in site.leave.modules()} | set(others)
    used = {id(value) for site, part in adapter.placed if site.leave not in unused for value in part.parameters()}
    for site, part in adapter.placed:
        for value in part.parameters() if site.leave in unused else ():
            if id(value) not in used:
                value.requires_grad_(False)
