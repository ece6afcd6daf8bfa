"""A run without its numbers: floating-point tensors that have a shape and no memory, beside real ids and masks.

What a step does depends on its rows (which are padded, where, what is supervised), so those are real; weights and
whatever is computed with them are fake tensors of PyTorch, of any size. Both run through the very code of a real step.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

_aten = torch.ops.aten
_UNFILLED = (_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default)
"""What makes tensors without values, whatever their format: of no use as facts."""
_RANDOM = (_aten.rand, _aten.randn, _aten.randint, _aten.randperm)
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._unsafe_index_put.default)


class _Facts(TorchDispatchMode):
    """Above a `FakeTensorMode`: what is made of whole numbers and truth values alone is computed for real."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation for real where it can be, and as a fake otherwise."""
        kwargs = kwargs or {}
        given = [tensor for tensor in tree_iter((args, kwargs)) if isinstance(tensor, Tensor)]
        fakes = [isinstance(tensor, FakeTensor) for tensor in given]
        if any(fakes):
            return self._fake(func, args, kwargs, all(fakes))
        if func in _UNFILLED or func.overloadpacket in _RANDOM or any(map(torch.is_floating_point, given)):
            return func(*args, **kwargs)
        if not given and not _whole(func(*args, **kwargs)):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        return result if _whole(result) else tree_map_only(Tensor, _like, result)

    def _fake(self, func: Any, args: Any, kwargs: Any, alone: bool) -> Any:
        if func is _aten._local_scalar_dense.default:  # a number that is read: no more than that there is one
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func is _aten.equal.default:
            return True
        if not alone and func in _INDEXED:
            args = (args[0], [_positions(index) for index in args[1]], *args[2:])
            args = (args[0], [index for piece in args[1] for index in piece], *args[2:])
        result = func(*args, **kwargs)
        if not alone and func._schema.is_mutable and not isinstance(args[0], FakeTensor):
            return args[0]  # a real tensor is given unknown values: its own stay, its shape is right
        return result


def _positions(index: Tensor | None) -> list[Tensor | None]:
    """An index by truth values as one by positions, whose number is then known."""
    if index is None or isinstance(index, FakeTensor) or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    with unset_fake_temporarily():
        return list(index.nonzero(as_tuple=True))


def _whole(result: Any) -> bool:
    """Whether all tensors of a result are of whole numbers or truth values."""
    return not any(tensor.is_floating_point() for tensor in tree_iter(result) if isinstance(tensor, Tensor))


def _like(real: Tensor) -> Tensor:
    return torch.empty_like(real) if isinstance(real, FakeTensor) else torch.empty(real.shape, dtype=real.dtype)


@contextmanager
def simulated() -> Iterator[None]:
    """Inside, floating-point tensors are fake. A number read from one is 1."""
    before, log = nn.Module._apply, logging.getLogger("torch._subclasses.fake_tensor")
    told = log.disabled
    nn.Module._apply, log.disabled = _moved, True  # type: ignore[method-assign]  # torch logs what it raises too
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Facts():  # type: ignore[no-untyped-call]
            yield
    finally:
        nn.Module._apply, log.disabled = before, told  # type: ignore[method-assign]


def _moved(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """What `module.to(…)` does. torch exchanges fake tensors in place, and refuses where anything looks at them."""
    for child in module.children() if recurse else ():
        _moved(child, change)
    for kept in (module._parameters, module._buffers):
        held: dict[str, Any] = kept
        for name, tensor in held.items():
            if tensor is None:
                continue
            with torch.no_grad():
                new = change(tensor)
            if new is not tensor:
                held[name] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return module


def give_storage(model: nn.Module) -> None:
    """Replace what a model has on the device "meta" by fake tensors, tied ones by one; call it inside `simulated`."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if kept is module._parameters else fake
                kept[name] = made[id(tensor)]
