"""Products of a few rows with large fp32 matrices, as in decoding a batch, as one batched product of their blocks.

For 4 to 15 rows MKL copies a matrix into its own order first, but not one of 32 rows. On an Intel Xeon with AVX512-FP16
8 rows took, in µs on one thread and on two: with 1,536 x 576 numbers 596 and 258, this way 393 and 200 (one row: 264
and 141); with the 49,152 x 576 words of SmolLM2 26,701 and 13,663, this way 11,330 and 5,809 (one row: 8,062 and
4,188). oneDNN's product of the same tensors took 451 and 272, 12,570 and 7,074 (torch 2.13).
"""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ROWS = range(4, 16)
"""With 3 rows a plain product is as fast, from 16 on faster."""
_LARGE = 700_000
"""Elements of a matrix from which on blocks are faster: 331,776 take as long either way, 110,592 longer."""
_BLOCK = 32
"""Rows of a block. 16 to 96 are alike for most matrices, 32 is good for all."""


def _product(module: nn.Linear, x: Tensor) -> Tensor:
    weight, rows = module.weight, x.reshape(-1, x.shape[-1])
    whole = len(weight) - len(weight) % _BLOCK
    blocks = weight[:whole].unflatten(0, (-1, _BLOCK)).transpose(1, 2)
    result = torch.bmm(rows.expand(len(blocks), -1, -1), blocks).transpose(0, 1).reshape(len(rows), whole)
    if whole < len(weight):
        result = torch.cat([result, F.linear(rows, weight[whole:])], dim=1)
    if module.bias is not None:
        result += module.bias
    return result.view(*x.shape[:-1], -1)


class FewRows:
    """A context in which a model's large linear layers compute a few rows this way. Differences are those of rounding.

    It does nothing where gradients are recorded, under autocast, off the CPU, and on processors without AVX512-FP16,
    which were not measured.
    """

    def __init__(self, model: nn.Module) -> None:
        able = bool(torch.cpu.get_capabilities().get("avx512_fp16")) and torch.backends.mkl.is_available()
        self._layers = [module for module in model.modules() if able and _fits(module)]
        self._replaced: list[nn.Module] = []

    def of(self, rows: int) -> "FewRows":
        """This context, for products of so many rows."""
        fits = rows in _ROWS and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        self._replaced = [layer for layer in self._layers if fits and "forward" not in vars(layer)]
        return self

    def __enter__(self) -> None:
        for layer in self._replaced:
            vars(layer)["forward"] = _product.__get__(layer)

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        for layer in self._replaced:
            del vars(layer)["forward"]


def _fits(module: nn.Module) -> bool:
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    here = weight.device.type == "cpu" and weight.dtype == torch.float32
    return here and weight.numel() >= _LARGE and weight.is_contiguous()
