"""Settings of the process: waiting threads, the C library's memory, caches. Nothing here loads torch."""

import ctypes
import os
import platform
import sys
from collections.abc import Sequence

_SPINS = "1000"
"""Turns that an OpenMP thread waits awake, a few microseconds, before it sleeps. With libgomp's own number, 300,000,
threads starve beside other processes: an attention of 0.6 ms then took 180 ms. Sleeping at once
(OMP_WAIT_POLICY=PASSIVE) costs up to 40 % on free cores: a step has some 5,000 parallel regions."""

_KERNELS = "64"
"""oneDNN kernels that are kept. Each pair of batch size and length has its own; of the default 1,024 most are unused
again."""

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Names of glibc's mallopt (malloc.h)."""


_TUNABLES = "glibc.malloc.tcache_count=0"
"""glibc 2.36 hardly ever gives a freed block to the next tensor of the same size: what it cuts off to align a block
goes to a cache of small pieces, and is missing behind the block when that is freed. Without this cache it does. Two
steps of SmolLM2-135M grew by 1.03 instead of 1.33 times their live tensors, and their time was the same."""

LONG = ("train", "compare", "demo", "eval")
"""Commands that are worth starting anew for."""


def start_anew(command: Sequence[str]) -> None:
    """Start this very process again with what the C library reads before anything else runs, for a command of `LONG`;
    once, on Linux, and unless the user has set it. Before anything is read from standard input."""
    if not command or command[0] not in LONG or sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = _TUNABLES
    if len(sys.orig_argv) > 1 and os.access(sys.executable, os.X_OK):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare_environment() -> None:
    """Set what libraries read when they are loaded, unless the user has set it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS)


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks of any size for reuse; returns whether it does.

    By default it maps every large tensor anew and unmaps it when freed, and the system clears each page again: some
    10 % of a step's time. Elsewhere than on Linux with glibc nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    done = [library.mallopt(_MMAP_THRESHOLD, 1 << 30), library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)]
    return all(done)
