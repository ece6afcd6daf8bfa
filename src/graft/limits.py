"""Bounds on work whose length somebody else decides: a time limit, and how memory that ran out is told."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` after `seconds`, and again every 0.1 s for code that catches whatever is raised.

    The main thread alone is limited: only there does Python run the handlers of signals. A timer that runs already
    goes on afterwards.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    over = False

    def stop(*_: object) -> None:
        if not over:
            raise TimeoutError(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        try:
            yield
        finally:
            over = True  # before the timer is stopped: raised between these lines, it would leave the timer running
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out, which PyTorch says in a RuntimeError, with other words on CUDA than on the CPU."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said
