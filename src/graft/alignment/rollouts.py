"""Answers that a policy draws, and what is kept of each to learn from it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graft.data.dialogue import Dialogue
from graft.generate import stream
from graft.model import Base
from graft.rendering.supervise import Supervised
from graft.routing import Entry
from graft.sampling import Sampling

_AT_ONCE = 32
"""Answers that are drawn at a time, at least."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A dialogue as ids; `prompt` of them stand before the answer that a policy is asked for."""

    row: Supervised
    dialogue: Dialogue

    @property
    def ids(self) -> Sequence[int]:
        """The prompt and the file's own answer."""
        return self.row.ids

    @property
    def trained(self) -> Sequence[int]:
        """1 at the tokens of the file's own answer."""
        return self.row.trained

    @property
    def prompt(self) -> int:
        """Tokens before the answer."""
        return self.row.prompt

    @property
    def place(self) -> str:
        """For errors."""
        return self.row.place

    def __len__(self) -> int:
        return len(self.row.ids)


@dataclass(slots=True)
class Rollout:
    """An answer that was drawn. The tensors have a value for each of its tokens."""

    ids: list[int]
    prompt: int
    ended: bool
    asked: Prompt
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    old: Tensor | None = None
    """log π when it was drawn; None where each is learned from only once, at once."""
    reference: Tensor | None = None
    """log π_ref; None where the policy is held to none."""
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    returns: Tensor = field(default_factory=lambda: torch.empty(0))
    times: int = 1
    """How often it counts: one answer that was drawn several times is learned from once, so many times as much."""

    @property
    def trained(self) -> list[int]:
        """1 at the tokens that were drawn."""
        return [0] * self.prompt + [1] * self.drawn

    @property
    def drawn(self) -> int:
        """Tokens that were drawn, the one that ends the answer included."""
        return len(self.ids) - self.prompt

    @property
    def place(self) -> str:
        """For errors."""
        return self.asked.place

    def __len__(self) -> int:
        return len(self.ids)


def draw(
    base: Base,
    prompts: Sequence[Prompt],
    entry: Entry,
    *,
    temperature: float,
    max_new_tokens: int,
    stop_ids: Collection[int],
    size: int,
) -> list[Rollout]:
    """One answer to each prompt; one that stands several times gets as many. torch's random numbers decide.

    The model is in evaluation mode afterwards.
    """
    stop = frozenset(stop_ids)
    sampling = Sampling(temperature=temperature, seed=int(torch.randint(2**31, ())))
    drawn: dict[int, Rollout] = {}
    waiting = sorted(range(len(prompts)), key=lambda row: -prompts[row].prompt)
    for start in range(0, len(waiting), max(size, _AT_ONCE)):
        rows = waiting[start : start + max(size, _AT_ONCE)]
        asked = [list(prompts[row].ids[: prompts[row].prompt]) for row in rows]
        found = [Rollout(list(ids), len(ids), False, prompts[row]) for ids, row in zip(asked, rows, strict=True)]
        options = {"max_new_tokens": max_new_tokens, "stop_ids": stop, "sampling": sampling, "numbers": rows}
        for tokens in stream(base, asked, entry, **options):  # type: ignore[arg-type]
            for place, token in tokens:
                found[place].ids.append(token)
                found[place].ended = token in stop
        drawn |= dict(zip(rows, found, strict=True))
    return [drawn[row] for row in range(len(prompts))]


def distinct(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Each answer of a step once, with how often it was drawn to the same prompt and judged alike: equal rows have
    equal gradients, and of eight short answers often only three differ."""
    found: dict[tuple[int, tuple[int, ...], float], Rollout] = {}
    for one in rollouts:
        known = found.setdefault((id(one.asked), tuple(one.ids), float(one.advantages[0])), one)
        if known is not one:
            known.times += 1
    return list(found.values())


def often(rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
    """How often each token of some rollouts counts, [tokens]."""
    counts = [torch.full((one.drawn,), float(one.times)) for one in rollouts]
    return torch.cat(counts).to(device)


def longest(prompt: Prompt, max_new_tokens: int, count: int) -> list[Rollout]:
    """Answers of the most tokens there can be, of no meaning: for plans and rehearsals."""
    ids = [*prompt.ids[: prompt.prompt], *[1] * max_new_tokens]
    zeros = torch.zeros(max_new_tokens)
    return [
        Rollout(list(ids), prompt.prompt, True, prompt, zeros, zeros - 1, zeros - 1, zeros, zeros) for _ in range(count)
    ]


_BY_TOKEN = ("advantages", "old", "reference", "values", "returns")


def packed(rollouts: Sequence[Rollout], places: Mapping[int, int]) -> dict[str, Tensor]:
    """Rollouts as tensors, for a checkpoint; `places` has the number of each prompt by its id()."""
    if not rollouts:
        return {}
    found = {
        "ids": torch.tensor([token for one in rollouts for token in one.ids]),
        "rows": torch.tensor([[len(one), one.prompt, one.ended, places[id(one.asked)], one.times] for one in rollouts]),
    }
    for name in _BY_TOKEN:
        values = joined([getattr(one, name) for one in rollouts], torch.device("cpu"))
        if values is not None and len(values):
            found[name] = values
    return found


def unpacked(kept: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> list[Rollout]:
    """What `packed` was given; `prompts` are the training rows."""
    if "rows" not in kept:
        return []
    rows = kept["rows"].tolist()
    ids = kept["ids"].split([length for length, *_ in rows])
    sizes = [length - prompt for length, prompt, *_ in rows]
    found = [
        Rollout(tokens.tolist(), prompt, bool(ended), prompts[asked], times=times)
        for tokens, (_, prompt, ended, asked, times) in zip(ids, rows, strict=True)
    ]
    for name in kept.keys() & set(_BY_TOKEN):
        for one, values in zip(found, kept[name].split(sizes), strict=True):
            setattr(one, name, values)
    return found


def joined(values: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """The tokens' values of some rollouts one behind the other, [tokens]; None where they have none."""
    known = [value for value in values if value is not None]
    return torch.cat(known).to(device) if known else None
