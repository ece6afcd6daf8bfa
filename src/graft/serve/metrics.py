"""Figures of a running server, for Prometheus."""

import traceback
from collections.abc import Callable

_WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_STEPS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Meter:
    """Counters, gauges and histograms of one server, in a registry of their own.

    Labels are the names of served models and fixed words; nothing of a request's content is in them.
    """

    def __init__(self, say: Callable[[str, str], None] = lambda event, told: None) -> None:
        """`say` takes (event, what happened), for the log."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._say = say
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "graft_requests", "Requests that ended, by model and how.", ["model", "ending"], registry=registry
        )
        self._refused = Counter("graft_refused", "Requests refused, by HTTP status.", ["status"], registry=registry)
        self._tokens = Counter("graft_tokens", "Tokens written.", ["model"], registry=registry)
        self._prompts = Counter("graft_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry)
        self._first = Histogram(
            "graft_time_to_first_token_seconds", "From request to first token.", ["model"], registry=registry,
            buckets=_WAITS,
        )  # fmt: skip
        self._each = Histogram(
            "graft_time_per_token_seconds", "Time of a step, in which every running row gets a token.",
            registry=registry, buckets=_STEPS,
        )  # fmt: skip
        self._rows = Histogram("graft_batch_rows", "Rows of a step.", registry=registry, buckets=_ROWS)
        self._queue = Gauge("graft_queue_rows", "Rows and texts that wait.", registry=registry)
        self._running = Gauge("graft_running_rows", "Rows that are written.", registry=registry)
        self._used = Gauge("graft_kv_columns", "Columns of keys and values that are promised.", registry=registry)
        self._attached = Gauge("graft_adapters_attached", "Adapters in memory.", registry=registry)
        self._retries = Counter("graft_retries", "Steps done again with fewer rows: no memory.", registry=registry)
        self._unsound = Counter(
            "graft_unsound", "Requests that failed: scores were no numbers.", ["model"], registry=registry
        )
        self._faults = Counter("graft_faults", "Steps that failed.", registry=registry)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        from prometheus_client import generate_latest

        return bytes(generate_latest(self._registry))

    def asked(self, model: str, tokens: int) -> None:
        """A request with so many prompt tokens was taken in."""
        self._prompts.labels(model).inc(tokens)

    def refused(self, status: int) -> None:
        """A request was refused."""
        self._refused.labels(str(status)).inc()

    def first_token(self, model: str, seconds: float) -> None:
        """A request got its first token."""
        self._first.labels(model).observe(seconds)

    def token(self, model: str) -> None:
        """A token was written."""
        self._tokens.labels(model).inc()

    def stepped(self, rows: int, seconds: float) -> None:
        """Every running row got a token."""
        self._rows.observe(rows)
        self._each.observe(seconds)

    def ended(self, model: str, ending: str) -> None:
        """A request ended."""
        self._requests.labels(model, ending).inc()

    def state(self, waiting: int, running: int, columns: int, attached: int) -> None:
        """What there is now."""
        self._queue.set(waiting)
        self._running.set(running)
        self._used.set(columns)
        self._attached.set(attached)

    def unsound(self, model: str) -> None:
        """The scores of a request were no numbers."""
        self._unsound.labels(model).inc()
        self._say("unsound", f"the scores of {model} are no numbers")

    def retried(self) -> None:
        """Memory ran out in a step."""
        self._retries.inc()
        self._say("memory", "a step ran out of memory and is done again with fewer rows")

    def fault(self, error: BaseException) -> None:
        """A step failed; the place in the code is told, not the message, which may quote a prompt."""
        self._faults.inc()
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{frames[-1].name}, line {frames[-1].lineno}" if frames else "unknown place"
        self._say("fault", f"{type(error).__name__} in {place}")
