"""The parts of several adapters at one place as one product, where rows of a batch go through different ones.

Rows of one adapter are laid together in groups of equal size, and one batched product takes every group through the
matrices of its own adapter: no row meets another's. A product for each adapter costs as many calls, and calls cost more
than arithmetic where rows have few tokens. Ranks may differ: smaller ones are filled up with zeros. It takes as much
memory again as the adapters in use.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graft.parts.base import Form, Part, at_dtype_of
from graft.routing import Named, Route, Rows, Tenants, index_of

FEW = 1024
"""Tokens of a batch up to which parts are stacked. Beyond it arithmetic counts, and the copies of all rows in fp32 take
memory."""
_READING = 1.5
"""What reading the matrices of one more group costs, in rows of a group (measured at ranks 8 and 32, width 576)."""


class Watch:
    """Whether parts are what they were: which are here, their tensors (the same ones, not written to) and settings.

    A write through `tensor.data` leaves no trace in PyTorch, and is not seen.
    """

    def __init__(self, here: Tenants[Part], parts: list[Part], host: nn.Module) -> None:
        self.here, self.changes = here, here.changes
        modules = [module for part in parts for module in part.modules()]
        modules += [host] if any(part.reads_weight for part in parts) else []
        held = [values for module in modules for values in (module._parameters, module._buffers)]
        tensors = [(values, key, value) for values in held for key, value in values.items() if value is not None]
        # Keeps the memory of values that `.to()` replaces, or the next ones could stand at the same address.
        self.memory = [tensor.detach() for _, _, tensor in tensors]
        self.unwritten = not any(tensor.is_inference() for _, _, tensor in tensors)
        """Whether writes can be seen at all: tensors made in inference mode do not count them."""
        self.tensors = [
            (values, key, tensor, tensor._version, tensor.data_ptr())
            for values, key, tensor in (tensors if self.unwritten else [])
        ]
        self.settings = [
            (vars(part), key, value)
            for part in parts
            for key, value in vars(part).items()
            if isinstance(value, (bool, int, float))
        ]

    def holds(self) -> bool:
        """Whether nothing changed."""
        if self.here.changes != self.changes:
            return False
        for values, key, tensor, version, address in self.tensors:
            if values.get(key) is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return False
        return all(values.get(key) is value for values, key, value in self.settings)


class Layer(NamedTuple):
    """Forms of one function, of n adapters: down [n, d, r], up [n, r, d_out], bias [n, 1, r]."""

    down: Tensor
    up: Tensor
    bias: Tensor | None
    owner: dict[int, int]
    """Where each adapter, by its number, stands among them."""
    function: nn.Module | None
    sees_output: bool


class Seating:
    """The rows of one route that go through a layer, in groups [g, k], and the matrices of each group."""

    def __init__(self, layer: Layer, numbers: Sequence[int], route: Route) -> None:
        """`numbers` has the adapter of each row of the route."""
        places: dict[int, list[int]] = {}
        for row, number in enumerate(numbers):
            if number in layer.owner:
                places.setdefault(layer.owner[number], []).append(row)
        size = _group_size([len(rows) for rows in places.values()])
        groups = [(one, rows[at : at + size]) for one, rows in places.items() for at in range(0, len(rows), size)]
        device = layer.down.device
        self.function, self.sees_output, self.groups = layer.function, layer.sees_output, len(groups)
        owners = [one for one, _ in groups]
        self.down, self.up, self.bias = layer.down, layer.up, layer.bias
        if owners != list(range(len(layer.down))):
            chosen = torch.tensor(owners, dtype=torch.long, device=device)
            self.down, self.up = layer.down[chosen], layer.up[chosen]
            self.bias = None if layer.bias is None else layer.bias[chosen]
        seats = [row for _, rows in groups for row in rows + rows[-1:] * (size - len(rows))]
        own = sorted({*seats})
        self.rows: Rows = index_of(own, route) if own else slice(0, 0)
        """The rows of the batch that are seated here."""
        self.gather = None if seats == list(range(len(numbers))) else torch.tensor(seats, device=device)
        back = [seats.index(row) for row in own]
        self.back = None if back == list(range(len(seats))) else torch.tensor(back, device=device)

    def add(self, h: Tensor, result: Tensor) -> Tensor:
        """result [B, S, d_out] and what the groups make of h [B, S, d], in the layer's number format."""
        if not self.groups:
            return result
        tokens = h.shape[1]
        h = at_dtype_of(h if self.gather is None else h.index_select(0, self.gather), self.down)
        h = h.reshape(self.groups, -1, h.shape[-1])
        low = torch.bmm(h, self.down) if self.bias is None else torch.baddbmm(self.bias, h, self.down)
        if self.function is not None:
            low = self.function(low)
        if self.gather is None:
            seen = result.to(low.dtype)
            return torch.baddbmm(seen.reshape(self.groups, -1, seen.shape[-1]), low, self.up).view(seen.shape)
        change = torch.bmm(low, self.up).view(len(self.gather), tokens, -1)
        if self.back is not None:
            change = change.index_select(0, self.back)
        if self.rows is None:
            return result + change
        if isinstance(self.rows, slice):
            result = result.to(low.dtype, copy=True)
            result[self.rows] += change
            return result
        return result.to(low.dtype).index_add(0, self.rows, change)


class Stack:
    """The forms of some adapters in one, and their rows of one route."""

    def __init__(self, forms: dict[str, Form]) -> None:
        self.names = {name: number for number, name in enumerate(forms)}
        kinds: dict[tuple[str, bool], list[tuple[int, Form]]] = {}
        for number, form in enumerate(forms.values()):
            if form.down is not None:
                kinds.setdefault((repr(form.function), form.sees_output), []).append((number, form))
        self.layers = [_layer(kind) for kind in kinds.values()]
        self.factor = _table([form.factor for form in forms.values()], 1.0)
        self.shift = _table([form.shift for form in forms.values()], 0.0)
        self.seatings: list[Seating] = []
        self.row_factor: Tensor | None = None
        self.row_shift: Tensor | None = None

    def seat(self, route: Route) -> None:
        """Take the rows of a route; those of other adapters come out as they went in."""
        numbers = [self.names.get(entry[0], len(self.names)) if entry else len(self.names) for entry in route.entries]
        rows = torch.tensor(numbers, device=route.inverse.device)
        self.seatings = [Seating(layer, numbers, route) for layer in self.layers]
        self.row_factor = None if self.factor is None else self.factor[rows][:, None]
        self.row_shift = None if self.shift is None else self.shift[rows][:, None]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, S, d_in], y [B, S, d_out] -> [B, S, d_out]."""
        result = y if self.row_factor is None else y * self.row_factor
        if self.row_shift is not None:
            result = result + self.row_shift
        for seating in self.seatings:
            result = seating.add(y if seating.sees_output else x, result)
        return result.to(y.dtype)


class Stacks:
    """The parts at one place that run as one product under the present route, made when they are first needed."""

    def __init__(self, parts: Tenants[Part], host: nn.Module) -> None:
        self.parts = parts
        self.host = host
        self.route: Route | None = None
        self.stack: Stack | None = None
        self.rest: Tenants[Part] = parts
        self.watch: Watch | None = None

    def apply(self, route: Route, x: Tensor, y: Tensor, where: Named) -> tuple[Tensor, Tenants[Part]]:
        """y [B, S, d_out] with what the stacked parts do to their rows of it, and the parts that run one by one.

        Only where no gradient is wanted and the batch has few tokens: in training every part has its own product.
        """
        if route.uniform is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return y, self.parts
        if route.stacked or type(x) is not Tensor or x.dim() != 3 or x.shape[0] != y.shape[0]:
            return y, self.parts
        if x.shape[0] * x.shape[1] > FEW:
            return y, self.parts
        if self.route is not route or self.watch is None or not self.watch.holds():
            route.check(x.shape[0], where)
            self._prepare(route)
        return (y, self.parts) if self.stack is None else (self.stack(x, y), self.rest)

    def _prepare(self, route: Route) -> None:
        names = [name for name in self.parts if name in route.names()]
        if not self._serves(names):
            chosen = [self.parts[name] for name in names]
            self.watch = Watch(self.parts, chosen, self.host)
            forms = dict(_forms(names, chosen)) if self.watch.unwritten else {}
            self.stack = Stack(forms) if forms else None
        if self.stack is not None:
            self.stack.seat(route)
            self.rest = Tenants()
            for name in names:
                if name not in self.stack.names:
                    self.rest[name] = self.parts[name]
        self.route = route

    def _serves(self, names: list[str]) -> bool:
        """Whether the stack that is there can go on: no other adapter is needed, and half of its own are, or more."""
        if self.stack is None or self.watch is None or not self.watch.holds():
            return False
        known = [name for name in names if name in self.stack.names]
        alone = [name for name in names if name not in self.stack.names]
        return 2 * len(known) >= len(self.stack.names) and not any(can_stack(self.parts[name]) for name in alone)


class Fronts:
    """The keys and values that some rows of a batch have in front of their own, at one attention, for one product."""

    def __init__(self, parts: Tenants[Part]) -> None:
        self.parts = parts
        self.route: Route | None = None
        self.watch: Watch | None = None
        self.joined: tuple[Tensor, Tensor, Tensor] | None = None

    def of(self, route: Route) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys and values [B, kv_heads, n, d], zeros in front of rows that have fewer, and which ones a row sees
        [B, 1, 1, n]. None where rows attend each in their own way, all in one way, or a gradient is wanted.
        """
        if route.uniform is not None or torch.is_grad_enabled() or torch.compiler.is_compiling() or route.stacked:
            return None
        if self.route is not route or self.watch is None or not self.watch.holds():
            names = [name for name in self.parts if name in route.names()]
            chosen = [self.parts[name] for name in names]
            self.route, self.watch = route, Watch(self.parts, chosen, nn.Module())
            self.joined = _in_front(route, names, chosen) if self.watch.unwritten else None
        return self.joined


def _in_front(route: Route, names: list[str], parts: list[Part]) -> tuple[Tensor, Tensor, Tensor] | None:
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, part in zip(names, parts, strict=True):
        front = part.front() if issubclass(_writer(part, "front"), _writer(part, "attend")) else None
        if front is None:
            return None
        found[name] = front
    if not found:
        return None
    longest = max(keys.shape[1] for keys, _ in found.values())
    heads, _, width = next(iter(found.values()))[0].shape
    like = next(iter(found.values()))[0]
    both = like.new_zeros(2, len(route.entries), heads, longest, width)
    seen = torch.zeros(len(route.entries), 1, 1, longest, dtype=torch.bool, device=like.device)
    for row, entry in enumerate(route.entries):
        for name in entry:
            if name in found:
                count = found[name][0].shape[1]
                both[0, row, :, longest - count :], both[1, row, :, longest - count :] = found[name]
                seen[row, ..., longest - count :] = True
    return both[0], both[1], seen


def _forms(names: list[str], parts: list[Part]) -> Iterator[tuple[str, Form]]:
    """The forms of the parts that have one."""
    for name, part in zip(names, parts, strict=True):
        form = part.form() if can_stack(part) else None
        if form is not None:
            yield name, form


def can_stack(part: Part) -> bool:
    """Whether `form` was written for what the part computes, not for a class above it, and the part is not in
    training, where dropout may act."""
    ways = [way for way in ("before", "after") if part.does(way)]
    return not part.training and len(ways) == 1 and issubclass(_writer(part, "form"), _writer(part, ways[0]))


def _writer(part: Part, name: str) -> type:
    return next(cls for cls in type(part).__mro__ if name in vars(cls))


def _layer(forms: list[tuple[int, Form]]) -> Layer:
    first = forms[0][1]
    rank = max(len(form.down) for _, form in forms if form.down is not None)
    down, up, bias = [], [], []
    for _, form in forms:
        assert form.down is not None
        assert form.up is not None
        room = (0, rank - len(form.down))
        down.append(F.pad(form.down.T, room))
        up.append(F.pad(form.up, room).T)
        bias.append(F.pad(form.down.new_zeros(len(form.down)) if form.bias is None else form.bias, room)[None])
    biased = any(form.bias is not None for _, form in forms)
    owner = {number: place for place, (number, _) in enumerate(forms)}
    return Layer(
        torch.stack(down), torch.stack(up), torch.stack(bias) if biased else None, owner, first.function,
        first.sees_output,
    )  # fmt: skip


def _group_size(counts: Sequence[int]) -> int:
    """The number of rows in a group that makes groups of so many rows of each adapter cheapest: too large a one is
    filled with rows that count for nothing, too small a one reads the same matrices several times."""

    def cost(size: int) -> float:
        return sum(-(-count // size) for count in counts) * (size + _READING)

    return min(sorted({1, 2, 4, 8, 16, 32, *counts}), key=cost)


def _table(vectors: list[Tensor | None], neutral: float) -> Tensor | None:
    """[n + 1, d]: the vector of each form, then one for the rows of other adapters; None when no form has one."""
    like = next((vector for vector in vectors if vector is not None), None)
    if like is None:
        return None
    neutral_one = torch.full_like(like, neutral)
    return torch.stack([*(neutral_one if vector is None else vector for vector in vectors), neutral_one])
