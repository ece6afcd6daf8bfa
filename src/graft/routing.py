"""The route of a batch: which adapters each of its rows goes through.

A `Route` is immutable. It is set for a stretch of code with `Router.use`; the hooks that carry an
adapter's parts read it there, take the rows that are theirs and leave the others alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from graft.errors import RouteError

Entry = str | tuple[str, ...] | None
"""What one row goes through: an adapter, adapters in order, or None for the plain base."""

P = TypeVar("P")

Rows = slice | Tensor | None
"""Rows of a batch: neighbours as a slice, others as an index tensor, all as None."""


class Named(Protocol):
    """A place with a name. Its name is read only for an error: compiled code would make a graph for each name."""

    @property
    def name(self) -> str:
        """The name."""


@dataclass(frozen=True, eq=False)
class Route:
    """Adapters per row.

    A uniform route (`Route.all`) sends every row the same way and fits any batch. A route by rows
    (`Route.of`) knows its batch size, and every site checks it: beams, flattened tokens of a mixture
    of experts and packed rows change what dimension 0 means.
    """

    uniform: tuple[str, ...] | None
    entries: tuple[tuple[str, ...], ...] = ()
    groups: tuple[tuple[tuple[str, ...], Tensor], ...] = ()
    inverse: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    stacked: bool = False
    """Whether a row goes through several adapters."""

    @classmethod
    def all(cls, entry: Entry) -> "Route":
        """Every row through `entry`."""
        return cls(uniform=_names(entry))

    @classmethod
    def of(cls, entries: Sequence[Entry], device: torch.device | str = "cpu") -> "Route":
        """Row i through `entries[i]`."""
        rows = tuple(_names(entry) for entry in entries)
        if not rows:
            raise RouteError("a route by rows needs at least one row")
        groups = tuple(
            (names, torch.tensor([i for i, row in enumerate(rows) if row == names], device=device))
            for names in dict.fromkeys(rows)
        )
        inverse = torch.cat([index for _, index in groups]).argsort()
        return cls(None, rows, groups, inverse, stacked=any(len(row) > 1 for row in rows))

    @property
    def size(self) -> int | None:
        """The batch size this route is for; None when it fits any."""
        return len(self.entries) if self.uniform is None else None

    @property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """The distinct ways through the adapters, in order of first use."""
        return (self.uniform,) if self.uniform is not None else tuple(names for names, _ in self.groups)

    def names(self) -> tuple[str, ...]:
        """Every adapter used, in order of first use."""
        return tuple(dict.fromkeys(name for stack in self.stacks for name in stack))

    def row(self, index: int) -> tuple[str, ...]:
        """The adapters of one row."""
        return self.uniform if self.uniform is not None else self.entries[index]

    def select(self, rows: Sequence[int]) -> "Route":
        """The route of some rows of this batch, in the given order."""
        if self.uniform is not None:
            return self
        return Route.of([self.entries[row] for row in rows], self.inverse.device)

    def check(self, size: int, where: "Named") -> None:
        """Raise `RouteError` when `size` rows arrive at `where` and the route is for another number."""
        if self.uniform is None and size != len(self.entries):
            raise RouteError(
                f"{where.name} got {size} rows, the route is for {len(self.entries)}",
                "beams, packed rows and flattened experts need a route of their own",
            )


def _names(entry: Entry) -> tuple[str, ...]:
    if entry is None:
        return ()
    names = (entry,) if isinstance(entry, str) else tuple(entry)
    if len(set(names)) != len(names):
        raise RouteError(f"an adapter stands twice in {names}")
    return names


class Router:
    """Holds the current route of one base model, and the order of its adapters."""

    def __init__(self) -> None:
        self.current: Route | None = None
        self.order: list[str] = []
        self.table: Tensor | None = None

    @contextmanager
    def use(self, route: Route) -> Iterator[None]:
        """Make `route` current; the one before comes back afterwards."""
        unknown = [name for name in route.names() if name not in self.order]
        if unknown:
            raise RouteError(f"no adapter {unknown[0]!r} is attached", f"attached: {self.order or 'none'}")
        before = self.current, self.table
        self.current, self.table = route, self._table(route)
        try:
            yield
        finally:
            self.current, self.table = before

    def require(self) -> Route:
        """The current route; an error when none is set, since a silent default would hide an adapter."""
        if self.current is None:
            raise RouteError(
                "adapters are attached but no route is set",
                'call the model inside `with base.route("NAME"):` (None for the plain base)',
            )
        return self.current

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` of `torch.utils.checkpoint`: the recomputation runs under the route of its forward
        pass. Under another route the gradients are wrong without an error (by a factor of 3.3 in a trial)."""
        route = self.current
        return nullcontext(), nullcontext() if route is None else self.use(route)

    def _table(self, route: Route) -> Tensor | None:
        """Which adapter each row has, bool [adapters, rows], for compiled graphs; None when uniform."""
        if route.uniform is not None:
            return None
        rows = [[name in entry for entry in route.entries] for name in self.order]
        return torch.tensor(rows, dtype=torch.bool, device=route.inverse.device).view(-1, len(route.entries))


class Tenants(dict[str, P]):
    """The parts at one place, by adapter, and how the rows of the route that was last here are divided among them."""

    def __init__(self) -> None:
        super().__init__()
        self.route: Route | None = None
        self.shares: tuple[tuple[list[P], Rows], ...] = ()
        self.changes = 0
        """How often a part came or left."""
        self.inverse: Tensor | None = None
        """What puts the rows of all shares, one after another, into the order of the batch; None: they are in it."""

    def __setitem__(self, name: str, part: P) -> None:
        self.route = None
        self.changes += 1
        super().__setitem__(name, part)

    def leave(self, name: str) -> None:
        """Take the part of adapter `name` away, if it has one here."""
        self.route = None
        self.changes += 1
        self.pop(name, None)

    def divide(self, route: Route) -> tuple[tuple[list[P], Rows], ...]:
        """The parts of each row of a route by rows, and the rows that have the same ones: those of adapters that have
        no part here are one share."""
        if self.route is route:
            return self.shares
        rows: dict[tuple[str, ...], list[int]] = {}
        for index, names in enumerate(route.entries):
            rows.setdefault(tuple(name for name in names if name in self), []).append(index)
        self.shares = tuple(([self[name] for name in names], index_of(found, route)) for names, found in rows.items())
        order = [index for found in rows.values() for index in found]
        sorted_already = order == list(range(len(order)))
        device = route.inverse.device
        self.inverse = None if sorted_already else torch.tensor(order, device=device).argsort()
        self.route = route
        return self.shares


def index_of(rows: list[int], route: Route) -> Rows:
    """Some rows of a route, in order, as `Rows`."""
    if len(rows) == len(route.entries):
        return None
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=route.inverse.device)


def take(tensor: Tensor, rows: Rows) -> Tensor:
    """The rows of a tensor [B, …]; a tensor [1, …] that stands for all rows is returned as it is. Neighbours are a
    view, which costs nothing."""
    if rows is None or tensor.shape[0] == 1:
        return tensor
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _count(rows: slice | Tensor) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else int(rows.shape[0])


def by_rows(
    router: Router,
    parts: Tenants[P],
    plain: Callable[[Rows], Tensor],
    adapted: Callable[[list[P], Rows], Tensor],
    size: int,
    where: Named,
) -> Tensor:
    """Run each group of rows through its own parts and put the rows back in order.

    `plain(rows)` gives the result [len(rows), …] of rows without parts here, `adapted(chain, rows)` of
    rows with the parts `chain`. `size` is the batch size seen at the site `where`. Rows of one adapter that are
    neighbours are cheapest: they are neither gathered nor put back.
    """
    route = router.require()
    if not parts:  # what all of them do was done as one product
        return plain(None)
    if route.uniform is not None:
        chain = [parts[name] for name in route.uniform if name in parts]
        return adapted(chain, None) if chain else plain(None)
    if torch.compiler.is_compiling():
        return _by_mask(router, route, parts, plain, adapted, size)
    route.check(size, where)
    pieces = []
    for chain, rows in parts.divide(route):
        piece = adapted(chain, rows) if chain else plain(rows)
        if rows is None:
            return piece
        count = _count(rows)
        pieces.append(piece if piece.shape[0] == count else piece.expand(count, *piece.shape[1:]))
    whole = torch.cat(pieces)
    return whole if parts.inverse is None else whole.index_select(0, parts.inverse)


def _by_mask(
    router: Router,
    route: Route,
    parts: Mapping[str, P],
    plain: Callable[[Rows], Tensor],
    adapted: Callable[[list[P], Rows], Tensor],
    size: int,
) -> Tensor:
    """The same in a form whose graph does not depend on which row goes where.

    Index tensors of changing lengths make a new graph for every pattern of rows; after eight torch stops
    compiling. Here every adapter runs on all rows, in a fixed order, and a mask keeps its own.
    """
    if router.table is None or route.stacked:
        raise RouteError("stacked adapters on some rows of a batch cannot be compiled", "route all rows alike")
    if size != router.table.shape[1]:
        raise RouteError("a compiled site got another number of rows than the route is for")
    result = plain(None)
    for position, name in enumerate(router.order):
        if name in parts:
            mask = router.table[position].view(-1, *([1] * (result.dim() - 1)))
            result = torch.where(mask, adapted([parts[name]], None), result)
    return result
