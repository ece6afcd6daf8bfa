"""Decoding of batches whose rows go through different adapters: greedy or sampled, streamed or whole.

Rows that have ended leave the batch, and no row's answer depends on the rows beside it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graft.decoding import Decoder, PairDecoder
from graft.errors import ResourceError, RouteError, UsageError
from graft.limits import is_memory
from graft.model import Base
from graft.parts.attach import adapter_of
from graft.routing import Entry, Route
from graft.sampling import GREEDY, Chooser, Sampling

_SHARE = 8
"""Ended rows are dropped when they are one row in so many: dropping copies the cache once, as one step does."""


@dataclass(frozen=True)
class Answer:
    """What a row was answered."""

    ids: list[int]
    """The tokens, without the stop id."""
    ended: bool
    """Whether a stop id ended it; otherwise a limit did: `max_new_tokens`, or the positions of the base."""


def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    entry: Entry | Route = None,
    *,
    max_new_tokens: int = 32,
    stop_ids: Collection[int] = (),
    sampling: Sampling = GREEDY,
    use_cache: bool = True,
) -> list[list[int]]:
    """New token ids of each prompt, without the stop id that ended them. Raises what `stream` raises."""
    options: Any = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids, "sampling": sampling}
    return [answer.ids for answer in _whole(base, prompts, entry, use_cache=use_cache, **options)]


def stream(
    base: Base,
    prompts: Sequence[Sequence[int]],
    entry: Entry | Route = None,
    *,
    max_new_tokens: int = 32,
    stop_ids: Collection[int] = (),
    sampling: Sampling = GREEDY,
    use_cache: bool = True,
    max_positions: int | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """One list for each step: (row, token) of every row that has not ended. A row ends with its stop id, which is
    given too, or at a limit.

    `max_positions` bounds a row and its answer together where the base's own position table does not. `numbers` are
    the rows' numbers for sampling, by default their places. Without a cache every step reads the whole row again:
    slower, and the reference that the cache is tested against. Raises `UsageError` for encoders and for empty prompts,
    `RouteError` for a prompt that exceeds the positions.
    """
    if base.family.kind == "encoder":
        raise UsageError(f"{base.name} is an encoder, which does not generate")
    if not prompts or not all(prompts):
        raise UsageError("every prompt needs at least one token")
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens is {max_new_tokens}, it must be 0 or more")
    route = entry if isinstance(entry, Route) else Route.all(entry)
    if route.size not in (None, len(prompts)):
        raise RouteError(f"{len(prompts)} prompts, the route is for {route.size} rows")
    limits = [min(max_new_tokens, room) for room in _room(base, prompts, route, max_positions)]
    chooser = Chooser(sampling, prompts, range(len(prompts)) if numbers is None else numbers)
    return _stream(base, prompts, route, limits, frozenset(stop_ids), chooser, use_cache)


def answer_all(
    base: Base,
    prompts: Sequence[Sequence[int]],
    entry: Entry = None,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 256,
    stop_ids: Collection[int] = (),
    sampling: Sampling = GREEDY,
    max_positions: int | None = None,
    progress: Callable[[float], None] | None = None,
    finished: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """The answer to each prompt, in the order given. Prompts of like length share a batch, the longest first.

    Where memory runs out, batches of half the size go on; `ResourceError` when one row alone does not fit. `progress`
    is called with the share that is done, 0 to 1, and `finished` with each prompt's place and answer, batch by batch.
    Raises what `stream` raises.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, it must be 1 or more")
    waiting = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    answers: dict[int, Answer] = {}
    options: Any = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids, "sampling": sampling}
    most = 0.0

    def tell(share: float) -> None:
        nonlocal most
        most = max(most, (len(answers) + share) / len(prompts))
        if progress is not None:
            progress(most)

    while waiting:
        rows = waiting[:batch_size]
        given = [prompts[row] for row in rows]
        found: list[Answer] | None = None
        try:
            found = _whole(base, given, entry, tell, numbers=rows, max_positions=max_positions, **options)
        except (RuntimeError, MemoryError) as error:
            if not is_memory(error):
                raise
        if found is None:  # outside the handler, which keeps the tensors of the failed pass alive
            batch_size = _halved(base, len(rows), len(given[0]))
            continue
        answers |= dict(zip(rows, found, strict=True))
        waiting = waiting[len(rows) :]
        if finished is not None:
            for row in rows:
                finished(row, answers[row])
        tell(0.0)
    return [answers[row] for row in range(len(prompts))]


def _whole(
    base: Base,
    prompts: Sequence[Sequence[int]],
    entry: Entry | Route,
    tell: Callable[[float], None] | None = None,
    **options: Any,
) -> list[Answer]:
    """Every answer of one batch. `tell` gets the rows that are done, parts of rows that go on included."""
    stop = frozenset(options["stop_ids"])
    ids: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for step, tokens in enumerate(stream(base, prompts, entry, **options)):
        for row, token in tokens:
            if token in stop:
                ended[row] = True
            else:
                ids[row].append(token)
        if tell is not None:
            tell(len(prompts) - len(tokens) * (1 - (step + 1) / options["max_new_tokens"]))
    return [Answer(row, end) for row, end in zip(ids, ended, strict=True)]


def _halved(base: Base, rows: int, longest: int) -> int:
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
    if rows == 1:
        raise ResourceError(f"out of memory with one prompt of {longest:,} tokens", "shorten it, or use a smaller base")
    return rows // 2


def positions_taken(base: Base, names: Sequence[str]) -> int:
    """Positions of a row that its adapters take: virtual tokens, and attended ones."""
    adapters = [adapter_of(base, name) for name in names]
    virtual = sum(part.positions for adapter in adapters for part in adapter.virtual_parts())
    return virtual + sum(adapter.positions for adapter in adapters)


def _room(base: Base, prompts: Sequence[Sequence[int]], route: Route, max_positions: int | None) -> list[int]:
    """How many tokens each row can get: the last one of an answer is never read, so it takes no position."""
    if base.family.kind == "encoder-decoder":
        return [max_positions or 2**31] * len(prompts)
    limits = [limit for limit in (base.max_positions, max_positions) if limit is not None]
    if not limits:
        return [2**31] * len(prompts)
    taken = {names: positions_taken(base, names) for names in route.stacks}
    room = []
    for row, prompt in enumerate(prompts):
        used = taken[route.row(row)]
        room.append(min(limits) - used - len(prompt) + 1)
        if room[-1] < 1:
            virtual_ones = f" and {used} virtual ones" if used else ""
            raise RouteError(
                f"a prompt of {len(prompt)} tokens{virtual_ones} exceeds the {min(limits)} positions of {base.name}",
                f"shorten it to {max(min(limits) - used, 0)} tokens",
            )
    return room


def _stream(
    base: Base,
    prompts: Sequence[Sequence[int]],
    route: Route,
    limits: list[int],
    stop: frozenset[int],
    chooser: Chooser,
    use_cache: bool,
) -> Iterator[list[tuple[int, int]]]:
    if max(limits) == 0:
        return
    base.model.eval()
    kind = PairDecoder if base.family.kind == "encoder-decoder" else Decoder
    firsts, reader = _distinct(prompts, route)
    first = route if len(firsts) == len(prompts) else route.select(firsts)
    with torch.no_grad(), base.route(first):
        decoder = kind(base, [prompts[row] for row in firsts], first, use_cache)
    rows = list(range(len(prompts)))  # their numbers, for each place in the decoder's batch
    going = [True] * len(prompts)
    for step in range(max(limits)):
        # Route and mode are those of one step: the caller's own are back whenever it has the tokens.
        with torch.no_grad(), base.route(decoder.route):
            scores = decoder.scores()
            chosen = chooser.choose(scores if len(scores) == len(rows) else scores[reader])
        tokens = chosen.tolist()
        yield [(row, token) for row, token, goes in zip(rows, tokens, going, strict=True) if goes]
        going = [
            goes and token not in stop and step + 1 < limits[row]
            for row, token, goes in zip(rows, tokens, going, strict=True)
        ]
        if not any(going):
            return
        if len(firsts) < len(prompts) and step == 0:
            decoder.add(chosen[firsts], torch.ones(len(firsts), dtype=torch.bool, device=base.device))
            places = [place for place, goes in enumerate(going) if goes]
            decoder.keep([reader[place] for place in places])
            decoder.ids[:, -1] = chosen[places]
            chooser.keep(places)
            rows, going = [rows[place] for place in places], [True] * len(places)
            continue
        decoder.add(chosen, torch.tensor(going, device=base.device))
        if going.count(False) * _SHARE >= (len(going) if use_cache else 1):
            places = [place for place, goes in enumerate(going) if goes]
            decoder.keep(places)
            chooser.keep(places)
            rows, going = [rows[place] for place in places], [True] * len(places)


def _distinct(prompts: Sequence[Sequence[int]], route: Route) -> tuple[list[int], list[int]]:
    """Rows that differ in prompt or way, and for each row its place among these: eight answers to one prompt read it
    once."""
    places: dict[Any, int] = {}
    reader = [places.setdefault((route.row(row), *prompt), len(places)) for row, prompt in enumerate(prompts)]
    return [reader.index(place) for place in range(len(places))], reader
