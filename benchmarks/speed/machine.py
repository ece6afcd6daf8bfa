"""What the machine gives: the rate of matrix products and the bandwidth of memory.

python -m benchmarks.speed.machine
"""

import json
import time
from typing import Any

import torch

_SIDE = 2048
_BEST_OF = 10
_COPIED = 1 << 28
"""Bytes copied at a time, far more than caches hold."""


def _best(call: Any) -> float:
    """The least seconds of a call, after two that do not count."""
    from benchmarks.speed.gauge import wait

    times = []
    for _ in range(_BEST_OF + 2):
        wait()
        started = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - started)
    return min(times[2:])


@torch.no_grad()
def measure() -> dict[str, Any]:
    """Operations per second of torch.nn.functional.linear on a 2048 cube in fp32 and bf16, and bytes per second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "device": device}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, weight = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * _SIDE**3 / _best(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["bytes"] = 2 * _COPIED / _best(lambda: target.copy_(source))
    return found


if __name__ == "__main__":
    print(json.dumps(measure()))
