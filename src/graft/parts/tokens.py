"""Virtual tokens and shifted positions: hooks around a body.

Each row gets, in a block of columns before its own, as many virtual tokens as its adapters have, aligned to the right;
shorter ones are padded. The block is the same width for all rows, so outputs are cut back to the caller's shape, and
the caller's mask is extended, in one step. In a key/value cache the block stays.

Where a base measures distances in columns (sliding windows, T5's relative positions), the virtual tokens of a row that
is padded on the left come behind its padding: its own tokens stay in their columns, and outputs are cut alike.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graft.errors import RouteError
from graft.model import Base, signature_of
from graft.parts.base import Adapter
from graft.routing import Route


class Tokens:
    """The hooks of one base: around the body that embeds the row, its pooler, and the decoder that attends to it."""

    def __init__(self, base: Base, adapters: dict[str, Adapter]) -> None:
        self.base = base
        self.adapters = adapters
        self.name = "the body"
        self.cut = 0
        self.used = any(adapter.positions or adapter.virtual_parts() for adapter in adapters.values())
        self.handles: list[Any] = []
        encoder_decoder = base.family.kind == "encoder-decoder"
        self.body = base.model.get_submodule("encoder") if encoder_decoder else base.body
        self.signature = signature_of(self.body)
        self._hook(self.body, self._enter)
        if encoder_decoder:
            decoder = base.model.get_submodule("decoder")
            self.decoder_signature = signature_of(decoder)
            self._hook(decoder, self._enter_decoder)
            self.handles.append(base.model.register_forward_hook(self._leave_encoder_decoder))
            return
        self.handles.append(self.body.register_forward_hook(self._leave))
        pooler = getattr(self.body, "pooler", None)
        if isinstance(pooler, nn.Module):
            # BERT pools inside its body: pooling before the virtual tokens are cut gave plain rows
            # of a mixed batch another result (off by 0.16).
            self.handles.append(pooler.register_forward_pre_hook(self._pool))

    def _hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def _counts(self, route: Route, size: int) -> tuple[list[int], list[int]]:
        """Per row: virtual tokens, and positions taken by attended tokens."""

        def of(names: tuple[str, ...]) -> tuple[int, int]:
            adapters = [self.adapters[name] for name in names if name in self.adapters]
            tokens = sum(part.positions for adapter in adapters for part in adapter.virtual_parts())
            return tokens, sum(adapter.positions for adapter in adapters)

        route.check(size, self)
        per_row = [of(route.row(index)) for index in range(size)]
        return [tokens for tokens, _ in per_row], [shift for _, shift in per_row]

    def width(self, route: Route) -> int:
        """Columns that a batch under `route` gets in front."""
        size = route.size or 1
        return max(self._counts(route, size)[0])

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.cut = 0
        route = self.base.router.require()
        given = _bind(self.signature, args, kwargs)
        row_input = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if row_input is None:
            return None
        size, length = row_input.shape[:2]
        counts, shifts = self._counts(route, size)
        width = max(counts)
        # Batches mixed by row take the same path whoever is in them, or compiled layers would see other masks.
        mixed = self.used and route.uniform is None
        if not mixed and width == 0 and max(shifts) == 0:
            return None
        device = row_input.device
        cache = given.get("past_key_values")
        seen = int(cache.get_seq_length()) if cache is not None else 0
        caller_seen = max(seen - width, 0)
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise RouteError(
                "an adapter with a prefix or virtual tokens needs a mask [rows, length], not one per pair of positions",
                "decode with graft.generate, which keeps its own cache",
            )
        if mask is None:
            mask = torch.ones(size, caller_seen + length, dtype=torch.long, device=device)
        given["position_ids"] = self._positions(given, mask, length, counts, shifts, width if seen == 0 else 0)
        given["attention_mask"] = self._with_block(mask, counts, width)
        if seen == 0 and width > 0:
            self._embed(module, given, route, width, length, size)
            self.cut = width
            self._move(given, mask, counts, width)
        if given["position_ids"] is None:
            del given["position_ids"]
        return (), given

    def _embed(
        self, module: nn.Module, given: dict[str, Any], route: Route, width: int, length: int, size: int
    ) -> None:
        embeds = given.pop("inputs_embeds", None)
        ids = given.pop("input_ids", None)
        if embeds is None:
            embeds = module.get_input_embeddings()(ids)  # type: ignore[operator]
        rows = {names: self._block(names, width, embeds) for names in route.stacks}
        front = torch.stack([rows[route.row(index)] for index in range(size)])
        given["inputs_embeds"] = torch.cat([front, embeds], dim=1)
        types = given.get("token_type_ids")
        if types is not None:
            given["token_type_ids"] = torch.cat([types.new_zeros(size, width), types], dim=1)

    def _block(self, names: tuple[str, ...], width: int, like: Tensor) -> Tensor:
        adapters = [self.adapters[name] for name in names if name in self.adapters]
        tokens = [part.virtual().to(like.dtype) for adapter in adapters for part in adapter.virtual_parts()]
        filled = sum(token.shape[0] for token in tokens)
        return torch.cat([like.new_zeros(width - filled, like.shape[-1]), *tokens])

    def _with_block(self, mask: Tensor, counts: list[int], width: int) -> Tensor:
        """A mask [B, T] with the columns of the block: [B, width + T]."""
        order = self._order(mask, counts, width)
        whole = torch.cat([_block_mask(counts, width, mask), mask], dim=1)
        return whole if order is None else whole.gather(1, order)

    def _move(self, given: dict[str, Any], mask: Tensor, counts: list[int], width: int) -> None:
        """Put embeddings and positions into the columns of `_with_block`."""
        order = self._order(mask, counts, width)
        if order is None:
            return
        embeds, positions = given["inputs_embeds"], given["position_ids"]
        given["inputs_embeds"] = embeds.gather(1, order[..., None].expand(embeds.shape))
        if positions is not None:
            given["position_ids"] = positions.gather(1, order)

    def _order(self, mask: Tensor, counts: list[int], width: int) -> Tensor | None:
        """The columns of block and row [B, width + T] in their order: padding on the left, virtual tokens, the row.
        None where they stay.
        """
        if width == 0 or self.base.family.positions == "absolute":
            return None
        begun = (mask.cumsum(dim=1) > 0).int()
        return torch.cat([_block_mask(counts, width, begun), begun], dim=1).argsort(dim=1, stable=True)

    def _positions(
        self,
        given: dict[str, Any],
        mask: Tensor,
        length: int,
        counts: list[int],
        shifts: list[int],
        width: int,
    ) -> Tensor | None:
        """Position ids [B, width + length]: a row's attended tokens first, then its virtual ones, then its own."""
        if self.base.family.positions == "relative":
            return None
        own = given.get("position_ids")
        if own is None:
            own = self.base.position_ids(mask)[:, -length:]
        before = torch.tensor([n + shift for n, shift in zip(counts, shifts, strict=True)], device=mask.device)
        own = own.expand(mask.shape[0], length) + before[:, None]
        columns = torch.arange(width, device=mask.device)[None]
        start = (
            torch.tensor(shifts, device=mask.device)[:, None]
            - (width - torch.tensor(counts, device=mask.device))[:, None]
        )
        front = (columns + start).clamp(min=0) + self.base.first_position
        positions = torch.cat([front, own], dim=1)
        limit = self.base.max_positions
        if limit is not None and int(positions.max()) >= limit + self.base.first_position:
            room = limit - max(n + shift for n, shift in zip(counts, shifts, strict=True))
            raise RouteError(
                f"{length} tokens and {limit - room} virtual ones exceed the {limit} positions of {self.base.name}",
                f"shorten rows to {max(room, 0)} tokens (max_length)",
            )
        return positions

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        cut, self.cut = self.cut, 0
        if cut == 0:
            return output
        if isinstance(output, tuple):
            return (output[0][:, cut:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, cut:]
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(states[:, cut:] for states in output.hidden_states)
        return output

    def _pool(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        cut = self.cut
        if cut == 0:
            return None
        states = args[0]
        route = self.base.router.require()
        starts = [cut - self._pooled_before(route.row(index)) for index in range(states.shape[0])]
        if all(start == cut for start in starts):
            return (states[:, cut:],)
        # A pooler reads its first column; rows that pool a virtual token start there.
        rows = torch.arange(states.shape[0], device=states.device)
        return (states[rows, torch.tensor(starts, device=states.device)].unsqueeze(1),)

    def _pooled_before(self, names: tuple[str, ...]) -> int:
        adapters = [self.adapters[name] for name in names if name in self.adapters]
        parts = [part for adapter in adapters for part in adapter.virtual_parts()]
        return sum(part.positions for part in parts) if any(part.pool_virtual for part in parts) else 0

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The decoder attends to the encoder's virtual positions too: its mask of the encoder gets their columns."""
        given = _bind(self.decoder_signature, args, kwargs)
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is None:
            return None
        size = states.shape[0]
        counts, _ = self._counts(self.base.router.require(), size)
        width = max(counts)
        if width == 0:
            return None
        if mask is None:
            mask = torch.ones(size, states.shape[1] - width, dtype=torch.long, device=states.device)
        if mask.shape[1] + width != states.shape[1]:
            raise RouteError(
                f"the decoder got {states.shape[1]} encoder positions for a mask of {mask.shape[1]} "
                f"and {width} virtual ones"
            )
        given["encoder_attention_mask"] = self._with_block(mask, counts, width)
        return (), given

    def _leave_encoder_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        cut, self.cut = self.cut, 0
        if cut and not isinstance(output, tuple) and output.get("encoder_last_hidden_state") is not None:
            output.encoder_last_hidden_state = output.encoder_last_hidden_state[:, cut:]
        return output


def _block_mask(counts: list[int], width: int, like: Tensor) -> Tensor:
    """The mask [rows, width] of the block before the rows: 1 at virtual tokens."""
    rows = [[0] * (width - n) + [1] * n for n in counts]
    return torch.tensor(rows, dtype=like.dtype, device=like.device).view(len(counts), width)


def _bind(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    bound = signature.bind_partial(*args, **kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
    return dict(bound)
