"""Parts at the softmax core, through the attention registry of transformers.

While at least one attending part is attached, the model's attention implementation is `graft`: the parts' `attend` for
their own rows, and for plain rows PyTorch's scaled dot product attention, exactly as `sdpa` calls it. `graft_fast` is
the same with kernels of the engine's choice.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graft.engine.attention import at_autocast, dense_attention, is_faster
from graft.errors import ModelError
from graft.model import Base
from graft.parts.base import Core, Part
from graft.parts.stacked import Fronts
from graft.routing import Router, Rows, Tenants, by_rows, take

NAME = "graft"
FAST = "graft_fast"
"""The same with the engine's choice of kernels."""
_SLOT = "_graft_attention"
_PLAIN = ("softcap", "output_attentions", "cache")
"""Options of transformers' attention that only its own function knows."""


class AttentionSlot:
    """The attending parts at one attention module, by adapter."""

    def __init__(self, router: Router, name: str) -> None:
        self.router = router
        self.name = name
        self.parts: Tenants[Part] = Tenants()
        self.fronts = Fronts(self.parts)


def slot_at(module: nn.Module) -> AttentionSlot | None:
    """The slot of an attention module, if parts are there."""
    return module.__dict__.get(_SLOT)


def open_slot(base: Base, module: nn.Module, where: str) -> AttentionSlot:
    """The slot of an attention module, made when missing; the first one switches the implementation."""
    if base.config._attn_implementation not in (NAME, FAST):
        before = base.config._attn_implementation
        base.model.set_attn_implementation(NAME)
        if base.config._attn_implementation != NAME:
            raise ModelError(f"{base.name}: its attention cannot be replaced, so nothing can attend in it")
        base.model.__dict__["_graft_attention_before"] = before
    slot: AttentionSlot = module.__dict__.setdefault(_SLOT, AttentionSlot(base.router, where))
    return slot


def choose_kernels(base: Base) -> None:
    """Let the engine choose how attention is computed. A model that does not use `sdpa` is left as it is."""
    if base.config._attn_implementation == "sdpa":
        base.model.set_attn_implementation(FAST)


def close_slots(base: Base) -> None:
    """Remove empty slots, and restore the model's own implementation after the last."""
    for module in base.model.modules():
        slot = slot_at(module)
        if slot is not None and not slot.parts:
            del module.__dict__[_SLOT]
    if not any(slot_at(module) for module in base.model.modules()):
        before = base.model.__dict__.pop("_graft_attention_before", None)
        if before is not None:
            # set_attn_implementation writes into the config, which would be saved with the model.
            base.model.set_attn_implementation(before)


def graft_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: q [B, heads, S, d], k and v [B, kv_heads, T, d] -> [B, S, heads, d]."""

    def sdpa(rows: Rows) -> Tensor:
        bias = None if position_bias is None else take(position_bias, rows)
        mask = None if attention_mask is None else take(attention_mask, rows)
        q, k, v = (take(tensor, rows) for tensor in (query, key, value))
        options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return _core(module, q, k, v, mask, position_bias=bias, **options, **kwargs)

    slot = slot_at(module)
    if slot is None:
        return sdpa(None), None

    def core(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return _core(module, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=False, **kwargs)

    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    mask = _explicit_mask(attention_mask, position_bias, query, key, causal)
    front = slot.fronts.of(slot.router.require())
    if front is not None:
        slot.router.require().check(query.shape[0], slot)
        return core(query, *_behind(front, key, value, query.shape[2], mask)), None

    def attend(chain: list[Part], rows: Rows) -> Tensor:
        call: Core = core
        last = [part for part in chain if part.cuts_rows]
        for part in reversed([*(part for part in chain if not part.cuts_rows), *last]):
            call = _nested(part, call)
        return call(take(query, rows), take(key, rows), take(value, rows), None if mask is None else take(mask, rows))

    return by_rows(slot.router, slot.parts, sdpa, attend, query.shape[0], slot), None


def _core(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The softmax core, with the arguments of transformers' attention functions: [B, S, heads, d]."""
    config: Any = module.config
    # Not a set's isdisjoint, at which compiled code would be cut in two.
    plain = any(name in kwargs for name in _PLAIN)
    fast = config._attn_implementation == FAST and position_bias is None and not plain
    if fast:  # as autocast does for sdpa: rotary positions leave queries and keys in fp32 beside values in bf16
        query, key, value = at_autocast(query), at_autocast(key), at_autocast(value)
    if fast and is_faster(query, key, value, mask):
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and mask is None
        if not causal or query.shape[2] == key.shape[2]:
            output = dense_attention(query, key, value, mask, causal=causal, scale=scaling, dropout=dropout)
            return output.transpose(1, 2).contiguous()
    options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    result: Tensor = sdpa_attention_forward(module, query, key, value, mask, position_bias=position_bias, **options)[0]
    return result


def _nested(part: Part, inner: Core) -> Core:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return part.attend(inner, q, k, v, mask)

    return call


def _explicit_mask(mask: Tensor | None, bias: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """What `sdpa` would apply, as one mask: causality that it takes from a flag, and T5's position bias."""
    rows, columns = query.shape[2], key.shape[2]
    if mask is None and causal and rows > 1:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()[None, None]
    if bias is None:
        return mask
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def _behind(
    front: tuple[Tensor, Tensor, Tensor], key: Tensor, value: Tensor, queries: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and mask [B, …, S, n + T] of all rows, with what each has in front."""
    keys, values, seen = front
    rows = key.shape[0]
    if mask is None:
        mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    if mask.dtype != torch.bool:
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, torch.finfo(mask.dtype).min)
    heads = mask.shape[1]
    whole = [part.expand(rows, heads, queries, -1) for part in (seen, mask)]
    joined = (torch.cat([one.to(other.dtype), other], dim=2) for one, other in ((keys, key), (values, value)))
    return (*joined, torch.cat(whole, dim=3))  # type: ignore[return-value]


def widen_mask(mask: Tensor | None, n: int) -> Tensor | None:
    """The mask [..., S, T] with n keys in front that every query sees: [..., S, n + T]."""
    if mask is None:
        return None
    return F.pad(mask, (n, 0), value=True if mask.dtype == torch.bool else 0.0)


for _name in (NAME, FAST):
    ALL_ATTENTION_FUNCTIONS.register(_name, graft_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
