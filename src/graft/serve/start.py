"""From the command line's words to a service: base, adapters, engine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from graft.errors import GraftError, UsageError
from graft.methods import store
from graft.model import Base, family_of, load_base
from graft.planning.machine import free_memory
from graft.quantize import quantize
from graft.serve.adapters import Adapters, adapter_folder, trains_in_place
from graft.serve.app import Service
from graft.serve.batch import Batch, bytes_per_column
from graft.serve.engine import Engine
from graft.serve.metrics import Meter
from graft.serve.security import log_line
from graft.serve.state import State
from graft.train.precision import choose

_SHARE = 4
"""Keys and values take a part in so many of the free memory, where the user does not say."""
Watch = Callable[[str, float], None]


@dataclass(frozen=True)
class Settings:
    """How a base and its adapters are served."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    max_loaded: int = 16
    """Adapters in memory at most."""
    max_rows: int = 64
    """Answers that are written at once."""
    queue: int = 256
    """Answers that may wait."""
    kv_bytes: int | None = None
    """Memory of keys and values; a quarter of what is free when left out."""
    chunk: int = 512
    """Tokens of prompts that are read between two steps."""
    root: Path | None = None
    """Where adapters that come in by request lie."""
    state: Path | None = None
    """Where it is noted which they are."""


def parse_adapters(given: list[str]) -> dict[str, Path]:
    """Folders by name, from NAME=FOLDER; a folder alone is called as itself. Raises `UsageError`."""
    found: dict[str, Path] = {}
    for one in given:
        name, equals, folder = one.partition("=")
        path = Path(folder if equals else one)
        name = name if equals else (path.parent.name if path.name == "adapter" else path.name)
        if name in found:
            raise UsageError(f"--adapter {one}: {name!r} is given twice", "give each a name of its own")
        found[name] = path
    return found


def public_name(model: str) -> str:
    """What requests call a base: its folder's name, without the folders before it, or its hub id."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() else model


def load_service(
    model: str, adapters: Mapping[str, Path], settings: Settings, name: str | None = None, watch: Watch | None = None
) -> Service:
    """The base with its adapters, each of them read and checked once. Raises what reading them raises."""
    tell = watch or (lambda phase, share: None)
    folders = {key: adapter_folder(path) for key, path in adapters.items()}
    tell("loading the base", 0.05)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose(settings.precision, device).dtype
    base = _open(model, folders, dtype)
    served = Adapters(base, name or public_name(model), settings.max_loaded, base.family.kind == "decoder")
    for number, (key, folder) in enumerate(folders.items()):
        tell(f"loading {key}", 0.4 + 0.6 * number / len(folders))
        version = served.prepare(key, folder)
        served.install(version)
        log_line("loaded", model=key, method=version.method, note=version.note)
    for parameter in base.model.parameters() if base.exclusive is not None else ():
        parameter.data = parameter.data.to(dtype)  # buffers, such as rotary frequencies, stay fp32
    state = State(settings.state) if settings.state is not None and settings.root is not None else None
    if state is not None and settings.root is not None:
        _relist(served, state, settings.root)
    meter = Meter(lambda event, told: log_line(event, what=told))
    batch = Batch(base, capacity_of(base, settings.kv_bytes), max_rows=settings.max_rows, chunk=settings.chunk)
    root = settings.root.resolve() if settings.root is not None else None
    return Service(served, Engine(served, batch, meter, settings.queue), meter, root, state)


def _open(model: str, folders: Mapping[str, Path], dtype: torch.dtype) -> Base:
    """The base, quantized where all adapters were trained on one that was; in fp32 for one that holds its weights."""
    in_place = any(trains_in_place(folder) for folder in folders.values())
    base = load_base(model, dtype=torch.float32 if in_place else dtype)
    sources = {store.quantized_from(folder) for folder in folders.values()}
    if len(sources) == 1 and (source := sources.pop()) is not None:
        quantize(base, source)
    base.model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    return base


def _relist(served: Adapters, state: State, root: Path) -> None:
    """Serve again what came in by request before. What cannot be read is left out, and told."""
    for name, folder in state.read().items():
        if name in served.names():
            continue
        try:
            served.install(served.prepare(name, root.resolve() / folder))
            log_line("loaded", model=name, again=True)
        except GraftError as error:
            log_line("left out", model=name, why=type(error).__name__)


def capacity_of(base: Base, given: int | None) -> int:
    """Columns of keys and values that memory holds. Raises `UsageError` where it holds no answer."""
    if base.family.kind != "decoder":
        return 1
    most = given if given is not None else free_memory(base.device) // _SHARE
    columns = most // bytes_per_column(base)
    if columns < 256:
        raise UsageError(f"the memory for keys and values holds {columns} tokens, 256 are needed", "give more")
    return columns


def check_base(model: str, classifies: bool) -> None:
    """Raise `UsageError` for a base that could answer nothing, before it is read."""
    kind = family_of(model).kind
    if kind != "decoder" and not classifies:
        raise UsageError(
            f"{model} is an {kind}: it serves classifiers, and none is given", "give one with --adapter NAME=RUN"
        )
