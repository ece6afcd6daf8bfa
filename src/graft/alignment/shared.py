"""Answers behind prompts that they share: a prompt is read once, and all its answers go on from its keys and values.

Of a pair or a group, nearly all tokens are the prompt's, otherwise read once for each answer. Gradients are the same:
those of all answers add up at the prompt's keys and values, and go through it once.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from graft.data.batch import pad
from graft.engine.compiled import layers_of
from graft.model import Base
from graft.parts.attach import adapter_of
from graft.routing import Entry, Route

_WORTH = 1.25
"""Columns that the plain batch has for each of the shared one, from which on it is done: two passes cost a little."""


class Row(Protocol):
    """An answer behind its prompt."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids of both."""

    @property
    def trained(self) -> Sequence[int]:
        """1 at the answer's tokens."""

    @property
    def prompt(self) -> int:
        """Tokens before the answer."""

    @property
    def place(self) -> str:
        """For errors."""

    def __len__(self) -> int: ...


def shared_states(base: Base, rows: Sequence[Row], entry: Entry) -> tuple[Tensor, Tensor] | None:
    """Hidden states [B, A, d] at the positions that predict each row's answer of at most A tokens, and these as targets
    [B, A], -100 where nothing is trained. None where the rows share too little, and where a prompt cannot be read
    apart: encoder-decoders, activations that are recomputed, compiled layers, parts that cut rows, sliding windows.
    """
    order: dict[tuple[int, ...], int] = {}
    owner = [order.setdefault(tuple(row.ids[: row.prompt]), len(order)) for row in rows]
    prompts = [list(prompt) for prompt in order]
    answers = [list(row.ids[row.prompt :]) for row in rows]
    if not _worth(rows, prompts, answers) or not _able(base, entry, max(len(row.ids) for row in rows)):
        return None
    device = base.device
    filler = base.config.pad_token_id or 0
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    index = torch.tensor(owner, device=device)
    with base.route(Route.all(entry)):
        cache = DynamicCache()
        # Padded on the right, no token of a prompt sees what is behind it: without a mask.
        asked: Any = base.body(input_ids=pad(prompts, filler, device), past_key_values=cache, use_cache=True)
        states = asked.last_hidden_state[torch.arange(len(prompts), device=device), lengths - 1][index][:, None]
        if max(len(answer) for answer in answers) > 1:
            read = [answer[:-1] for answer in answers]
            seen = pad([[1] * len(prompts[place]) for place in owner], 0, device)
            mask = torch.cat([seen, pad([[1] * len(ids) for ids in read], 0, device)], dim=1)
            ids = pad(read, filler, device)
            behind: Any = base.body(
                input_ids=ids,
                attention_mask=mask,
                position_ids=base.position_ids(mask)[:, -ids.shape[1] :],
                past_key_values=_of_rows(cache, index),
                use_cache=True,
            )
            states = torch.cat([states, behind.last_hidden_state], dim=1)
    trained = (zip(answer, row.trained[row.prompt :], strict=True) for answer, row in zip(answers, rows, strict=True))
    return states, pad([[token if one else -100 for token, one in answer] for answer in trained], -100, device)


def _worth(rows: Sequence[Row], prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> bool:
    if not all(prompts) or not all(answers) or any(any(row.trained[: row.prompt]) for row in rows):
        return False
    plain = len(rows) * max(len(row.ids) for row in rows)
    apart = len(prompts) * max(map(len, prompts)) + len(rows) * (max(map(len, answers)) - 1)
    return plain >= _WORTH * apart


def _able(base: Base, entry: Entry, longest: int) -> bool:
    parts = [part for name in Route.all(entry).names() for _, part in adapter_of(base, name).placed]
    window = getattr(base.config, "sliding_window", None)
    return (
        base.family.kind == "decoder"
        and not base.recomputed
        and not any(layer._compiled_call_impl for layer in layers_of(base))
        and not any(part.cuts_rows for part in parts)
        and (window is None or longest <= window)
    )


def _of_rows(cache: DynamicCache, index: Tensor) -> DynamicCache:
    """The keys and values of the prompts at `index` [B], in a cache of B rows."""
    found = DynamicCache()
    for number, layer in enumerate(cache.layers):
        kept: Any = layer
        found.update(kept.keys[index], kept.values[index], number)
    return found
