"""Parts and adapters: what a method puts at one site, and a named set of them."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graft.errors import NotMergeable, UsageError
from graft.routing import Named
from graft.sites import Site

Core = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention as (q, k, v, mask) -> out: q [B, heads, S, d], k and v [B, kv_heads, T, d], mask bool or additive
[B or 1, 1 or heads, S, T] (None: everything is seen), out [B, S, heads, d]."""


@dataclass(frozen=True)
class Form:
    """What a part computes without dropout, as y∘factor + shift + up·f(down·h + bias), with h = x, or y where it
    `sees_output`. What is None is left out: factor 1, the others 0, f the identity."""

    down: Tensor | None = None
    """[r, d_in], or [r, d_out] where the output is seen."""
    up: Tensor | None = None
    """[d_out, r], the part's scale in it."""
    bias: Tensor | None = None
    """[r]."""
    function: nn.Module | None = None
    """f, number by number; two that print alike compute the same."""
    sees_output: bool = False
    factor: Tensor | None = None
    """[d_out]."""
    shift: Tensor | None = None
    """[d_out]."""


class Part(nn.Module):
    """What a method puts at one site. A subclass overrides what it needs of `before`, `after`, `attend`, `virtual` and
    `own`.

    Routing is done around it: a part is called with its own rows only.
    """

    positions: int = 0
    """Positions that this part's attended or input tokens take before a row's first token."""

    pool_virtual: bool = False
    """Whether a pooler reads the first virtual token rather than the row's first own token."""

    cuts_rows: bool = False
    """Whether this part's attention is one of pieces of a row: it then comes after all others, and sees their keys."""

    reads_weight: ClassVar[bool] = False
    """Whether the result depends on the host's weight or bias itself, not only on its output: such a part cannot be
    merged after another one that changed them."""

    graphs: int = 1
    """Graphs that compiled code makes of this part: it is called in so many ways."""

    def before(self, x: Tensor) -> Tensor:
        """The input [B, S, d_in] to use instead of x. What other parts see as the site's input is the new one."""
        raise NotImplementedError

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The output [B, S, d_out] to use instead of y, from the site's input x [B, S, d_in] and output y."""
        raise NotImplementedError

    def attend(self, core: Core, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention [B, S, heads, d] through `core`, with other keys, values or mask."""
        raise NotImplementedError

    def front(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values [kv_heads, n, d] where `attend` only puts these in front of the row's own, so that rows of
        several adapters can attend at once; None where it does more, or where they are not made of the part's own
        tensors."""
        return None

    def virtual(self) -> Tensor:
        """Virtual tokens [n, d] put before the embedded row."""
        raise NotImplementedError

    def own(self) -> dict[str, Tensor]:
        """Values that replace the host's tensors for this part's rows, by the host's own names."""
        raise NotImplementedError

    def form(self) -> Form | None:
        """What `after` (or `before`, with y = x) computes, as a `Form`, so that the parts of several adapters at a
        site run as one product; None where it has none. A subclass that computes otherwise gives its own."""
        return None

    def merge(self, site: Site) -> dict[str, Tensor]:
        """New host tensors by path, such that the base alone computes what the attached part computes.

        Raises `NotMergeable` with the reason; most parts that are not linear in the site's input do.
        """
        raise NotMergeable(f"{type(self).__name__} at {site.name} computes what no weight of the base can")

    def does(self, name: str) -> bool:
        """Whether this part overrides one of the methods above."""
        return getattr(type(self), name) is not getattr(Part, name)


class Adapter(nn.Module):
    """A named set of parts on one base, what they share, and a task head.

    `exclusive` adapters train the base's tensors in place: their parts hold the base's own parameters.
    """

    def __init__(
        self,
        name: str,
        method: Named,
        placed: list[tuple[Site, Part]],
        shared: nn.Module | None = None,
        exclusive: bool = False,
    ) -> None:
        super().__init__()
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise UsageError(f"adapter name {name!r}: letters, digits, '-' and '_' only, at most 64")
        self.name = name
        self.method = method
        self.placed = placed
        self.parts = nn.ModuleList(part for _, part in placed)  # so that .to(), .train() and .eval() reach them
        self.shared = shared
        self.head: nn.Module | None = None
        self.exclusive = exclusive

    def tensors(self) -> dict[str, Tensor]:
        """Everything the adapter holds, by stable names: `<site>.<tensor>`, `shared.<tensor>`, `head.<tensor>`."""
        return {name: tensor.detach() for name, tensor in self.named_tensors()}

    def named_tensors(self, head: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Like `tensors`, with the live parameters and buffers; one that several sites share comes once, those of
        the task head only with `head`."""
        modules: list[tuple[str, nn.Module]] = [(site.name, part) for site, part in self.placed]
        others = {"shared": self.shared, "head": self.head if head else None}
        modules += [(name, module) for name, module in others.items() if module]
        seen: set[int] = set()
        for prefix, module in modules:
            for name, tensor in _tensors(module):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{prefix}.{name}", tensor

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that train, by name."""
        return [
            (name, tensor)
            for name, tensor in self.named_tensors()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        ]

    def trainable_count(self) -> int:
        """Number of trainable parameters, head included."""
        return sum(parameter.numel() for _, parameter in self.trainable())

    @property
    def positions(self) -> int:
        """Positions that attended tokens (a prefix) take before each row; virtual input tokens are not counted."""
        return max((part.positions for _, part in self.placed if part.does("attend")), default=0)

    def virtual_parts(self) -> list[Part]:
        """The parts that give virtual input tokens."""
        return [part for _, part in self.placed if part.does("virtual")]


def at_dtype_of(x: Tensor, weight: Tensor) -> Tensor:
    """x as a matrix product with `weight` needs it; autocast chooses by itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    kept = module.state_dict().keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in kept)
