"""Which models are served: the base and named adapters, of which a fixed number is in memory.

A name stands for one version of an adapter at a time. Requests hold the version that they were read with: one that is
replaced or unloaded meanwhile stays attached until the last of them has ended. Versions that nobody runs through are
taken out of the base, the longest unused first, when there is no room, and are read from their folder again when asked
for. `find`, `hold` and `release` are called by any thread, everything else by the one that owns the base.
"""

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from graft.errors import DamagedError, GraftError, ResourceError, UsageError, nearest
from graft.files import sha256_of
from graft.generate import positions_taken
from graft.methods import store
from graft.methods.base import method_of, read_method
from graft.model import Base
from graft.parts.attach import adapter_of, detach
from graft.parts.head import adapter_head
from graft.rendering.render import Renderer
from graft.runfolder import find_run

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""What an adapter may be called."""
_WEIGHTS = "adapter_model.safetensors"


class UnknownModel(UsageError):
    """A name that nothing is served under."""


class Loading(ResourceError):
    """A name whose adapter is being read for the first time."""


@dataclass(eq=False)
class Version:
    """One adapter as it was when it was loaded, or the base."""

    name: str
    folder: Path | None
    """Where it is read from; None for the base."""
    renderer: Renderer | None
    """How dialogues are written for it; None where it does not write."""
    in_place: bool = False
    """Whether it trained the base's own weights: it is then served alone."""
    key: str | None = None
    """What it is attached as; None for the base."""
    method: str | None = None
    labels: tuple[str, ...] = ()
    """Of a classifier, in the order of its scores."""
    virtual: int = 0
    """Columns of its virtual tokens."""
    taken: int = 0
    """Positions that its virtual and attended tokens take."""
    sha256: str = ""
    """Of its weights."""
    note: str = ""
    """What users should know, in one line."""
    created: int = field(default_factory=lambda: int(time.time()))
    attached: bool = False
    current: bool = True
    """Whether its name still means it."""
    used: float = 0.0
    """When it was last asked for, on the monotonic clock."""

    @property
    def task(self) -> Literal["generate", "classify", "none"]:
        """What it can be asked for."""
        return "classify" if self.labels else "generate" if self.renderer is not None else "none"


class Adapters:
    """The versions that are served on one base."""

    def __init__(self, base: Base, name: str, limit: int, writes: bool = True) -> None:
        """`limit` is how many adapters are attached at most; without `writes` the base only carries classifiers."""
        self.base, self.limit, self.writes = base, limit, writes
        self._lock = threading.Lock()
        self._holds: Counter[Version] = Counter()
        self._running: Counter[Version] = Counter()
        self._loading: set[str] = set()
        self._attached: list[Version] = []
        self._giving: Version | None = None
        self._number = 0
        self.plain = Version(name, None, Renderer(base.tokenizer) if writes else None, attached=True)
        self._named: dict[str, Version] = {}

    def names(self) -> list[str]:
        """Every name that can be asked for, the base's first."""
        with self._lock:
            return [self.plain.name, *self._named]

    def versions(self) -> list[Version]:
        """What the names stand for now."""
        with self._lock:
            return [self.plain, *self._named.values()]

    def find(self, name: str) -> Version:
        """What a name stands for. Raises `UnknownModel`, `Loading`, and `UsageError` for a base that was changed."""
        with self._lock:
            if name in self._named:
                return self._named[name]
            if name in self._loading:
                raise Loading(f"{name!r} is being loaded", "ask again in a moment")
            known = [self.plain.name, *self._named]
        if name != self.plain.name:
            raise UnknownModel(f"no model {name[:80]!r} is served", nearest(name[:80], known))
        if self.base.exclusive is not None:
            raise UsageError(f"the weights of {name!r} were changed by the adapter, so it cannot answer itself")
        return self.plain

    def hold(self, version: Version) -> None:
        """Keep a version for a request."""
        with self._lock:
            self._holds[version] += 1
            version.used = time.monotonic()

    def release(self, version: Version) -> None:
        """The request has ended."""
        with self._lock:
            self._holds[version] -= 1

    def prepare(self, name: str, folder: Path | str, replace: bool = False) -> Version:
        """A version of what lies in a run or adapter folder, not attached yet.

        Raises `UsageError` for a name that is taken or not allowed, and what reading the folder raises.
        """
        self.check_name(name, replace)
        place = adapter_folder(folder)
        in_place = trains_in_place(place)
        if in_place or self.base.exclusive is not None:
            others = self._named.keys() - {name}
            if others or self.base.adapters:
                raise UsageError(
                    f"{name!r} is or meets an adapter that changed the base's own weights, which is served alone",
                    "start a server for it",
                )
        template = store.template_file(place)
        renderer = Renderer(self.base.tokenizer, template) if self.writes else None
        version = Version(name, place, renderer, in_place)
        if renderer is not None and template and renderer.sha256 != Renderer(self.base.tokenizer).sha256:
            version.note = (
                f"trained with chat template {renderer.sha256[:8]}, its base has "
                f"{Renderer(self.base.tokenizer).sha256[:8]}; the adapter's is used"
            )
        return version

    def check_name(self, name: str, replace: bool) -> None:
        """Raise `UsageError` for a name that is not allowed, or is taken."""
        if not re.fullmatch(NAME, name):
            raise UsageError(
                f"adapter name {name[:80]!r} is not allowed",
                "use letters, digits, '.', '-' and '_', at most 64, the first one a letter or digit",
            )
        if name == self.plain.name:
            raise UsageError(f"{name!r} is the base's name", "give the adapter another one")
        with self._lock:
            if name in self._named and not replace:
                raise UsageError(f"an adapter {name!r} is served already", "unload it first, or replace it")

    @contextmanager
    def loading(self, name: str) -> Iterator[None]:
        """Requests for `name` are told to come again while the block runs, unless an older version answers them.

        Raises `Loading` where another block runs for it.
        """
        with self._lock:
            if name in self._loading:
                raise Loading(f"{name!r} is being loaded", "ask again in a moment")
            self._loading.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._loading.discard(name)

    def install(self, version: Version) -> bool:
        """Attach a prepared version and let its name mean it. What the name meant before is as it was on an error.

        False where rows run through all adapters in memory: no more are then let into one of them, and a later call
        will find it idle. Raises what `store.load` raises.
        """
        if not self.insist(version):
            return False
        if version.task == "none":
            self._take_out(version)
            raise UsageError(f"{version.name!r} has no task head, and {self.plain.name!r} does not write answers")
        with self._lock:
            before = self._named.get(version.name)
            self._named[version.name] = version
            if before is not None:
                before.current = False
        self.sweep()
        return True

    def insist(self, version: Version) -> bool:
        """Like `bring`; but where rows run through all adapters in memory, no more are let into one of them from now
        on, so that a later call finds a place."""
        giving, self._giving = self._giving, None  # an error leaves nobody barred
        if self.bring(version):
            return True
        self._giving = (
            giving
            if giving in self._attached
            else min((held for held in self._attached if not held.in_place), key=lambda held: self._running[held])
        )
        return False

    def unbar(self) -> None:
        """Nobody waits for a place any more."""
        self._giving = None

    def remove(self, name: str) -> None:
        """Let a name mean nothing any more. Raises `UnknownModel`."""
        with self._lock:
            if name not in self._named:
                raise UnknownModel(f"no adapter {name[:80]!r} is served", nearest(name[:80], self._named or ["none"]))
            self._named.pop(name).current = False
        self.sweep()

    def bring(self, version: Version) -> bool:
        """See to it that a version is attached; False where it has to wait for a place that rows run through.

        Raises what `store.load` raises, and `ResourceError` where its folder has changed.
        """
        version.used = time.monotonic()
        if version.attached:
            return version is not self._giving
        assert version.folder is not None
        if version.in_place and self.base.adapters:
            raise UsageError(f"{version.name!r} changed the base's own weights, so it is served alone")
        if len(self._attached) >= self.limit:
            idle = [held for held in self._attached if not self._running[held] and not held.in_place]
            if not idle:
                return False
            self._take_out(min(idle, key=lambda held: held.used))
        sha256 = sha256_of(version.folder / _WEIGHTS) if (version.folder / _WEIGHTS).is_file() else ""
        if version.sha256 and sha256 != version.sha256:
            raise ResourceError(f"the folder of {version.name!r} has changed since it was loaded", "load it again")
        self._number += 1
        key = f"version-{self._number}"
        adapter = store.load(self.base, version.folder, key)
        version.key, version.attached, version.sha256 = key, True, sha256
        self._attached.append(version)
        head = adapter_head(adapter)
        version.method = method_of(adapter).name
        version.labels = head.labels if head is not None else ()
        version.taken = positions_taken(self.base, [key])
        version.virtual = sum(part.positions for part in adapter_of(self.base, key).virtual_parts())
        if head is not None:
            version.renderer = None
        return True

    def enter(self, version: Version) -> None:
        """A row begins to run through a version, which must be attached."""
        self._running[version] += 1

    def leave(self, version: Version) -> None:
        """A row has ended."""
        self._running[version] -= 1

    def sweep(self) -> None:
        """Take out the versions that no name means and nobody holds any more."""
        with self._lock:
            over = [held for held in self._attached if not held.current and self._holds[held] <= 0]
            self._holds += Counter()  # forgets the zeros
        for version in over:
            if not self._running[version]:
                self._take_out(version)
        self._running += Counter()

    @property
    def attached(self) -> int:
        """How many adapters are in memory."""
        return len(self._attached)

    def _take_out(self, version: Version) -> None:
        assert version.key is not None
        detach(self.base, version.key)
        self._attached.remove(version)
        if version is self._giving:
            self._giving = None
        version.attached, version.key = False, None


def adapter_folder(given: Path | str) -> Path:
    """The adapter folder that a run folder, or the adapter folder itself, stands for. Raises `UsageError`."""
    path = Path(given).expanduser()
    if (path / "adapter_config.json").is_file():
        return path
    if (path / "trials").is_dir():
        raise UsageError(f"{given} is a comparison", "give one of its trials")
    if (path / "recipe.yaml").is_file():
        inside = find_run(path).path / "adapter"
        if not inside.is_dir():
            raise UsageError(f"{given} is a run without an adapter", "serve its base")
        return inside
    raise UsageError(f"{given} is neither a run nor an adapter folder", "`graft runs` lists the runs")


def trains_in_place(folder: Path) -> bool:
    """Whether the adapter in a folder is the base's own weights. Raises `DamagedError`."""
    method = store.about_of(folder).get("method")
    if method is None:
        return False
    try:
        return read_method(method, f"{folder}/graft.json").in_place
    except GraftError as error:
        raise DamagedError(error.message, "it was written by another version of Graft") from None
