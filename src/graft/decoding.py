"""The model's side of decoding: a batch that goes on by one token at a time, and its key/value cache.

The cache is Graft's own: an adapter with virtual tokens makes it longer than the caller's rows, which transformers'
loop does not know (a static cache hands over a mask that cannot be extended).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from graft.data.batch import pad
from graft.model import Base
from graft.parts.attach import widest
from graft.routing import Route

_BLOCK = 64
"""Columns by which a layer's cache grows."""


class _BlockLayer(DynamicLayer):
    """A layer's keys and values [rows, heads, columns, d] in memory that has room for more columns.

    transformers' own layer copies all of them for each token, a third of the time of decoding with 32 rows of 150.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory: list[Tensor] = []
        self._shown: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the columns of new tokens; gives all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        before = keys.shape[-2]
        after = before + key_states.shape[-2]
        if self._shown is not keys or after > self._memory[0].shape[-2]:  # other rows or columns, or no room
            self._memory = [
                torch.cat([old, old.new_empty(*old.shape[:2], after - before + _BLOCK, old.shape[-1])], dim=-2)
                for old in (keys, values)
            ]
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, before:after] = states
        self.keys, self.values = (memory[:, :, :after] for memory in self._memory)
        self._shown = self.keys
        return self.keys, self.values


def _new_cache(config: Any = None) -> DynamicCache:
    cache = DynamicCache(config=config)
    cache.layers = [_BlockLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class Decoder:
    """A batch of a decoder, padded on the left, and its cache."""

    def __init__(self, base: Base, prompts: Sequence[Sequence[int]], route: Route, use_cache: bool) -> None:
        self.base, self.route = base, route
        longest = max(len(prompt) for prompt in prompts)
        filler = base.config.pad_token_id or 0
        self.ids = torch.tensor([[*[filler] * (longest - len(p)), *p] for p in prompts], device=base.device)
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=base.device)
        self.positions = base.position_ids(self.mask)
        self.cache = _new_cache(base.config) if use_cache else None
        self.width = widest(base, route)
        self.last = torch.tensor([-1], device=base.device)

    def scores(self) -> Tensor:
        """Scores [rows, vocabulary] of the next token. Those of other positions are not computed: for 64 prompts of
        150 tokens and 49,152 words they would take a gigabyte.
        """
        output: Any = self.base.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            # An index, not a number: transformers then takes a slice, whose product with the weights copies them for
            # each row (1.1 GB and twice the time for these 32 rows).
            logits_to_keep=self.last,
        )
        scores: Tensor = output.logits[:, -1]
        return scores

    def add(self, tokens: Tensor, going: Tensor) -> None:
        """Add a token [rows] to the rows. One that has ended keeps its position, which may be the table's last."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        last = self.positions[:, -1:] + going[:, None]
        if self.cache is None:
            self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
            self.positions = torch.cat([self.positions, last], dim=1)
        else:
            self.ids, self.positions = tokens[:, None], last

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the rows at these places, in their order."""
        rows = torch.tensor(places, device=self.base.device)
        self.ids, self.mask, self.positions = self.ids[rows], self.mask[rows], self.positions[rows]
        self.route = self.route.select(places)
        width = widest(self.base, self.route)
        if self.cache is not None:
            self.cache.batch_select_indices(rows)
            _cut(self.cache, self.width - width)
        self.width = width


class PairDecoder:
    """A batch of an encoder-decoder: what its encoder gave, and the caches of its decoder."""

    def __init__(self, base: Base, prompts: Sequence[Sequence[int]], route: Route, use_cache: bool) -> None:
        self.base, self.route = base, route
        ids = pad(prompts, base.config.pad_token_id or 0, base.device)
        self.mask = pad([[1] * len(prompt) for prompt in prompts], 0, base.device)
        self.encoded: Any = base.model.get_submodule("encoder")(input_ids=ids, attention_mask=self.mask)
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if use_cache else None
        self.ids = base.first_decoder_ids(ids)
        self.width = widest(base, route)

    def scores(self) -> Tensor:
        """Scores [rows, vocabulary] of the next token."""
        output: Any = self.base.model(
            encoder_outputs=self.encoded,
            attention_mask=self.mask,
            decoder_input_ids=self.ids,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
        )
        scores: Tensor = output.logits[:, -1]
        return scores

    def add(self, tokens: Tensor, going: Tensor) -> None:
        """Add a token [rows] to the rows."""
        self.ids = tokens[:, None] if self.cache is not None else torch.cat([self.ids, tokens[:, None]], dim=1)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the rows at these places, in their order."""
        rows = torch.tensor(places, device=self.base.device)
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        self.route = self.route.select(places)
        width = widest(self.base, self.route)
        self.encoded.last_hidden_state = self.encoded.last_hidden_state[rows, self.width - width :]
        if self.cache is not None:
            self.cache.batch_select_indices(rows)
            _cut(self.cache.cross_attention_cache, self.width - width)
        self.width = width


def _cut(cache: DynamicCache, columns: int) -> None:
    """Take the first columns out of a cache: no row that is left has virtual tokens or anything else there."""
    layers: Any = cache.layers if columns else ()
    for layer in layers:
        first = columns
        if layer.is_sliding:  # it holds the last columns only, and counts all
            layer.cumulative_length -= columns
            first = layer.keys.shape[-2] - min(layer.cumulative_length, layer.sliding_window - 1)
        layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
