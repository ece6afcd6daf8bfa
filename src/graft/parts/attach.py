"""Attaching adapters to a base, by hooks; detaching restores it bit for bit.

Parts live as submodules of their hosts (under the name `graft`), so that `.to()`, DDP and FSDP see them;
`Base.state()` leaves them out.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from graft.errors import DamagedError, NotMergeable, RouteError, UsageError, nearest
from graft.model import Base, Hidden
from graft.parts.attention import close_slots, open_slot, slot_at
from graft.parts.base import Adapter, Part
from graft.parts.stacked import Stacks
from graft.parts.tokens import Tokens
from graft.quantize import dequantize, packed_layers
from graft.routing import Entry, Route, Rows, Tenants, by_rows, take
from graft.sites import Site

_HOST = "_graft_host"
_TOKENS = "_graft_tokens"


class Socket:
    """The parts at one site, by adapter, and the input that entered it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.parts: Tenants[Part] = Tenants()
        self.stacks = Stacks(self.parts, site.leave)
        self.x: Tensor | None = None


class Host:
    """The parts of the sites that end in one module, and its hooks.

    Inputs are changed first, then values of a part's own are used, then outputs in the order in which sites were first
    used.
    """

    def __init__(self, base: Base, module: nn.Module, path: str) -> None:
        self.router = base.router
        self.module = module
        self.name = path
        self.shared_by_rows = any(path.endswith(name) for name in base.family.unroutable)
        self.own: Tenants[Part] = Tenants()
        self.before: Tenants[Part] = Tenants()
        self.stacks = Stacks(self.before, module)
        # A list: keys that name the layer would make compiled code a graph for each layer.
        self.after: list[Socket] = []
        self.busy = False
        self.handles: list[Any] = [module.register_forward_hook(self._leave, with_kwargs=True)]
        self.watches_input = False

    def add(self, site: Site, name: str, part: Part) -> None:
        """Put the part of adapter `name` at `site`."""
        if part.does("own"):
            self.own[name] = part
        if part.does("before"):
            if not self.watches_input:  # once for good: a second hook would change the input twice
                self.handles.append(self.module.register_forward_pre_hook(self._enter, with_kwargs=True))
                self.watches_input = True
            self.before[name] = part
        if part.does("after"):
            socket = next((socket for socket in self.after if socket.site is site), None)
            if socket is None:
                socket = Socket(site)
                self.after.append(socket)
                if site.enter is not site.leave:
                    self._watch(socket)
            socket.parts[name] = part

    def drop(self, name: str) -> None:
        """Take the parts of adapter `name` away."""
        self.own.leave(name)
        self.before.leave(name)
        for socket in self.after:
            socket.parts.leave(name)

    @property
    def empty(self) -> bool:
        """Whether no part is left."""
        return not self.own and not self.before and not any(socket.parts for socket in self.after)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()

    def _watch(self, socket: Socket) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            host = module.__dict__.get(_HOST)
            if not (isinstance(host, Host) and host.busy):
                socket.x = _input(args, kwargs)

        self.handles.append(socket.site.enter.register_forward_pre_hook(enter, with_kwargs=True))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.busy or not self.before:
            return None
        x = _input(args, kwargs)

        def adapted(chain: list[Part], rows: Rows) -> Tensor:
            result = take(x, rows)
            for part in chain:
                result = part.before(result).to(x.dtype)
            return result

        plain, parts = self.stacks.apply(self.router.require(), x, x, self)
        new = by_rows(self.router, parts, lambda rows: take(plain, rows), adapted, x.shape[0], self)
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.busy:  # the call below, with a part's own values
            return None
        y = output[0] if isinstance(output, tuple) else output
        if self.own:
            y = self._with_own(y, args, kwargs)
        for socket in self.after:
            if socket.parts:
                x = _input(args, kwargs) if socket.x is None else socket.x
                socket.x = None
                y = self._after(socket, x, y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _after(self, socket: Socket, x: Tensor, y: Tensor) -> Tensor:
        columns = socket.site.columns
        old = y if columns is None else y[..., columns]

        def adapted(chain: list[Part], rows: Rows) -> Tensor:
            inputs, result = take(x, rows), take(old, rows)
            for part in chain:
                result = part.after(inputs, result).to(old.dtype)
            return result

        plain, parts = socket.stacks.apply(self.router.require(), x, old, socket.site)
        new = by_rows(self.router, parts, lambda rows: take(plain, rows), adapted, x.shape[0], socket.site)
        if columns is None:
            return new
        return torch.cat([y[..., : columns.start], new, y[..., columns.stop :]], dim=-1)

    def _with_own(self, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        route = self.router.require()
        if not any(name in self.own for name in route.names()):
            return y
        if route.uniform is None and self.shared_by_rows:
            raise RouteError(
                f"all rows share the output of {self.name}, so rows cannot have values of their own there",
                "route all rows of the batch through one adapter",
            )

        def adapted(chain: list[Part], rows: Rows) -> Tensor:
            hosted = dict(self.module.named_parameters(recurse=False))
            values = {name: value.to(hosted[name].dtype) for part in chain for name, value in part.own().items()}
            inputs = (take(args[0], rows), *args[1:])
            self.busy = True
            try:
                result: Tensor = functional_call(self.module, values, inputs, kwargs).to(y.dtype)
            finally:
                self.busy = False
            return result

        # A table of positions is looked up once for all rows, with a batch dimension of 1.
        size = args[0].shape[0] if args[0].shape[0] != 1 or route.size is None else route.size
        return by_rows(self.router, self.own, lambda rows: take(y, rows), adapted, size, self)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states of a call: Llama passes them to its blocks by keyword."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x


def attach(base: Base, adapter: Adapter) -> None:
    """Put an adapter's parts into the base. Nothing goes through them until a route says so.

    An exclusive adapter, whose parts are the base's own tensors, must be the only one.
    """
    if adapter.name in base.adapters:
        raise UsageError(f"an adapter {adapter.name!r} is attached already", "detach it first, or use another name")
    if base.exclusive is not None or (adapter.exclusive and base.adapters):
        alone = base.exclusive or adapter.name
        raise UsageError(
            f"{alone!r} trains the base in place, so it must be the only adapter",
            "give the method `exclusive: false`",
        )
    if any(base.modules_by_path.get(site.path) is not site.leave for site, _ in adapter.placed):
        raise UsageError(f"{adapter.name!r} was built for another base", "build it, or load it, for this one")
    base.adapters[adapter.name] = adapter
    base.router.order.append(adapter.name)
    if any(tensor.device != base.device for tensor in (*adapter.parameters(), *adapter.buffers())):
        adapter.to(base.device)
    adapter.train(base.model.training)
    _lodge(base.model, f"shared_{adapter.name}", adapter.shared)
    _lodge(base.model, f"head_{adapter.name}", adapter.head)
    if adapter.exclusive:
        base.exclusive = adapter.name
    else:
        for site, part in adapter.placed:
            _place(base, site, adapter.name, part)
    _refresh(base)


def _lodge(host: nn.Module, key: str, module: nn.Module | None) -> None:
    """Make a module part of its host, so that what is done to the host reaches it."""
    if module is None:
        return
    lodging = host._modules.setdefault("graft", nn.ModuleDict())
    assert isinstance(lodging, nn.ModuleDict)
    lodging[key] = module


def _unlodge(host: nn.Module, key: str) -> None:
    lodging = host._modules.get("graft")
    if isinstance(lodging, nn.ModuleDict):
        lodging._modules.pop(key, None)
        if not len(lodging):
            del host._modules["graft"]


def _place(base: Base, site: Site, name: str, part: Part) -> None:
    _lodge(site.leave, f"{site.key}_{name}", part)
    if part.does("own") or part.does("before") or part.does("after"):
        host = site.leave.__dict__.get(_HOST)
        if host is None:
            host = site.leave.__dict__[_HOST] = Host(base, site.leave, site.path)
        host.add(site, name, part)
    if part.does("attend"):
        open_slot(base, site.leave, site.name).parts[name] = part


def detach(base: Base, name: str) -> Adapter:
    """Take an adapter out of the base and return it. The base is then as it was before, bit for bit, except
    after an exclusive adapter: its training is in the base's tensors until the base is loaded again."""
    adapter = adapter_of(base, name)
    del base.adapters[name]
    base.router.order.remove(name)
    if base.exclusive == name:
        base.exclusive = None
    for site, _ in adapter.placed:
        module = site.leave
        host = module.__dict__.get(_HOST)
        if host is not None:
            host.drop(name)
            if host.empty:
                host.remove()
                del module.__dict__[_HOST]
        slot = slot_at(module)
        if slot is not None:
            slot.parts.leave(name)
        _unlodge(module, f"{site.key}_{name}")
    for kind in ("shared", "head"):
        _unlodge(base.model, f"{kind}_{name}")
    close_slots(base)
    _refresh(base)
    return adapter


def _refresh(base: Base) -> None:
    """Set the body's hooks for the adapters that are attached now, and make compiled code see the change."""
    tokens = base.model.__dict__.pop(_TOKENS, None)
    if tokens is not None:
        tokens.remove()
    if base.adapters and base.exclusive is None:
        base.model.__dict__[_TOKENS] = Tokens(base, {name: adapter_of(base, name) for name in base.adapters})
    # torch guards no hooks: code compiled before would go on without the new parts. Each adapter alone, the
    # plain base and mixed batches are graphs of their own; past the limit torch would run eagerly without a word.
    torch._dynamo.reset()
    graphs = sum(max((part.graphs for _, part in adapter_of(base, name).placed), default=1) for name in base.adapters)
    torch._dynamo.config.recompile_limit = max(8, 4 * (len(base.adapters) + 2), 8 + graphs)
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def adapter_of(base: Base, name: str) -> Adapter:
    """The attached adapter of this name."""
    adapter = base.adapters.get(name)
    if not isinstance(adapter, Adapter):
        raise RouteError(f"no adapter {name!r} is attached", nearest(name, base.adapters) if base.adapters else "")
    return adapter


def widest(base: Base, route: Route) -> int:
    """Columns that virtual tokens take before the rows of a batch under `route`, in its key/value cache too."""
    tokens = base.model.__dict__.get(_TOKENS)
    return tokens.width(route) if isinstance(tokens, Tokens) else 0


def hidden_states(base: Base, batch: dict[str, Tensor], entry: Entry | Route) -> Hidden:
    """`Base.hidden` under a route, with rows that need no gradient in a pass of their own.

    In one pass the plain rows of a mixed batch carry the graph of the trained ones: twice the activations.
    """
    route = entry if isinstance(entry, Route) else Route.all(entry)
    trained, still = _split(base, route)
    causal = not any(part.cuts_rows for name in route.names() for _, part in adapter_of(base, name).placed)
    if not (trained and still and torch.is_grad_enabled()):
        with base.route(route):
            return base.hidden(batch, causal)
    with base.route(route.select(trained)):
        first = base.hidden({key: value[trained] for key, value in batch.items()}, causal)
    with base.route(route.select(still)), torch.no_grad():
        second = base.hidden({key: value[still] for key, value in batch.items()}, causal)
    order = torch.tensor([*trained, *still], device=first.last.device).argsort()
    pooled = None
    if first.pooled is not None and second.pooled is not None:
        pooled = torch.cat([first.pooled, second.pooled])[order]
    return Hidden(torch.cat([first.last, second.last])[order], pooled, batch["attention_mask"])


def _split(base: Base, route: Route) -> tuple[list[int], list[int]]:
    trained: list[int] = []
    still: list[int] = []
    if route.size is None:
        return trained, still
    for index in range(route.size):
        adapters = [adapter_of(base, name) for name in route.row(index)]
        (trained if any(adapter.trainable() for adapter in adapters) else still).append(index)
    return trained, still


def merge_into(base: Base, entry: Entry) -> None:
    """Write attached adapters, the one or several of `entry`, into the base's tensors, in place, and detach them: the
    plain base then computes what a row through `entry` did. A quantized base is dequantized for it: the sum of what
    NF4 left of a weight and a change of it is no longer one of 16 levels.

    Raises `NotMergeable` before anything is changed.
    """
    adapters = [adapter_of(base, name) for name in Route.all(entry).names()]
    placed = _in_effect(adapters)
    _check_merge(base, placed)
    for adapter in adapters:
        detach(base, adapter.name)
    dequantize(base)
    own = dict(base.model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for _, site, part in placed:
            for path, value in part.merge(site).items():
                own[path].copy_(value)


_Placed = tuple[Adapter, Site, Part]


def _in_effect(adapters: list[Adapter]) -> list[_Placed]:
    """The parts in the order in which they change a host's tensors, which is that of `Host`: values of a part's own
    come first, then outputs, then inputs, the last of which is next to the weight. Exclusive parts are in the base
    already.
    """

    def turn(position: int, site: Site, part: Part) -> tuple[int, int, int]:
        if part.does("own"):
            return 0, 0, position
        if part.does("after"):
            host: Host = site.leave.__dict__[_HOST]
            return 1, [socket.site for socket in host.after].index(site), position
        return 2, 0, -position

    found = [
        (turn(position, site, part), (adapter, site, part))
        for position, adapter in enumerate(adapters)
        if not adapter.exclusive
        for site, part in adapter.placed
    ]
    return [placed for _, placed in sorted(found, key=lambda item: item[0])]


def _check_merge(base: Base, placed: list[_Placed]) -> None:
    """Raise what forbids to merge: a part that cannot be merged, one that reads a weight which another adapter has
    changed by then, and one tensor of several names that is not changed alike under all of them.
    """
    own = _own_parameters(base)
    changed: dict[str, set[str]] = {}
    tied: dict[tuple[str, int], dict[str, Tensor]] = {}
    for adapter, site, part in placed:
        for path, value in part.merge(site).items():
            if path not in own or own[path][0].shape != value.shape:
                raise DamagedError(f"{site.name} merges into {path}, which the base does not have in that shape")
            parameter, name, names = own[path]
            changed.setdefault(name, set())
            host = name.rpartition(".")[0]
            others = {who for key, by in changed.items() if key.rpartition(".")[0] == host for who in by}
            others -= {adapter.name}
            if part.reads_weight and others:
                raise NotMergeable(
                    f"{adapter.name!r} depends on the base's own {name}, which {min(others)!r} changes before it",
                    "use both attached, or merge one of them",
                )
            changed[name].add(adapter.name)
            if len(names) > 1:
                tied.setdefault((adapter.name, id(parameter)), {})[name] = value
    for (adapter_name, _), values in tied.items():
        name, first = next(iter(values.items()))
        names = own[name][2]
        if len(values) < len(names) or not all(torch.equal(value, first) for value in values.values()):
            other = next(other for other in names if other != name)
            raise NotMergeable(
                f"{name} and {other} are one tensor in {base.name} (tied), and {adapter_name!r} does not change both "
                "alike",
                "use the adapter attached, or adapt other sites",
            )


def _own_parameters(base: Base) -> dict[str, tuple[Tensor, str, list[str]]]:
    """The base's own parameters by every name: the parameter, its first name in the same module, and one name for each
    module that holds it, several when it is tied.
    """
    found = {}
    holders: dict[int, dict[tuple[int, str], str]] = {}
    packed = [(f"{path}.weight", layer.weight) for path, layer in packed_layers(base)]
    for name, parameter in [*base.model.named_parameters(remove_duplicate=False), *packed]:
        if ".graft." in f".{name}":
            continue
        path, _, last = name.rpartition(".")
        holder = id(base.model.get_submodule(path)), last
        found[name] = parameter, holder
        holders.setdefault(id(parameter), {}).setdefault(holder, name)
    return {
        name: (parameter, holders[id(parameter)][holder], list(holders[id(parameter)].values()))
        for name, (parameter, holder) in found.items()
    }
