"""Products of a few rows with large fp32 matrices, as in decoding a batch, through oneDNN instead of MKL.

For 4 to 15 rows MKL copies the matrix into its own order first. On an Intel Xeon with AVX512-FP16, 8 rows times
SmolLM2's 49,152 x 576 words took 27.9 ms on one thread, oneDNN's product of the same tensors 12.8, and one row 8.2. A
token of 8 rows took 96 ms instead of 120, of 12 rows 107 instead of 151 (torch 2.13, one thread); on two threads 62
instead of 67 and 68 instead of 79.
"""

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = range(4, 16)
"""With 3 rows MKL is faster by a quarter; from 16 on both are alike."""
_LARGE, _LARGE_SHARED = 700_000, 4_000_000
"""Elements of a matrix from which on oneDNN is faster, on one thread and on more."""


def _product(module: nn.Linear, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, module.weight, module.bias, "none", [], "")
    return result


class FewRows:
    """A context in which a model's large linear layers compute a few rows this way. Differences are those of rounding.

    It does nothing where gradients are recorded, under autocast, off the CPU, and on processors without AVX512-FP16,
    which were not measured.
    """

    def __init__(self, model: nn.Module) -> None:
        able = bool(torch.cpu.get_capabilities().get("avx512_fp16")) and torch.backends.mkldnn.is_available()
        least = _LARGE if torch.get_num_threads() == 1 else _LARGE_SHARED
        self._layers = [module for module in model.modules() if able and _fits(module, least)]
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


def _fits(module: nn.Module, least: int) -> bool:
    if type(module) is not nn.Linear:
        return False
    weight = module.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= least
