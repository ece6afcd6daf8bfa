"""The thread that owns the model: it takes requests from a queue, steps the batch, and tells what was written.

Whatever changes the base (attaching and detaching adapters) happens on this thread, between steps. A step that runs out
of memory is done again with half the rows; one that fails otherwise fails its rows. Nothing waits for ever: a request
ends with an `Ended` for each row, or with one `Failed`.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from graft.errors import GraftError, ResourceError, UsageError
from graft.limits import is_memory
from graft.serve.adapters import Adapters, Version
from graft.serve.batch import Batch, Ending, Row, Token, Unsound
from graft.serve.metrics import Meter
from graft.serve.speech import Speech
from graft.serve.texts import Texts, TextsQueue

R = TypeVar("R")
_CALM = 50
"""Steps without trouble after which a batch that was made smaller may have one row more."""
_TEXTS = 16
"""Texts that take a queue's place of one answer: each is read in one pass, among others."""


class Full(ResourceError):
    """As many requests wait as may wait."""


class Stopping(ResourceError):
    """The server takes no requests any more."""


@dataclass(frozen=True)
class Piece:
    """More of one answer: text, and the tokens, where their shares were asked for."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Ended:
    """One answer is whole."""

    index: int
    ending: Ending


@dataclass(frozen=True)
class Failed:
    """The request cannot be answered."""

    error: Exception


Event = Piece | Ended | Failed


@dataclass(eq=False)
class Job:
    """One request for answers: rows through one version, held for it, and who is told."""

    version: Version
    rows: list[Row]
    tell: Callable[[Event], None]
    decode: Callable[[Sequence[int]], str]
    stops: tuple[str, ...] = ()
    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    """When its first token was written."""
    failed: bool = False
    """Whether it was told that it cannot be answered."""

    def __post_init__(self) -> None:
        self.speech = [Speech(self.decode, self.stops) for _ in self.rows]

    def cancel(self) -> None:
        """Nobody waits for it any more; any thread may say so."""
        for row in self.rows:
            row.cancelled = True

    @property
    def written(self) -> int:
        """Tokens of all answers."""
        return sum(len(row.ids) for row in self.rows)


class Engine:
    """The thread and its queue."""

    def __init__(self, adapters: Adapters, batch: Batch, meter: Meter, queue_limit: int = 256) -> None:
        self.adapters, self.batch, self.meter = adapters, batch, meter
        batch.admit = self._admit
        self.open_limit = batch.max_rows + queue_limit
        self._most_rows = batch.max_rows
        self._texts = TextsQueue(adapters, batch.chunk)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = 0
        self._jobs: dict[Row, tuple[Job, int]] = {}
        self._inside: dict[Row, Version] = {}
        self._installs: list[tuple[Version, Future[None]]] = []
        self._calm = 0
        self._ending = False
        self.draining = False
        """Whether requests are refused, since the server is about to stop."""
        self._thread = threading.Thread(target=self._run, name="graft-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def open(self) -> int:
        """Answers, and texts in their measure, that were taken in and have not ended."""
        return self._open

    def submit(self, job: Job) -> None:
        """Take a request in; its version is held until it ends. Raises `Full` and `Stopping`."""
        self._enter(len(job.rows))
        self.adapters.hold(job.version)
        self._inbox.put(lambda: self._accept(job))

    def classify(self, texts: Texts) -> None:
        """Take texts in, whose future gets their scores. Raises `Full` and `Stopping`."""
        count = 1 + len(texts.rows) // _TEXTS
        self._enter(count)
        self.adapters.hold(texts.version)
        texts.future.add_done_callback(lambda _: self._left(texts.version, count))
        self._inbox.put(lambda: self._texts.add(texts))

    def call(self, function: Callable[[], R]) -> "Future[R]":
        """Let `function` run on the engine's thread, between steps."""
        future: Future[R] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._inbox.put(run)
        return future

    def install(self, version: Version) -> "Future[None]":
        """Let a prepared version be what its name means, as soon as there is a place for it.

        The future raises what `Adapters.install` raises, and `UsageError` for one that would change the base.
        """
        future: Future[None] = Future()
        if version.in_place:
            future.set_exception(UsageError(f"{version.name!r} changed its base's weights", "start a server for it"))
            return future
        self._inbox.put(lambda: self._installs.append((version, future)))
        return future

    def stop(self, grace: float = 0.0) -> bool:
        """End: refuse requests, let those in flight go on for `grace` seconds, fail the rest. Gives whether all had
        ended by themselves.
        """
        with self._lock:
            self.draining = True
        limit = time.monotonic() + grace
        while self.open and self.alive and time.monotonic() < limit:
            time.sleep(0.02)
        whole = not self.open
        self._inbox.put(lambda: setattr(self, "_ending", True))
        self._thread.join(timeout=60)
        return whole

    def _enter(self, count: int) -> None:
        with self._lock:
            if self.draining:
                raise Stopping("the server is stopping", "ask again when it is back")
            if self._open and self._open + count > self.open_limit:
                raise Full(f"{self._open} answers are being written or wait, no more are taken", "try again later")
            self._open += count

    def _left(self, version: Version, count: int) -> None:
        with self._lock:
            self._open -= count
        self.adapters.release(version)

    def _run(self) -> None:
        while not (self._ending and self._inbox.empty()):
            self._receive()
            try:
                self._turn()
            except Exception as error:  # whatever it was, nobody may wait for an answer that never comes
                self.meter.fault(error)
                self._fail_all(error)

    def _receive(self) -> None:
        """Do what was asked for; wait for something where there is nothing else to do."""
        wait = not (self.batch.busy or self._texts.waiting or self._jobs or self._installs)
        while True:
            try:
                self._inbox.get(block=wait and not self._ending)()
            except queue.Empty:
                break
            wait = False
        if self._ending:
            self._fail_all(Stopping("the server is stopping", "ask again when it is back"))

    def _accept(self, job: Job) -> None:
        for index, row in enumerate(job.rows):
            row.virtual = job.version.virtual
            self._jobs[row] = (job, index)
        if not all(self.batch.fits(row) for row in job.rows):
            self._fail(job, ResourceError("the answer does not fit the memory for keys and values", "ask for less"))
            return
        for row in job.rows:
            self.batch.add(row)

    def _admit(self, row: Row) -> bool:
        job, _ = self._jobs[row]
        try:
            if not self.adapters.bring(job.version):
                return False
        except (GraftError, OSError) as error:
            self._fail(job, error)
            return True
        row.entry, row.virtual = job.version.key, job.version.virtual
        self._inside[row] = job.version
        self.adapters.enter(job.version)
        return True

    def _install(self) -> None:
        """Try the first of the versions that are to be installed."""
        version, future = self._installs[0]
        try:
            if not self.adapters.install(version):
                return
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(None)
        del self._installs[0]

    def _turn(self) -> None:
        if not (self._installs or self._texts.waiting):
            self.adapters.unbar()
        if self._installs:
            self._install()
        if self._texts.waiting:
            self._texts.step()
        for work, reading in ((self.batch.write, False), (self.batch.read, True)):
            started = time.monotonic()
            try:
                written = work()
            except Exception as error:
                self._recover(error, reading)
                continue
            for row, token in written:
                self._told(row, token)
            if written and not reading:
                self.meter.stepped(len(written), time.monotonic() - started)
        self._settle()
        self._calm += 1
        if self._calm >= _CALM and self.batch.max_rows < self._most_rows:
            self.batch.max_rows, self._calm = self.batch.max_rows + 1, 0

    def _told(self, row: Row, token: Token) -> None:
        """Pass a token on as text."""
        job, index = self._jobs[row]
        if job.first is None:
            job.first = time.monotonic()
            self.meter.first_token(job.version.name, job.first - job.started)
        self.meter.token(job.version.name)
        speech = job.speech[index]
        own = token.id not in row.stop_ids
        text = speech.add(token.id) if own else ""
        if speech.stopped:
            row.end("stop")
        if row.ending is not None:
            text += speech.rest()
            if speech.stopped:
                row.end("stop")
        tokens = (token,) if own and row.top_logprobs is not None else ()
        if text or tokens:
            self._tell(job, Piece(index, text, tokens))
        if row.ending is not None:
            self._tell(job, Ended(index, row.ending))

    def _tell(self, job: Job, event: Event) -> None:
        try:
            job.tell(event)
        except Exception:  # its event loop is gone
            job.cancel()

    def _settle(self) -> None:
        """Let go of rows that have ended, and of versions that were needed by them alone."""
        for job in {id(job): job for row, (job, _) in self._jobs.items() if row.ending == "unsound"}.values():
            if not job.failed:
                name = job.version.name
                self.meter.unsound(name)
                self._fail(job, Unsound(f"the scores of {name!r} are no numbers", "its weights are damaged"))
        for row in [row for row in self._jobs if row.ending is not None or row.cancelled]:
            job, _ = self._jobs.pop(row)
            with self._lock:
                self._open -= 1
            if not any(other in self._jobs for other in job.rows):
                self.adapters.release(job.version)
                early = any(one.ending is None for one in job.rows)
                ending = "failed" if job.failed else "cancelled" if early else "done"
                self.meter.ended(job.version.name, ending)
        held = set(self.batch.held)
        for row in [row for row in self._inside if row not in held]:
            self.adapters.leave(self._inside.pop(row))
        self.adapters.sweep()
        waiting = len(self.batch.waiting) + self._texts.waiting
        self.meter.state(waiting, len(self.batch.live), self.batch.used, self.adapters.attached)

    def _recover(self, error: Exception, reading: bool) -> None:
        """Go on after a failed step: with fewer rows where memory ran out, else without the rows of that step."""
        rows = self.batch.abandon(reading)
        self._calm = 0
        if is_memory(error) and len(self.batch.held) + len(rows) > 1:
            self.batch.max_rows = max(1, (len(self.batch.held) + len(rows)) // 2)
            self.batch.waiting.extendleft(reversed(rows))
            self.meter.retried()
            return
        if is_memory(error):
            error = ResourceError("memory ran out", "shorten the prompt, or ask for fewer tokens")
        else:
            self.meter.fault(error)
        for job in {id(job): job for job, _ in (self._jobs[row] for row in rows)}.values():
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        job.failed = True
        job.cancel()
        self._tell(job, Failed(error))

    def _fail_all(self, error: Exception) -> None:
        self.batch.abandon()
        self.batch.waiting.clear()
        for job in {id(job): job for job, _ in self._jobs.values()}.values():
            self._fail(job, error)
        self._texts.fail(error)
        for _, future in self._installs:
            future.set_exception(error)
        self._installs.clear()
        self._settle()
