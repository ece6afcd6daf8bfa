"""How fast a machine is: rates of matrix products and of memory, measured here once, or a card's from its data sheet.

An operation takes a fixed time, and then as long as its arithmetic or its bytes take, whichever is longer (the roofline
model, Williams et al., CACM 2009). Both depend on the size: small products are slower, and what fits in a cache is
faster. So both are curves, straight between measured sizes on logarithmic scales.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from graft.assets import cache_dir
from graft.engine.runtime import keep_freed_memory
from graft.errors import ResourceError, UsageError, nearest
from graft.files import write_json
from graft.measure import environment
from graft.planning.live import Live
from graft.train.precision import Precision, choose

Curve = tuple[tuple[float, float], ...]
"""Sizes and the seconds that they take, both rising."""
Watch = Callable[[str, float], None]

PRODUCT_SHARE, BANDWIDTH_SHARE = 0.45, 0.8
"""Shares of a data sheet's rates that training is assumed to reach on a card: an estimate."""
CARD_OVERHEAD = 6e-6
"""Seconds that an operation takes to be started on a card, whatever its size: an estimate."""

_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16"}
"""The rates that an operation's number format has; others, such as whole numbers, have those of fp32."""

_PRODUCTS = (
    (16, 64), (64, 128), (128, 128), (64, 384), (256, 384), (64, 768), (1024, 384), (2048, 384), (64, 2048),
    (1024, 768), (256, 2048), (2048, 768), (1024, 2048), (2048, 2048),
)  # fmt: skip
"""Rows and width of the measured products, [rows, width] by [width, width], in the order of their operations."""
_MOVED = tuple(1024 << shift for shift in (6, 8, 10, 12, 14, 16))
"""Bytes of the tensors that element-wise operations are measured on: 64 KiB to 64 MiB."""
_ROUNDS, _LONGEST, _BUDGET = 5, 0.4, 11.0
"""Each size is measured so often and its best time counts, since others may use the machine; a size that would take
more seconds than this once is left out; no round begins later than this many seconds after the first."""
_LAYOUT = 1
"""Of the cache file; what another layout wrote is measured again."""


@dataclass(frozen=True)
class Machine:
    """A machine or card, and how long its operations take."""

    name: str
    kind: Literal["cpu", "cuda"]
    """The device that computes; `cuda` for AMD's cards too, as in PyTorch."""
    memory: int
    """Bytes in all."""
    products: Mapping[str, Curve]
    """By number format, `fp32` or `bf16`: seconds of matrix products by their floating-point operations, of which a
    multiplication and an addition are two."""
    moves: Mapping[str, Curve]
    """By number format: seconds of element-wise operations by the bytes that they read and write."""
    overhead: float
    """Seconds that every operation takes beside."""
    source: str
    """Where the rates are from: measured here, or a data sheet."""
    precision: Precision
    """The number format that a run would choose on it, and why."""
    cores: int | None = None
    threads: int | None = None
    """Of PyTorch; both None for a card."""

    def seconds(self, flops: float, moved_bytes: float, dtype: torch.dtype) -> float:
        """Time of one operation that computes so much and reads and writes so many bytes."""
        name = _FORMATS.get(dtype, "fp32")
        return self.overhead + max(_on(self.products[name], flops), _on(self.moves[name], moved_bytes))

    def rate(self, dtype: torch.dtype) -> float:
        """The highest rate of matrix products, in operations a second."""
        return max(size / seconds for size, seconds in self.products[_FORMATS.get(dtype, "fp32")])

    @property
    def bandwidth(self) -> float:
        """Bytes a second of the largest element-wise operation measured, which is beyond caches."""
        size, seconds = self.moves["fp32"][-1]
        return size / seconds


def _on(curve: Curve, size: float) -> float:
    """Seconds at a size: a power law between two points, in proportion beyond the ends."""
    if size <= curve[0][0]:
        return curve[0][1] * max(size, 0) / curve[0][0]
    for (low, fast), (high, slow) in pairwise(curve):
        if size <= high:
            share = math.log(size / low) / math.log(high / low)
            return fast * math.pow(slow / fast, share)
    return curve[-1][1] * size / curve[-1][0]


def _rising(points: Mapping[float, float]) -> Curve:
    """A curve through measured times, each at least that of the size below it, so that more never takes less."""
    curve: list[tuple[float, float]] = []
    for size, seconds in sorted(points.items()):
        curve.append((size, max(seconds, curve[-1][1] if curve else 0.0)))
    return tuple(curve)


# Cards -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def cards() -> dict[str, dict[str, Any]]:
    """What the makers' data sheets say of cards, by name; rates without sparsity."""
    table = json.loads((files("graft.planning") / "cards.json").read_text(encoding="utf-8"))
    return {name: dict(values) for name, values in table.items()}


def known(name: str) -> Machine:
    """A card by name, such as `a100-80gb`: an estimate from its data sheet. Raises `UsageError` for an unknown one.

    fp32 products are taken without TF32, since PyTorch multiplies them so unless told otherwise. A card without bf16
    units computes bf16 at its rate of fp32.
    """
    key = re.sub(r"^(nvidia|amd|geforce)-", "", re.sub(r"[\s_]+", "-", name.strip().lower()))
    if key not in cards():
        longer = [card for card in cards() if key and key in card]
        said = f"did you mean {' or '.join(map(repr, longer))}?" if longer else nearest(key, cards())
        raise UsageError(f"{name!r} is no known device", said)
    card = cards()[key]
    plain = card["fp32_tflops"] * 1e12 * PRODUCT_SHARE
    half = plain if card["bf16_tflops"] is None else card["bf16_tflops"] * 1e12 * PRODUCT_SHARE
    bandwidth = card["bandwidth_gbs"] * 1e9 * BANDWIDTH_SHARE
    move = ((bandwidth, 1.0),)
    if card["bf16_tflops"] is None:
        precision = Precision(torch.float32, f"{card['title']} has no bf16 units")
    else:
        precision = Precision(torch.bfloat16, f"{card['title']} multiplies bf16")
    return Machine(
        name=card["title"], kind="cuda", memory=round(card["memory_gb"] * 2**30),
        products={"fp32": ((plain, 1.0),), "bf16": ((half, 1.0),)}, moves={"fp32": move, "bf16": move},
        overhead=CARD_OVERHEAD, precision=precision,
        source=f"estimate: {PRODUCT_SHARE:.0%} of the product rates and {BANDWIDTH_SHARE:.0%} of the bandwidth in "
        f"{card['source']}",
    )  # fmt: skip


# This machine ----------------------------------------------------------------------------------------


def measured(again: bool = False, watch: Watch | None = None, say: Callable[[str], None] | None = None) -> Machine:
    """This machine, measured with the threads that PyTorch has here, or as it was measured before.

    Takes up to 20 seconds the first time, and after that nothing unless `again`: the rates are kept in the cache
    folder, by processor, cores, threads, card and version of PyTorch. `say` is told when they cannot be read or kept;
    by default on standard error.
    """
    tell = say or (lambda line: print(line, file=sys.stderr, flush=True))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here, key = environment(), _key()
    file = cache_dir() / "machine.json"
    kept = _read(file, tell)
    rates = None if again else kept.get(key)
    if rates is None:
        rates = asdict(_measure(device, watch or (lambda phase, fraction: None)))
        try:
            write_json(file, {"layout": _LAYOUT, "machines": kept | {key: rates}})
        except ResourceError as error:
            tell(f"the rates of this machine are not kept: {error}")
    name = str(here["cpu"] if device.type == "cpu" else here["device"])
    return Machine(
        name=name, kind="cpu" if device.type == "cpu" else "cuda", memory=total_memory(device),
        products=_curves(rates["products"]), moves=_curves(rates["moves"]), overhead=rates["overhead"],
        source=f"measured on {rates['date']}, torch {here['torch']}", precision=choose("auto", device),
        cores=here["cores"], threads=here["threads"],
    )  # fmt: skip


def _key() -> str:
    here = environment()
    return f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads, {here['device']}, torch {here['torch']}"


def remembered() -> Machine | None:
    """This machine where it was measured before; None where it was not, since that takes a while."""
    kept = _read(cache_dir() / "machine.json", lambda line: None)
    return measured() if _key() in kept else None


def _curves(kept: Mapping[str, Any]) -> dict[str, Curve]:
    return {name: tuple((size, seconds) for size, seconds in points) for name, points in kept.items()}


def _read(file: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """What was measured before, by machine; nothing, with a word, where the file is damaged."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["layout"] != _LAYOUT:
            return {}
        for rates in kept["machines"].values():
            _check(rates)
        return dict(kept["machines"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        tell(f"{file} is damaged: this machine is measured again")
        return {}


def _check(rates: Any) -> None:
    """Raise `ValueError` (or what odd types raise) unless these are rates as `_measure` gives them."""
    curves = [_curves(rates[part])[name] for part in ("products", "moves") for name in ("fp32", "bf16")]
    numbers = [number for curve in curves for point in curve for number in point]
    good = all(isinstance(number, int | float) and 0 < number < math.inf for number in [*numbers, rates["overhead"]])
    steps = [step for curve in curves for step in pairwise(curve)]
    rising = all(low <= high and fast <= slow for (low, fast), (high, slow) in steps)
    if not (good and rising and all(curves) and isinstance(rates["date"], str)):
        raise ValueError("no rates")


@dataclass(frozen=True)
class _Rates:
    """What is kept of a measurement."""

    products: dict[str, Curve]
    moves: dict[str, Curve]
    overhead: float
    date: str


@torch.no_grad()
def _measure(device: torch.device, watch: Watch) -> _Rates:
    """Measure in rounds over all sizes, so that a moment in which others use the machine does not spoil one of them."""
    if device.type == "cpu":
        keep_freed_memory()
    started = time.perf_counter()
    best: dict[tuple[str, str, float], float] = {}
    overhead = math.inf
    for number in range(_ROUNDS):
        if number and time.perf_counter() - started > _BUDGET:
            break
        trials = [*_products(device), *_moves(device)]
        for place, (part, name, size, calls) in enumerate(trials):
            watch(f"measuring {part} in {name}", (number + place / len(trials)) / _ROUNDS)
            below = [(s, t) for (p, n, s), t in best.items() if (p, n) == (part, name) and s < size]
            if below and _on(_rising(dict(below)), size) > _LONGEST:
                continue
            seconds = _time(calls(), device)
            best[part, name, size] = min(seconds, best.get((part, name, size), math.inf))
        overhead = min(overhead, _overhead(device))
    return _Rates(_collect(best, "products"), _collect(best, "moves"), overhead, time.strftime("%Y-%m-%d"))


def _collect(best: Mapping[tuple[str, str, float], float], part: str) -> dict[str, Curve]:
    names = ("fp32", "bf16")
    return {name: _rising({s: t for (p, n, s), t in best.items() if (p, n) == (part, name)}) for name in names}


Trial = tuple[str, str, float, Callable[[], Sequence[Callable[[], Any]]]]
"""What is measured, in which number format, at which size, and the calls, made when they are due."""


def _products(device: torch.device) -> Iterator[Trial]:
    """Products as fine-tuning has them: rows of hidden states by a weight, and back through it."""

    def calls(rows: int, width: int, dtype: torch.dtype) -> Sequence[Callable[[], Any]]:
        states = torch.ones(rows, width, dtype=dtype, device=device)
        weight = torch.ones(width, width, dtype=dtype, device=device)
        return [lambda: nn.functional.linear(states, weight), lambda: states @ weight]

    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for rows, width in _PRODUCTS:
            yield "products", name, 2.0 * rows * width**2, partial(calls, rows, width, dtype)


def _moves(device: torch.device) -> Iterator[Trial]:
    """A mix of what stands between products: a sum, a product and an activation function."""

    def calls(size: int, dtype: torch.dtype) -> Sequence[Callable[[], Any]]:
        tensor = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
        other = torch.ones_like(tensor)
        return [lambda: tensor + other, lambda: tensor * other, lambda: nn.functional.silu(tensor)]

    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for size in _MOVED:
            yield "moves", name, 8.0 / 3.0 * size, partial(calls, size, dtype)  # 3, 3 and 2 tensors


def _time(calls: Sequence[Callable[[], Any]], device: torch.device, least: float = 0.005) -> float:
    """Mean seconds of some calls, each run as often as takes `least` seconds, after a first time."""
    total = 0.0
    for call in calls:
        call()
        once = _timed(call, 1, device)
        count = max(1, min(1000, round(least / max(once, 1e-7))))
        total += min(once, _timed(call, count, device) / count)
    return total / len(calls)


def _timed(call: Callable[[], Any], count: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _overhead(device: torch.device) -> float:
    """Seconds an operation takes in a network of a few numbers, forward and backward: nothing but its being called.

    On one thread: what it takes to wake the others is in the times by size.
    """
    width, threads = 8, torch.get_num_threads()
    layer = [nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)]
    network = nn.Sequential(*layer, *layer).to(device)
    states = torch.ones(4, width, device=device)
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            with Live() as live:
                network(states).sum().backward()
            return _time([lambda: network(states).sum().backward()], device) / len(live.works)
    finally:
        torch.set_num_threads(threads)


# Memory ----------------------------------------------------------------------------------------------

_UNITS = {"MB": 20, "MIB": 20, "GB": 30, "GIB": 30, "TB": 40, "TIB": 40}
"""Powers of 2. Makers of cards sell 2**30 bytes as a GB."""


def parse_memory(text: str) -> int:
    """Bytes of an amount such as `16GB`, `40 GiB` or `900MB`; a GB is 2**30. Raises `UsageError` for anything else."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    if found is None:
        raise UsageError(f"{text[:40]!r} is no amount of memory", "write a number and a unit, as in 16GB or 900MB")
    number, unit = found.groups()
    if not unit:
        raise UsageError(f"{text.strip()[:40]!r} has no unit", f"write {number[:20]}GB or {number[:20]}MB")
    if unit.upper() not in _UNITS:
        raise UsageError(
            f"{unit[:20]!r} is no unit of memory", "known: MB, GB, TB, and MiB, GiB, TiB, which are the same"
        )
    value = float(number) * 2.0 ** _UNITS[unit.upper()]
    if not 1 <= value < 2**60:
        raise UsageError(f"{text.strip()[:40]!r} is no memory that a machine has", "write an amount such as 16GB")
    return round(value)


def total_memory(device: torch.device) -> int:
    """Bytes that the device has in all; of main memory, what a control group allows when that is less."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [limit for limit, _ in _groups(Path("/"))]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def free_memory(device: torch.device | None = None, root: Path = Path("/")) -> int:
    """Bytes that a process can take now: on a card what its driver says; of main memory what the kernel calls
    available, or what is left of a control group's limit (versions 1 and 2) when that is less. `root` holds `proc` and
    `sys`.
    """
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min([available, *(limit - used for limit, used in _groups(root))]))


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use in bytes of each control group that this process is in and that has a limit; pages of files that
    the kernel can drop are not counted as used."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if not controllers:
            top, limit, used, dropped = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            dropped = "total_inactive_file"
        else:
            continue
        parts = [part for part in inside.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            folder = root.joinpath(top, *parts[:depth])
            try:
                bound = int((folder / limit).read_text())  # the word "max" where there is none
                taken = int((folder / used).read_text())
                kept = dict(pair.split() for pair in (folder / "memory.stat").read_text().splitlines())
                yield bound, max(0, taken - int(kept.get(dropped, 0)))
            except (OSError, ValueError):
                continue
