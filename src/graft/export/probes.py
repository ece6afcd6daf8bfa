"""Probe prompts, what a model computes on them, and how far two models are apart."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from graft.data.dialogue import Message
from graft.errors import DataError
from graft.merge import SENTENCES
from graft.model import Base
from graft.rendering.render import Renderer
from graft.routing import Entry

TEXTS = (
    *SENTENCES,
    "  two spaces\tand a tab\n\nthen  12345 and 3.14159",
    "if (x<=3) { return `${x}`; }",
    "naïve café, 東京, Привет, مرحبا, 👍🏽",
    "don't WON'T I'll we've",
    "",
)
"""Texts that tokenizers must cut alike: words, numbers, spaces, code, other scripts."""

_PROMPTS = ("Hello, who are you?", "Write a haiku about the sea.", "What is 12 * 12?")
LONGEST = 64
"""Tokens of a probe."""


@dataclass(frozen=True)
class Agreement:
    """How far a model's scores of the next token are from another's, over all positions of the probes."""

    positions: int
    top1: float
    """The share of positions where the likeliest token is the same."""
    largest: float
    """The largest difference of any score (logit)."""
    kl: float
    """The mean Kullback-Leibler divergence of the other's distribution from the first's, in nats."""
    scale: float
    """The largest score of the first."""

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self)


def probe_rows(base: Base, renderer: Renderer | None, longest: int = LONGEST) -> list[list[int]]:
    """Token ids of the probes, each cut to `longest`: sentences, and dialogues where there is a template."""
    assert base.tokenizer is not None
    rows = [list(base.tokenizer(text)["input_ids"]) for text in TEXTS]
    if renderer is not None and renderer.template:
        for prompt in _PROMPTS:
            try:
                rows.append(renderer.prompt([Message("user", prompt)]))
            except DataError:  # a template that wants a system turn, say
                continue
    longest = min(longest, base.max_positions or longest)
    return [row[:longest] for row in rows if row]


@torch.no_grad()
def scores_of(base: Base, entry: Entry, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Scores of the next token [T, V] in fp32 of each row, run by itself."""
    found = []
    with base.route(entry):
        for row in rows:
            ids = torch.tensor([list(row)], device=base.device)
            hidden = base.hidden({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            found.append(base.logits(hidden.last)[0].cpu())
    return found


def compare(first: Sequence[Tensor], second: Sequence[Tensor]) -> Agreement:
    """How far `second` is from `first`; infinitely far where shapes differ or anything is no number."""
    if [scores.shape for scores in first] != [scores.shape for scores in second]:
        return Agreement(0, 0.0, float("inf"), float("inf"), 0.0)
    if not all(bool(torch.isfinite(scores).all()) for scores in (*first, *second)):
        return Agreement(0, 0.0, float("inf"), float("inf"), 0.0)
    same = largest = kl = scale = 0.0
    positions = 0
    for then, now in zip(first, second, strict=True):
        positions += len(then)
        same += float((then.argmax(dim=-1) == now.argmax(dim=-1)).sum())
        largest = max(largest, float((then - now).abs().max()))
        scale = max(scale, float(then.abs().max()))
        then, now = then.log_softmax(dim=-1), now.log_softmax(dim=-1)
        kl += float((then.exp() * (then - now)).sum())
    return Agreement(positions, same / positions, largest, max(0.0, kl / positions), scale)
