"""What is alive: the storages of all tensors while code runs, by kind, and the operations that made them.

The same observer watches a real step and a simulated one, so that the two can be compared to the byte.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

Kind = Literal["weights", "adapter", "gradients", "optimizer", "activations", "logits"]
KINDS: tuple[Kind, ...] = ("weights", "adapter", "gradients", "optimizer", "activations", "logits")


@dataclass(frozen=True)
class Work:
    """What operations of one number format cost: floating-point operations and bytes read and written, each."""

    flops: int
    moved: int
    dtype: torch.dtype


@dataclass
class Peak:
    """The most bytes that were alive at once, by kind."""

    kinds: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.kinds.values())

    def scaled(self, other: "Peak", times: Fraction) -> "Peak":
        """This one and `times` the difference to `other`: what more layers add, from models of a few."""
        return Peak({kind: round(size + times * (size - other.kinds[kind])) for kind, size in self.kinds.items()})


class Live(TorchDispatchMode):
    """Adds up live storages below it, by kind; a storage counts once, however many tensors look at it.

    What is known before (`hold`) keeps its kind. What is made inside is `activations`, or `logits` where its last
    dimension is the vocabulary's, or what `making` says. `vocabulary` 0: nothing is logits.
    """

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary = vocabulary
        self.alive = Peak()
        self.peak = Peak()
        self.peaks: list[Peak] = []
        """The peak within each operation and what came before it since the last."""
        self.works: list[Work] = []
        self.operations: list[str] = []
        self._default: Kind = "activations"
        self._lately = self.peak
        self._known: dict[int, tuple[weakref.ref[Any], Kind, int]] = {}

    def hold(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Count the storages of tensors as `kind`, those already counted too."""
        for tensor in tensors:
            self._see(tensor, kind, move=True)

    @contextmanager
    def making(self, kind: Kind) -> Iterator[None]:
        """What is made inside is of this kind."""
        before, self._default = self._default, kind
        try:
            yield
        finally:
            self._default = before

    def watch_gradients(self, parameters: Iterable[nn.Parameter]) -> list[Any]:
        """Count the gradients of parameters as such, from when they are complete; returns handles to remove."""

        def done(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self._see(parameter.grad, "gradients", move=True)

        return [parameter.register_post_accumulate_grad_hook(done) for parameter in parameters]

    def restart_peak(self) -> None:
        """Forget the peak so far; what is alive stays counted."""
        self.peak = Peak(dict(self.alive.kinds))
        self._lately = self.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and see what it made."""
        if func.namespace == "prim":  # fake tensors are asked where they are, as often as there are operations
            return answer(func, args, kwargs)
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor)]
        fresh = [self._see(tensor, self._kind_of(tensor)) for tensor in made]
        self.peaks.append(self._lately)
        self._lately = Peak(dict(self.alive.kinds))
        self.operations.append(f"{func} {[tuple(tensor.shape) for tensor in made]}")
        work = work_of(func, args, kwargs, result, made, any(fresh))
        if work is not None:
            self.works.append(work)
        return result

    def _kind_of(self, tensor: Tensor) -> Kind:
        scores = self.vocabulary and tensor.dim() and tensor.shape[-1] == self.vocabulary
        return "logits" if scores and self._default == "activations" else self._default

    def _see(self, tensor: Tensor, kind: Kind, move: bool = False) -> bool:
        """Count a tensor's storage; whether it is one that was not known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is not None and known[0]() is not None:
            if move and known[1] != kind:
                self._add(known[1], -known[2])
                self._add(kind, known[2])
                self._known[key] = (known[0], kind, known[2])
            return False
        size = storage.nbytes()
        self._known[key] = (weakref.ref(storage, partial(self._gone, key)), kind, size)
        self._add(kind, size)
        return True

    def _gone(self, key: int, reference: Any) -> None:
        known = self._known.get(key)
        if known is not None and known[0] is reference:
            del self._known[key]
            self._add(known[1], -known[2])

    def _add(self, kind: Kind, size: int) -> None:
        self.alive.kinds[kind] += size
        if size > 0 and (total := self.alive.total) > self._lately.total:
            self._lately = Peak(dict(self.alive.kinds))
            if total > self.peak.total:
                self.peak = self._lately


def answer(func: Any, args: Any, kwargs: Any) -> Any:
    """What a question to a tensor gives, without asking further modes where it is a fake one."""
    if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
        return args[0].fake_device
    return func(*args, **(kwargs or {}))


def _attention_flops(query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    """Operations of torch's fused attention on CPUs, whose formula torch 2.13 does not have."""
    batch, heads, rows, width = query.shape
    return int(4 * batch * heads * rows * key.shape[2] * width)


def _attention_backward_flops(grad: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    return 5 * _attention_flops(query, key) // 2


_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def work_of(func: Any, args: Any, kwargs: Any, result: Any, made: list[Tensor], fresh: bool) -> Work | None:
    """What an operation costs; None for one that only looks at a tensor in another way."""
    given = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)]
    count: Any = flop_registry.get(func.overloadpacket)
    own: Any = _FLOPS.get(func.overloadpacket)
    written = func._schema.is_mutable
    if not (fresh or written) or not (given or made):
        return None
    flops = own(*args, **kwargs) if own is not None else 0
    if count is not None:
        flops = count(*args, **kwargs, out_val=result)
    moved = sum(tensor.numel() * tensor.element_size() for tensor in given + made)
    floats = [tensor.dtype for tensor in given + made if tensor.is_floating_point()]
    return Work(int(flops), moved, floats[0] if floats else torch.int64)
