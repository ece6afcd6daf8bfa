"""Greedy decoding of a batch whose rows go through different adapters.

The loop keeps its own cache: an adapter with virtual tokens makes the cache longer than the caller's rows, which
transformers' own loop does not know (a static cache hands over a mask that cannot be extended).
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from graft.data.batch import pad
from graft.errors import UsageError
from graft.model import Base
from graft.routing import Entry, Route


@torch.no_grad()
def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    entry: Entry | Route = None,
    *,
    max_new_tokens: int = 32,
    stop_ids: Collection[int] = (),
    use_cache: bool = True,
) -> list[list[int]]:
    """New token ids of each prompt, without the stop id that ended them.

    Without a cache every step reads the whole row again: slower, and the reference that the cache is tested against.
    Raises `UsageError` for encoders and for empty prompts, `RouteError` when a row exceeds the positions of the base.
    """
    if base.family.kind == "encoder":
        raise UsageError(f"{base.name} is an encoder, which does not generate")
    if not prompts or not all(prompts):
        raise UsageError("every prompt needs at least one token")
    base.model.eval()
    with base.route(entry):
        decode = _decode_pair if base.family.kind == "encoder-decoder" else _decode
        chosen = decode(base, prompts, max_new_tokens, set(stop_ids), use_cache)
    return [_until(row, set(stop_ids)) for row in chosen.tolist()]


def _decode(base: Base, prompts: Sequence[Sequence[int]], steps: int, stop: set[int], use_cache: bool) -> Tensor:
    longest = max(len(prompt) for prompt in prompts)
    filler = base.config.pad_token_id or 0
    ids = torch.tensor([[*[filler] * (longest - len(p)), *p] for p in prompts], device=base.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=base.device)
    cache = DynamicCache(config=base.config) if use_cache else None
    new = ids[:, :0]
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=base.device)
    for _ in range(steps):
        width = ids.shape[1] if cache is None or new.shape[1] == 0 else 1
        output: Any = base.model(
            input_ids=ids[:, -width:],
            attention_mask=mask,
            position_ids=base.position_ids(mask)[:, -width:],
            past_key_values=cache,
            use_cache=use_cache,
        )
        token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        ids, new = torch.cat([ids, token], dim=1), torch.cat([new, token], dim=1)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        ended |= torch.tensor([int(t) in stop for t in token[:, 0]], device=base.device)
        if bool(ended.all()):
            break
    return new


def _decode_pair(base: Base, prompts: Sequence[Sequence[int]], steps: int, stop: set[int], use_cache: bool) -> Tensor:
    filler = base.config.pad_token_id or 0
    ids = pad(prompts, filler, base.device)
    mask = pad([[1] * len(prompt) for prompt in prompts], 0, base.device)
    encoded = base.model.get_submodule("encoder")(input_ids=ids, attention_mask=mask)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if use_cache else None
    written = base.first_decoder_ids(ids)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=base.device)
    for _ in range(steps):
        output: Any = base.model(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=written if cache is None else written[:, -1:],
            past_key_values=cache,
            use_cache=use_cache,
        )
        token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        written = torch.cat([written, token], dim=1)
        ended |= torch.tensor([int(t) in stop for t in token[:, 0]], device=base.device)
        if bool(ended.all()):
            break
    return written[:, 1:]


def _until(row: list[int], stop: set[int]) -> list[int]:
    end = next((index for index, token in enumerate(row) if token in stop), len(row))
    return row[:end]
