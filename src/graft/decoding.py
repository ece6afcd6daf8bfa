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
from graft.engine.fewrows import FewRows
from graft.model import Base
from graft.parts.attach import widest
from graft.routing import Route

BLOCK = 64
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
                torch.cat([old, old.new_empty(*old.shape[:2], after - before + BLOCK, old.shape[-1])], dim=-2)
                for old in (keys, values)
            ]
        for memory, states in zip(self._memory, (key_states, value_states), strict=True):
            memory[:, :, before:after] = states
        self.keys, self.values = (memory[:, :, :after] for memory in self._memory)
        self._shown = self.keys
        return self.keys, self.values

    def take(self, memory: list[Tensor], columns: int) -> None:
        """Go on with these keys and values, which have room behind their first `columns`."""
        self._memory = memory
        self.keys, self.values = (tensor[:, :, :columns] for tensor in memory)
        self._shown = self.keys


def _new_cache(config: Any = None) -> DynamicCache:
    cache = DynamicCache(config=config)
    cache.layers = [_BlockLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class Decoder:
    """A batch of a decoder, padded on the left to its longest row or to `columns`, and its cache."""

    def __init__(
        self, base: Base, prompts: Sequence[Sequence[int]], route: Route, use_cache: bool, columns: int = 0
    ) -> None:
        self.base, self.route = base, route
        longest = max(columns, *(len(prompt) for prompt in prompts))
        filler = base.config.pad_token_id or 0
        self.ids = torch.tensor([[*[filler] * (longest - len(p)), *p] for p in prompts], device=base.device)
        self.mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=base.device)
        self.positions = base.position_ids(self.mask)
        self.cache = _new_cache(base.config) if use_cache else None
        self.width = widest(base, route)
        self.last = torch.tensor([-1], device=base.device)
        self.products = FewRows(base.model)

    def scores(self) -> Tensor:
        """Scores [rows, vocabulary] of the next token. Those of other positions are not computed: for 64 prompts of
        150 tokens and 49,152 words they would take a gigabyte.
        """
        with self.products.of(self.ids.numel()):
            output: Any = self.base.model(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=self.cache is not None,
                # An index, not a number: transformers then takes a slice, whose product with the weights copies them
                # for each row (1.1 GB and twice the time for these 32 rows).
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

    def feed(self, piece: Sequence[int]) -> None:
        """Let the only row, whose prompt is read in pieces, go on with its next one."""
        ids = torch.tensor([list(piece)], device=self.base.device)
        self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
        self.positions = self.positions[:, -1:] + 1 + torch.arange(len(piece), device=self.base.device)
        self.ids = ids

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the rows at these places, in their order."""
        if self.cache is not None:
            self.arrange(places)
            return
        rows = torch.tensor(places, device=self.base.device)
        self.ids, self.mask, self.positions = self.ids[rows], self.mask[rows], self.positions[rows]
        self.route = self.route.select(places)

    def arrange(self, places: Sequence[int], other: "Decoder | None" = None) -> None:
        """Go on with the rows at these places among its own and, behind them, those of `other`, which has a cache too.

        Both have read all but their rows' last token. Columns that are padding in all rows are cut off. Keys and values
        are copied once, layer by layer, so that no more than one layer stands in memory twice.
        """
        sources = [self] if other is None else [self, other]
        owned = [row for source in sources for row in (source.route.row(index) for index in range(len(source.ids)))]
        if other is None:
            route = self.route.select(places)
        else:
            route = Route.of([owned[place] for place in places], self.base.device)
        rows = torch.tensor(places, device=self.base.device)
        longest = max(source.mask.shape[1] for source in sources)
        mask = torch.cat([_padded(source.mask, longest) for source in sources])[rows]
        mask = mask[:, int(mask.any(dim=0).int().argmax()) :]
        old = [(source.width, source.mask.shape[1] - 1) for source in sources]
        new = (widest(self.base, route), mask.shape[1] - 1)
        apart = self.base.family.positions == "absolute"
        moves = _runs(places, len(self.ids))
        layers: Any = zip(*(source.cache.layers for source in sources if source.cache is not None), strict=True)
        for group in layers:
            _move(group, moves, [_spans(shape, new, apart) for shape in old], sum(new))
        self.ids = torch.cat([source.ids for source in sources])[rows]
        self.positions = torch.cat([source.positions for source in sources])[rows]
        self.mask, self.route, self.width = mask, route, new[0]


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
        self.products = FewRows(base.model)

    def scores(self) -> Tensor:
        """Scores [rows, vocabulary] of the next token."""
        with self.products.of(self.ids.numel()):
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


def _padded(mask: Tensor, columns: int) -> Tensor:
    """A mask [rows, T] with padding in front: [rows, columns]."""
    return torch.nn.functional.pad(mask, (columns - mask.shape[1], 0))


def _runs(places: Sequence[int], first: int) -> list[tuple[int, int, int, int]]:
    """Rows that stay beside each other, as (source, its row, new row, count): source 0 has `first` rows."""
    runs: list[tuple[int, int, int, int]] = []
    for new, place in enumerate(places):
        source, row = (0, place) if place < first else (1, place - first)
        if runs and runs[-1][0] == source and runs[-1][1] + runs[-1][3] == row:
            runs[-1] = (*runs[-1][:3], runs[-1][3] + 1)
        else:
            runs.append((source, row, new, 1))
    return runs


def _spans(old: tuple[int, int], new: tuple[int, int], apart: bool) -> list[tuple[int, int, int]]:
    """Columns of a cache as (column, new column, count), for a block of virtual tokens and the rows behind it, old and
    new. Both are aligned to the right; where they stand `apart`, each for itself, else as one.
    """
    if not apart:
        count = min(sum(old), sum(new))
        return [(sum(old) - count, sum(new) - count, count)]
    block, rows = min(old[0], new[0]), min(old[1], new[1])
    return [(old[0] - block, new[0] - block, block), (sum(old) - rows, sum(new) - rows, rows)]


def _move(
    layers: Sequence[Any],
    runs: list[tuple[int, int, int, int]],
    spans: list[list[tuple[int, int, int]]],
    columns: int,
) -> None:
    """Make the first of these layers hold `columns` columns of the rows of all."""
    first = layers[0]
    width, room = columns, BLOCK
    if first.is_sliding:  # it holds the last columns only, and counts all
        width, room = min(columns, first.sliding_window - 1), 0
        kept = [min(layer.keys.shape[-2], width) for layer in layers]
        spans = [[(layer.keys.shape[-2] - n, width - n, n)] for layer, n in zip(layers, kept, strict=True)]
    rows = sum(count for *_, count in runs)
    moved = []
    for name in ("keys", "values"):
        like = getattr(first, name)
        # Zeros, since what stands in padding is multiplied with a share of zero.
        states = like.new_zeros(rows, like.shape[1], width + room, like.shape[-1])
        for source, row, new, count in runs:
            old = getattr(layers[source], name)[row : row + count]
            for begin, put, size in spans[source]:
                states[new : new + count, :, put : put + size] = old[:, :, begin : begin + size]
        moved.append(states)
    if isinstance(first, _BlockLayer):
        first.take(moved, width)
    else:
        first.keys, first.values = moved
        first.cumulative_length = columns


def _cut(cache: DynamicCache, columns: int) -> None:
    """Take the first columns out of a cache: no row that is left has virtual tokens or anything else there."""
    layers: Any = cache.layers if columns else ()
    for layer in layers:
        first = columns
        if layer.is_sliding:  # it holds the last columns only, and counts all
            layer.cumulative_length -= columns
            first = layer.keys.shape[-2] - min(layer.cumulative_length, layer.sliding_window - 1)
        layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
