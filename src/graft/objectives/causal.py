"""What the objectives of decoders share: next-token loss at the tokens that are trained, and its figures by row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from graft.data.batch import in_batches, pad
from graft.engine.loss import chunked_loss
from graft.errors import UsageError
from graft.families import Family
from graft.model import Base
from graft.objectives.base import Loss, Objective, Report
from graft.parts.attach import hidden_states
from graft.parts.attention import FAST, NAME
from graft.parts.base import Adapter
from graft.routing import Entry, Route

_AT_ONCE = 1024
"""Tokens whose logits are in memory at a time in evaluation: 200 MB in fp32 with a vocabulary of 49,152."""


class Supervised(Protocol):
    """A row of a decoder: `ids`, and for each whether it is trained, that is, predicted from those before it."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids."""

    @property
    def trained(self) -> Sequence[int]:
        """1 where a token is trained, 0 elsewhere."""

    @property
    def place(self) -> str:
        """For errors."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class RowFigures:
    """Per row [rows]: summed loss in nats, tokens it is over, and how many of these were the likeliest."""

    loss: Tensor
    tokens: Tensor
    right: Tensor
    batch_size: int
    """Rows of a batch, fewer than asked where memory ran out."""

    @property
    def mean_loss(self) -> float:
        """Nats per token over all rows."""
        return float(self.loss.sum() / self.tokens.sum().clamp(min=1))

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; inf where it would overflow."""
        return math.exp(self.mean_loss) if self.mean_loss < 700 else math.inf


class Causal(Objective):
    """Next-token prediction with a decoder."""

    best_by: ClassVar[str] = "loss"
    max_length: ClassVar[int] = 1024
    aliases: ClassVar[dict[str, str]] = {"sample_packing": "packing"}

    packing: bool = False
    """Join the rows of a pass into rows of up to 1,024 tokens, without any of them seeing another: less padding where
    lengths differ much. Refused for methods with virtual tokens or an attention of their own."""

    def refuses(self, family: Family) -> str | None:
        """Encoders do not generate; encoder-decoders read their prompt on another side."""
        return None if family.kind == "decoder" else f"{self.name} needs a decoder, this is an {family.kind}"

    def prepare(self, base: Base, adapter: Adapter, labels: tuple[str, ...]) -> None:
        """No head is needed: the base's own gives the next token."""
        if self.packing:
            _refuse_packing(base, adapter)

    def weight(self, examples: Sequence[Supervised]) -> float:
        """The number of trained tokens."""
        # The first token has none before it to be predicted from.
        return float(sum(sum(example.trained) - example.trained[0] for example in examples))

    def loss(self, base: Base, examples: Sequence[Supervised], route: Entry | Route) -> Loss:
        """Cross-entropy summed over the trained tokens."""
        batch, targets = packed(base, examples) if self.packing else collate(base, examples)
        states = hidden_states(base, batch, route).last
        return Loss(summed_loss(base, states, targets, route), self.weight(examples))


def collate(base: Base, examples: Sequence[Supervised]) -> tuple[dict[str, Tensor], Tensor]:
    """Rows as a batch of input_ids and attention_mask [B, S], and targets [B, S]: what each position has to predict,
    -100 where nothing is trained. Padding is marked by position, not by id: the pad token is often the end of turn.
    """
    filler = base.config.pad_token_id
    batch = {
        "input_ids": pad([example.ids for example in examples], filler if filler is not None else 0, base.device),
        "attention_mask": pad([[1] * len(example.ids) for example in examples], 0, base.device),
    }
    return batch, pad([_targets(example) for example in examples], -100, base.device)


def packed(base: Base, examples: Sequence[Supervised], limit: int = 1024) -> tuple[dict[str, Tensor], Tensor]:
    """Rows one behind the other in rows of at most `limit` tokens (or the longest row), [P, S]: positions begin anew
    with each, and the mask [P, 1, S, S] lets a token see the earlier ones of its own row only.
    """
    bins = _bins([len(example) for example in examples], limit)
    longest = max(sum(len(examples[row]) for row in bin_) for bin_ in bins)
    filler = base.config.pad_token_id
    ids = torch.full((len(bins), longest), filler if filler is not None else 0, device=base.device)
    targets = torch.full_like(ids, -100)
    owner = torch.full_like(ids, -1)
    positions = torch.zeros_like(ids)
    for number, bin_ in enumerate(bins):
        start = 0
        for row in bin_:
            part = slice(start, start + len(examples[row]))
            ids[number, part] = torch.tensor(list(examples[row].ids), device=base.device)
            targets[number, part] = torch.tensor(_targets(examples[row]), device=base.device)
            owner[number, part] = row
            positions[number, part] = torch.arange(len(examples[row]), device=base.device)
            start = part.stop
    # Padding, which is nobody's, sees other padding: a row of a mask that allows nothing gives no numbers.
    earlier = torch.ones(longest, longest, dtype=torch.bool, device=base.device).tril()
    allowed = (owner[:, :, None] == owner[:, None, :]) & earlier
    batch = {"input_ids": ids, "attention_mask": allowed[:, None], "position_ids": positions + base.first_position}
    return batch, targets


def _bins(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Row numbers that share a row of at most `limit` tokens: the longest first, each where it fits first."""
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((number for number, left in enumerate(room) if left >= lengths[row]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(max(limit, lengths[row]))
        bins[place].append(row)
        room[place] -= lengths[row]
    return bins


def _targets(example: Supervised) -> list[int]:
    pairs = zip(example.ids[1:], example.trained[1:], strict=True)
    return [*(token if trained else -100 for token, trained in pairs), -100]


def _refuse_packing(base: Base, adapter: Adapter) -> None:
    """Refuse to pack where a row could see another, or where a part needs rows of its own."""
    if adapter.positions or adapter.virtual_parts() or any(part.does("attend") for _, part in adapter.placed):
        raise UsageError(
            f"packing: rows joined into one cannot have virtual tokens or an attention of their own, as "
            f"{adapter.method.name} gives them",
            "leave packing out",
        )
    kind = base.config._attn_implementation
    if kind not in ("sdpa", NAME, FAST):
        raise UsageError(
            f"packing: {base.name} computes attention with {kind!r}, which does not read a mask of truth values",
            "leave packing out, or set attn_implementation to sdpa in its config.json",
        )
    window = getattr(base.config, "sliding_window", None)
    if window is not None:
        raise UsageError(
            f"packing: {base.name} attends within a window of {window} tokens, which packed rows would not keep",
            "leave packing out",
        )


def summed_loss(base: Base, states: Tensor, targets: Tensor, route: Entry | Route) -> Tensor:
    """The sum of `token_losses`, in chunks where nothing trains at the head and all rows go one way."""
    head = base.select("head")[0].leave
    route = route if isinstance(route, Route) else Route.all(route)
    if route.size is not None or any(parameter.requires_grad for parameter in head.parameters()):
        return token_losses(base, states, targets, route).sum()
    known = targets != -100
    words = int(base.config.vocab_size)
    with base.route(route):
        return chunked_loss(states[known], targets[known], lambda part: base.logits(part[None])[0], words)


def token_losses(base: Base, states: Tensor, targets: Tensor, route: Entry | Route) -> Tensor:
    """Cross-entropy at every target that is not -100, [tokens], from hidden states [B, S, d].

    Logits are made at these positions only: a prompt's are never looked at.
    """
    found = _logits(base, states, targets, route)
    return torch.cat([F.cross_entropy(logits, wanted, reduction="none") for logits, wanted in found])


def _logits(base: Base, states: Tensor, targets: Tensor, route: Entry | Route) -> list[tuple[Tensor, Tensor]]:
    """Logits [tokens, vocabulary] in fp32 with their targets, in one piece, or by row where rows go different ways."""
    known = targets != -100
    route = route if isinstance(route, Route) else Route.all(route)
    if route.size is None:
        with base.route(route):
            return [(base.logits(states[known][None])[0], targets[known])]
    found = []
    for row in range(states.shape[0]):
        if bool(known[row].any()):
            with base.route(route.select([row])):
                found.append((base.logits(states[row, known[row]][None])[0], targets[row, known[row]]))
    return found


@torch.no_grad()
def row_figures(
    base: Base, examples: Sequence[Supervised], entry: Entry, batch_size: int, report: Report | None = None
) -> RowFigures:
    """Loss, tokens and right guesses of every row, in the order given."""
    loss, right = torch.zeros(len(examples), dtype=torch.double), torch.zeros(len(examples), dtype=torch.long)
    tokens = torch.zeros(len(examples), dtype=torch.long)

    def work(rows: list[int]) -> None:
        batch, targets = collate(base, [examples[row] for row in rows])
        states = hidden_states(base, batch, entry).last
        known = targets[targets != -100]
        flat = states[targets != -100]
        losses, guesses = [], []
        for start in range(0, len(known), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            with base.route(entry):
                logits = base.logits(flat[part][None])[0]
            losses.append(F.cross_entropy(logits, known[part], reduction="none").double().cpu())
            guesses.append((logits.argmax(dim=1) == known[part]).long().cpu())
        index = torch.tensor(rows)[(targets != -100).nonzero()[:, 0].cpu()]
        if losses:
            loss.index_add_(0, index, torch.cat(losses))
            right.index_add_(0, index, torch.cat(guesses))
        tokens.index_add_(0, index, torch.ones_like(index))

    done = None if report is None else partial(report, "evaluating")
    size = in_batches([len(example) for example in examples], batch_size, work, done)
    return RowFigures(loss, tokens, right, size)
