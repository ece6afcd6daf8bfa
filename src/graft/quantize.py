"""NF4: the matrices of a base in 4 bits (Dettmers et al. 2023, arXiv 2305.14314), on the operators of bitsandbytes.

64 neighbouring values share a scale, the largest of them, and each is kept as the nearest of 16 levels. The scales are
kept in 8 bits: their mean is taken off, and 256 of the differences share a scale in turn (double quantization).

bitsandbytes' own layer is not used: on CPUs with AVX512-BF16 it repacks its weight in the first evaluation, after which
gradients and merges are wrong without an error.
"""

import ctypes
import logging
import math
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from graft.errors import ModelError, UsageError
from graft.model import Base
from graft.sites import Packed, shape_of

BLOCK = 64
"""Values that share a scale."""
GROUP = 256
"""Scales that share a scale."""
BITS = 4 + 8 / BLOCK + 32 / (BLOCK * GROUP)
"""Bits of a weight: 4.127. What a layer has once (the mean of its scales, the code of their 8 bits) is not in it."""


class NF4Linear(Packed):
    """x Wᵀ + b with W [d_out, d_in] in NF4: the same in training and evaluation, and no gradient to W.

    Its buffers are `packed` uint8 [32 · blocks] (two levels in a byte, the first in its upper half), `scales` uint8
    [blocks], `scale_scales` fp32 [groups], `offset` fp32 [] (the mean of the scales), and `code` fp32 [256], what the 8
    bits of a scale stand for. Values are counted along the rows of W; the last block is filled up with zero bytes.
    """

    packed: Tensor
    scales: Tensor
    scale_scales: Tensor
    offset: Tensor
    code: Tensor
    bias: nn.Parameter | None
    dtype: torch.dtype
    """The number format of the base, and of `dense`."""
    source: torch.dtype
    """The number format of the weight that was quantized."""

    @property
    def weight(self) -> Tensor:
        """What the layer's weight was without its values, for code that asks for shape or format (T5's does)."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return torch.empty((), dtype=self.dtype, device="meta").expand(shape)

    def dense(self) -> Tensor:
        """The weight [d_out, d_in], made anew at each call, in the number format of the base."""
        return _dense(self._stored(), self.shape, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out], in the format of autocast where that is on, and in that of x elsewhere."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        result: Tensor = _Product.apply(x.to(dtype), bias, self.shape, *self._stored())  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        """As of `nn.Linear`."""
        return f"in_features={self.shape[1]}, out_features={self.shape[0]}, bias={self.bias is not None}"

    def _stored(self) -> tuple[Tensor, ...]:
        return self.packed, self.scales, self.scale_scales, self.offset, self.code

    def _apply(self, fn: Any, recurse: bool = True) -> "NF4Linear":
        """As of every module, but that `.to(torch.bfloat16)` would round the scales without a word: they stay fp32."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype != old.dtype:
                self._buffers[name] = old.to(now.device)
        return self


class _Product(torch.autograd.Function):
    """x Wᵀ + b. The dense weight is made in either direction and kept in none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.shape = shape
        return F.linear(x, _dense(stored, shape, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (to_x, to_bias, *others) = grads[0], ctx.needs_input_grad
        return (
            grad @ _dense(ctx.saved_tensors, ctx.shape, grad.dtype) if to_x else None,
            grad.flatten(0, -2).sum(dim=0) if to_bias else None,
            *(None for _ in others),
        )


def quantize(base: Base, dtype: torch.dtype | None = None) -> None:
    """Turn every matrix inside the layers of a base into NF4, fused ones whole. The head, the embeddings, norms and
    biases stay as they are, and so does the base's fingerprint: it names the pretrained model, in whatever format.

    Modules are changed where they are, so sites and paths stay. With `dtype` the weights are rounded to it first: an
    adapter that was trained on a bf16 base has seen NF4 of bf16 values, whatever the base is loaded in now. Weights
    on the device "meta" and fake ones become buffers of the same kind, of the right shapes.

    Raises `ModelError` where no layer has a matrix, and `UsageError` when adapters are attached, when it is done
    already, and without bitsandbytes.
    """
    if base.quantization is not None:
        raise UsageError(f"{base.name} is in {base.quantization} already")
    if base.adapters:
        raise UsageError(f"{base.name} has adapters attached", "quantize it before, or detach them")
    hosts = list({site.path: site.leave for site in base.sites if site.linear and site.layer is not None}.values())
    if not hosts:
        raise ModelError(f"{base.name}: no layer has a matrix to quantize", "leave `quantization` out")
    require_bitsandbytes()
    weights = [host.get_parameter("weight") for host in hosts]
    empty = any(weight.is_meta or isinstance(weight, FakeTensor) for weight in weights)
    code = weights[0].new_empty(256, dtype=torch.float32) if empty else _code().to(weights[0].device)
    del weights
    for host in hosts:
        _pack(host, code, dtype, empty)
    base.quantization = "nf4"
    if not empty:
        _let_go(base)


def dequantize(base: Base) -> None:
    """Turn the matrices of a quantized base into ordinary layers again, with the values that NF4 left of them."""
    for path, host in packed_layers(base):
        _unpack(path, host)
    base.quantization = None


def packed_layers(base: Base) -> Iterator[tuple[str, NF4Linear]]:
    """The layers of a base that are in NF4, by path."""
    return ((path, module) for path, module in base.modules_by_path.items() if isinstance(module, NF4Linear))


def described(base: Base) -> str:
    """How much memory the matrices of a quantized base take, in a line."""
    layers = [layer for _, layer in packed_layers(base)]
    now = sum(buffer.nbytes for layer in layers for name, buffer in layer.named_buffers() if name != "code")
    dense = sum(layer.weight.numel() * layer.dtype.itemsize for layer in layers)
    name = str(layers[0].dtype).removeprefix("torch.")
    return f"{len(layers)} matrices in {base.quantization}: {now / 1e6:,.1f} MB instead of {dense / 1e6:,.1f} in {name}"


def require_bitsandbytes(wanted: str = "quantization: nf4") -> None:
    """Load bitsandbytes, and so its operators. Late: it takes a second, and most runs do without.

    Raises `UsageError`, beginning with what is wanted, when it is not there.
    """
    # On some CPUs it fetches a kernel from the model hub, and runs it, where the package kernels is installed.
    kept = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.disabled, before = True, logger.disabled
    try:
        with unset_fake_temporarily():  # what it makes when it is loaded stays
            import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{wanted} needs the package bitsandbytes ({error})", "pip install 'graft-tuning[nf4]'"
        ) from None
    finally:
        logger.disabled = before
        del sys.modules["kernels"]
        if kept is not None:
            sys.modules["kernels"] = kept


def _code() -> Tensor:
    """What the 8 bits of a scale stand for [256], ascending (dynamic tree quantization, arXiv 2110.02861)."""
    from bitsandbytes.functional import create_dynamic_map

    made: Tensor = create_dynamic_map(signed=True)
    return made.to(torch.float32)


def _pack(linear: nn.Module, code: Tensor, dtype: torch.dtype | None, empty: bool) -> None:
    """Turn a linear layer into an `NF4Linear`, whose weight has no values when `empty`."""
    shape, transposed = shape_of(linear), isinstance(linear, Conv1D)
    weight = linear.get_parameter("weight").detach()
    rows = (weight.T if transposed else weight).to(dtype)
    buffers = _shapes(rows) if empty else _quantized(rows.contiguous(), code)
    del linear.weight
    linear.__class__ = NF4Linear
    layer = cast(NF4Linear, linear)
    layer.shape, layer.transposed, layer.dtype, layer.source = shape, transposed, weight.dtype, rows.dtype
    for name, buffer in (buffers | {"code": code}).items():
        layer.register_buffer(name, buffer)


def _unpack(path: str, layer: NF4Linear) -> None:
    weight = layer.dense()
    weight = weight.T.contiguous() if layer.transposed else weight
    for name in ("packed", "scales", "scale_scales", "offset", "code"):
        del layer._buffers[name]
    linear = cast(nn.Module, layer)
    linear.__class__ = Conv1D if layer.transposed else nn.Linear
    linear.register_parameter("weight", nn.Parameter(weight, requires_grad=False))


def _quantized(rows: Tensor, code: Tensor) -> dict[str, Tensor]:
    """The buffers of a weight [d_out, d_in]."""
    operators = torch.ops.bitsandbytes
    packed, scales = operators.quantize_4bit(rows, BLOCK, "nf4", torch.uint8)
    packed = F.pad(packed.flatten(), (0, BLOCK // 2 * len(scales) - len(packed)))
    offset = scales.mean()
    eight, scale_scales = operators.quantize_blockwise(scales - offset, code, GROUP)
    return {"packed": packed, "scales": eight, "scale_scales": scale_scales, "offset": offset}


def _dense(stored: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    packed, scales, scale_scales, offset, code = stored
    operators = torch.ops.bitsandbytes
    known = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    full = operators.dequantize_blockwise(scales, scale_scales, code, GROUP, torch.float32) + offset
    # By blocks: for rows that are no whole number of them its kernel for CPUs gives wrong values.
    blocks: Tensor = operators.dequantize_4bit(packed, full, BLOCK, "nf4", (len(full), BLOCK), known)
    return blocks.view(-1)[: math.prod(shape)].view(shape).to(dtype)


def _shapes(rows: Tensor) -> dict[str, Tensor]:
    """The buffers of a weight [d_out, d_in] that has no values, where it is."""
    blocks = math.ceil(rows.numel() / BLOCK)
    return {
        "packed": rows.new_empty(BLOCK // 2 * blocks, dtype=torch.uint8),
        "scales": rows.new_empty(blocks, dtype=torch.uint8),
        "scale_scales": rows.new_empty(math.ceil(blocks / GROUP), dtype=torch.float32),
        "offset": rows.new_empty((), dtype=torch.float32),
    }


def _let_go(base: Base) -> None:
    """Give the memory of the dense weights to the system, or a run would go on showing it.

    Weights can lie in the mapped file they were read from, which stays mapped as long as one tensor looks at it: what
    is left is copied. And glibc keeps freed pages, all of them where `engine.keep_memory` says so.
    """
    for parameter in base.model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
